"""What a question is about: which moments of a video, how near each segment is to it, or the video as a whole.

Shape letters: S segments, V search vectors of a video, E search channels.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

MOST = 0.75  # of a video: what is seen for longer is no moment of it
# Words that only ask. Text encoders learnt from captions, which have none of them, so that what is left of a question
# is nearer to what it is about: on the tiny world the nearest frame was right in 93 % of cases, with all words in 41 %.
_WORDS = """
what which who whom whose where when why how is are was were be been being do does did has have had can could will would
should may might there it its this that comes come came goes go happens happen happened happening appears appear
appeared seen see shown show after before first last next then many much video clip
"""
_ASKING = frozenset(_WORDS.split())
_FILLING = frozenset({"a", "an", "the", "in", "on", "at", "of", "to"})  # alone they say nothing
_VIDEO = r"(the|this) (video|clip|film|movie)\b"
_CLOCK = re.compile(r"(?<![\d:.])(?:(\d{1,2}):)?(\d{1,2}):([0-5]\d)(?![\d:]|\s*[ap]\.?m\b)", re.IGNORECASE)  # 1:02:03
_SPELT = re.compile(r"\bat (?:about )?(\d+(?:\.\d+)?) ?(s|secs?|seconds?|mins?|minutes?)\b", re.IGNORECASE)
_AT_START = re.compile(rf"\b(at|in) the (very )?(start|beginning)\b(?! of (?!{_VIDEO}))", re.IGNORECASE)
_AT_END = re.compile(rf"\b(at|in) the (very )?end\b(?! of (?!{_VIDEO}))", re.IGNORECASE)
_FIRST, _LAST = (re.compile(rf"\b{word}\b", re.IGNORECASE) for word in ("first", "last"))
_AFTER = re.compile(r"\b(after|following|follows|next(?! to\b)|then|afterwards)\b", re.IGNORECASE)
_BEFORE = re.compile(r"\b(before|previous|previously|prior|preceding|precedes)\b", re.IGNORECASE)
_WHOLE = re.compile(
    r"\b(how (many|often|long)|number of|count|first|last|(what|which) order|sequence|describe|summari[sz]e|summary|"
    r"overall|whole|entire|throughout|mainly|mostly|in total)\b|\babout\W*$"
    rf"|\b(happens?|happened|happening|going on) in {_VIDEO}",
    re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class SearchVectors:
    """Search vectors of a video: of each frame of a segment, or of the segment alone where frames have none."""

    unit: Tensor  # [V, E], of length 1, in time order
    counts: tuple[int, ...]  # S: how many each segment has


def search_vectors(segments: pa.Table) -> SearchVectors | None:
    """The search vectors of a video's rows of the table `segments`; None where a segment has none at all."""
    parts = []
    for frames, of_frames, of_segment in zip(
        segments["frames"], segments["frame_embeddings"], segments["embedding"], strict=True
    ):
        if of_frames.is_valid:
            parts.append(np.frombuffer(of_frames.as_buffer(), np.int8).reshape(len(frames), -1).astype(np.float32))
        elif of_segment.is_valid:
            parts.append(of_segment.values.to_numpy()[None])
        else:
            return None
    unit_VE = normalize(torch.from_numpy(np.concatenate(parts)), dim=-1)
    return SearchVectors(unit_VE, tuple(len(part) for part in parts))


def times_named(question: str, end_s: float) -> list[float]:
    """The times within a video of which a question speaks, in seconds: 83.0 for "What is seen at 1:23?".

    They are written as 1:23, 1:02:03, "at 83 s" or "at 2 minutes". The beginning and the end are times too, and so are
    "first" and "last" where nothing else is asked about.
    """
    times_s = [(int(hours or 0) * 60 + int(minutes)) * 60.0 + int(s) for hours, minutes, s in _CLOCK.findall(question)]
    times_s += [
        float(number) * (60 if unit.startswith("m") else 1) for number, unit in _SPELT.findall(question.lower())
    ]
    times_s = [time_s for time_s in times_s if time_s <= end_s]
    says_nothing_else = not _said(question)
    for at_edge, alone, time_s in ((_AT_START, _FIRST, 0.0), (_AT_END, _LAST, end_s)):
        if at_edge.search(question) or (says_nothing_else and alone.search(question)):
            times_s.append(time_s)
    return times_s


def asked_about(question: str) -> str:
    """A question without the words that only ask: "the red circle move" of "how does the red circle move?"."""
    return " ".join(_said(question)) or question


def _said(question: str) -> list[str]:
    """The words of a question that do not only ask; none where they say nothing."""
    words = [word for word in re.findall(r"[\w'-]+", question) if word.lower() not in _ASKING]
    return words if any(word.lower() not in _FILLING for word in words) else []


def near_times(times_s: Sequence[float], segments: Sequence[Mapping[str, Any]]) -> Tensor:
    """How near segments are to the nearest of some times, [S]: minus the seconds to it, 0 for one that holds it."""
    starts_S, ends_S = (np.array([one[name] for one in segments])[:, None] for name in ("start_s", "end_s"))
    at = np.array(times_s)
    # a segment ends where the next begins, and a time there is the next one's
    ends_S = np.nextafter(ends_S, -np.inf)
    away_ST = np.maximum(starts_S - at, 0) + np.maximum(at - ends_S, 0)
    return torch.from_numpy(-away_ST.min(axis=1))


def near_text(vectors: SearchVectors, text_E: Tensor) -> Tensor:
    """How near segments are to a text, [S]: the best cosine of a segment's search vectors."""
    starts = [0, *accumulate(vectors.counts)][:-1]
    return torch.from_numpy(np.maximum.reduceat((vectors.unit @ text_E).numpy(), starts))


def around(question: str, nearness_S: Tensor) -> Tensor:
    """Nearness with what a question needs beside the nearest segments, [S].

    Neighbours help to tell how something moves: nearness is smoothed over them. What comes after something is seen
    where nearness falls: beyond that edge first, then on its near side; what comes before it, where nearness rises.
    """
    padded = torch.cat([nearness_S[:1], nearness_S, nearness_S[-1:]])
    falls = padded[:-1] - padded[1:]  # [S + 1], at each segment's left edge and the last one's right
    if _AFTER.search(question):
        return falls[:-1] + falls[1:] / 2
    if _BEFORE.search(question):
        return -falls[1:] - falls[:-1] / 2
    return (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4


def is_of_a_moment(question: str, nearness_S: Tensor) -> bool:
    """Whether a question that names no time is about a moment of a video, and not about the whole.

    Words decide first: those that ask for the whole, then those that ask for what comes after or before something. Else
    it is about the whole if what it asks about is to be seen `MOST` of the time or longer: were segments either near or
    far, and a part p of them near, the best would lie sqrt((1 - p) / p) standard deviations above the mean.
    """
    if _WHOLE.search(question):
        return False
    if _AFTER.search(question) or _BEFORE.search(question):
        return True
    peak = math.sqrt((1 - MOST) / MOST)
    return bool(nearness_S.max() - nearness_S.mean() >= peak * nearness_S.std(correction=0))
