"""Figures and names as a person reads them: `1 row`, `3 min 20 s`, `1.2 GB`, and paths without what all share."""

import math
from collections.abc import Collection, Mapping
from typing import Any

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def counted(number: int, noun: str) -> str:
    """So many of something whose plural has an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def spell_seconds(seconds: float) -> str:
    """A length of time: 0.04 s, 12 s, 3 min 20 s, 1,234 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def spell_moment(seconds: float) -> str:
    """A moment of a video, to the tenth of a second where it falls between two: 2:03, 2:03.5, 1:02:03."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths // 10, 60)
    hours, minutes = divmod(minutes, 60)
    said = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{said}.{tenths % 10}" if tenths % 10 else said


def spell_bytes(number: float) -> str:
    """A size: 812 bytes, 1.2 GB."""
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return counted(round(number), "byte")


def spell_figure(name: str, value: Any) -> tuple[str, str]:
    """A figure of a report with what it is called there: `wall_s` and 200.4 are `wall time` and `3 min 20 s`."""
    for ending, in_seconds in (("_s", 1), ("_seconds", 1), ("_hours", 3600)):
        if name.endswith(ending) and isinstance(value, int | float):
            return f"{name.removesuffix(ending).replace('_', ' ')} time", spell_seconds(value * in_seconds)
    label = name.replace("_", " ")
    if name.endswith("_bytes") and isinstance(value, int | float):
        return label.removesuffix(" bytes"), spell_bytes(value)
    if isinstance(value, float):
        return label, _spell_float(value)
    return label, f"{value:,}" if type(value) is int else str(value)


def _spell_float(value: float) -> str:
    """Three digits that count, or all of a larger number; never a power of ten."""
    if not math.isfinite(value) or value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def listed(counts: Mapping[str, int]) -> str:
    """Counts by name in a line: `truncated 2, not_a_video 1`."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def short_names(uris: Collection[str]) -> tuple[str, dict[str, str]]:
    """The folder that all of some addresses share, and each without it; a single one is called by its file's name."""
    parts = [uri.split("/")[:-1] for uri in uris]
    shared = 0
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    if parts and shared < (3 if "://" in next(iter(uris)) else 2):  # a protocol or the root is no folder to speak of
        shared = 0
    folder = "/".join(parts[0][:shared]) if parts else ""
    return folder, {uri: "/".join(uri.split("/")[shared:]) for uri in uris}
