"""Check and measure every CUDA path in minutes, from a bare checkout.

    python -m benchmarks.gpu [--minutes 7] [--only SECTION ...] [--out FOLDER] [--device cuda|cpu] [--tiny]

facts   what the device is, and that it computes
right   the tests that take a device: CUDA against the CPU
memory  a device that is full: the engine halves, and keys and values stay within their budget
encode  frames in host memory to merged tokens in host memory, at three towers' shapes
answer  a LLaMA of 7B: questions a second, and how far that is from what the device could do
train   a LLaMA of 7B: tokens a second and memory of training steps
qwen3_vl  Qwen3-VL-2B: frames a second, and questions over them
decode  videos on the card's own decoder: frames against the CPU's, hash by hash, and how many a second

Each section has its share of the time, what one leaves goes to the next, and its JSON is in the folder as soon as there
is something in it. `--device cpu --tiny` is a rehearsal. The last line is one JSON object.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu.section import SectionResult, run_section

# By worth, with the seconds that each is meant to need on an H100. The first is always run: it names the folder.
SECTIONS = {
    "facts": 15,
    "right": 110,
    "memory": 45,
    "encode": 75,
    "answer": 110,
    "qwen3_vl": 45,
    "decode": 30,
    "train": 60,
}
MOST_FACTS_S = 90.0  # where a process has to import everything for itself
RUNS = Path(__file__).parent / "runs"
# Imported once, by a process that never touches a device and that all sections are forked from.
PRELOAD = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "pyarrow",
    "pandas",
    "pytest",
]
# The last line's figures: the section that finds each, its name there, and what is aimed for.
FIGURES = {
    "right_max_error": ("right", "max_error", ""),
    "encode_share_of_peak": ("encode", "peak_share", "0.5"),
    "encode_frames_per_s": ("encode", "frames_per_s", ""),
    "answer_questions_per_s": ("answer", "questions_per_s", "190 on an H100"),
    "answer_bool_per_s": ("answer", "bool_per_s", "240 on an H100"),
    "decode_over_floor": ("answer", "decode_over_floor", "at most 2"),
    "host_ms_per_step": ("answer", "host_ms_per_step", ""),
    "qwen3_vl_frames_per_s": ("qwen3_vl", "frames_per_s", ""),
    "qwen3_vl_questions_per_s": ("qwen3_vl", "questions_per_s", ""),
}


class Parser(argparse.ArgumentParser):
    """Arguments; wrong ones get a sentence."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{message.rstrip('.')}.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; the exit code is 1 if one failed."""
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="for all sections together (default 7)")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help="leave the others out")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/gpu/runs/ and the device)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a rehearsal")
    given = parser.parse_args(arguments)
    if given.minutes <= 0:
        parser.error(f"--minutes is {given.minutes:g}; it must be more than 0")
    if given.device == "cpu" and not given.tiny:
        parser.error("a CPU would need hours for these shapes; add --tiny for a rehearsal")
    if given.device == "cuda" and not _can_load("libcuda.so.1"):
        parser.error("torch sees no CUDA device: there is no driver (libcuda.so.1); --device cpu --tiny rehearses")
    ends_s = time.monotonic() + 60 * given.minutes
    # Counts devices without starting CUDA, which could not be used after a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if given.device == "cpu":  # threads gain nothing at these shapes, and spin for cores that others use
        os.environ["OMP_NUM_THREADS"] = "1"
    context, facts = _begin(given, ends_s)
    if given.device == "cuda" and facts.error is None and not facts.found["device"]:
        parser.error("torch sees no CUDA device; --device cpu --tiny rehearses")
    name = str(facts.found.get("device") or given.device) + (" tiny" if given.tiny else "")
    folder = given.out or RUNS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    _write(folder, facts)
    outcomes = [facts]
    names = [name for name in SECTIONS if name != "facts" and name in (given.only or SECTIONS)]
    for i, name in enumerate(names):
        left_s = ends_s - time.monotonic()
        share_s = left_s * SECTIONS[name] / sum(SECTIONS[later] for later in names[i:])
        outcomes.append(_run(context, name, given, share_s, folder))
    _print_table(outcomes)
    print(json.dumps(summary(outcomes)), flush=True)
    return int(any(outcome.error for outcome in outcomes))


def _begin(given: argparse.Namespace, ends_s: float) -> tuple[BaseContext, SectionResult]:
    """The way to start processes on this machine, and what the first of them found.

    Forked ones have their libraries at once. Where CUDA cannot be used in such a one, each imports them for itself.
    """
    forked = get_context("forkserver")
    forked.set_forkserver_preload(PRELOAD)
    for context in (forked, get_context("spawn")):
        facts = _run(context, "facts", given, min(ends_s - time.monotonic(), MOST_FACTS_S), None)
        if facts.error is None and (facts.found.get("device") or given.device == "cpu"):
            break
    return context, facts


def _run(
    context: BaseContext, name: str, given: argparse.Namespace, share_s: float, folder: Path | None
) -> SectionResult:
    print(f"{name}: at most {share_s:.0f} s", flush=True)

    def hear(outcome: SectionResult, line: str) -> None:
        if line:
            print(f"  {line}", flush=True)
        elif folder is not None:
            _write(folder, outcome)

    if share_s < 1:
        outcome = SectionResult(name, error="there was no time left for it.")
    else:
        outcome = run_section(context, name, given.device, share_s, is_tiny=given.tiny, on_news=hear)
    if outcome.error:
        print(f"  {outcome.error}", flush=True)
    if folder is not None:
        _write(folder, outcome)
    return outcome


def summary(outcomes: Iterable[SectionResult]) -> dict[str, Any]:
    """The last line."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    found = {name: outcome.found for name, outcome in by_name.items()}
    return {
        "device": found["facts"].get("device"),
        "sections": {name: outcome.error or "ok" for name, outcome in by_name.items()},
        **{figure: found.get(section, {}).get(name) for figure, (section, name, _) in FIGURES.items()},
    }


def _print_table(outcomes: Sequence[SectionResult]) -> None:
    print(f"\n{'section':<8} {'s':>6}  result")
    for outcome in outcomes:
        print(f"{outcome.name:<8} {outcome.wall_s:6.1f}  {outcome.error or 'ok'}")
    print(f"\n{'figure':<24} {'found':>10}  aim")
    found = summary(outcomes)
    for figure, (*_, aim) in FIGURES.items():
        value = "-" if found[figure] is None else f"{found[figure]:.4g}"
        print(f"{figure:<24} {value:>10}  {aim}")


def _write(folder: Path, outcome: SectionResult) -> None:
    """The section's file, whole at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{outcome.name}.json"
    draft.write_text(json.dumps(outcome.as_json(), indent=1) + "\n")
    draft.replace(folder / f"{outcome.name}.json")


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # not without ending the section
    sys.exit(main())
