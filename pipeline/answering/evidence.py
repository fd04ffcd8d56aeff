"""Which seconds of a video an answer rests on: attention to visual tokens, folded onto segments and their frames.

Shape letters: N tokens, S stored segments, E pairs of a token and a segment that it meets, F frames of a segment.
"""

# ruff: noqa: N803, N806 - arrays are named by their shape

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from longvlm.pipeline.models.prompt import clock
from longvlm.pipeline.vision.tokens import VideoTokens

NUM_SPANS = 3  # more are not read, and attention beyond the strongest few is spread thin
# A few frames are told instead of their segment where no more than this part of its frames has this part of its weight.
_OF_FRAMES, _OF_WEIGHT = 1 / 3, 1 / 2
_ROUNDING = 1e-9  # of sums


def fold(
    attention: Tensor | None, video: VideoTokens, num_global: int, segments: Sequence[Mapping[str, Any]]
) -> list[dict[str, float]]:
    """Where in the video the most attention went, as a row of `tables.EVIDENCE`.

    What a local token drew is shared out over the segments whose frames it draws on, in proportion to how many frames
    of its span are theirs; a token whose span lies between segments counts for nothing. Global tokens have no time and
    are left out. Each span lies within one stored segment, and its weight is the segment's.

    A token that draws on a third of a segment's frames or fewer says when in the segment that was: its weight is spread
    over these, and that of others over all. If a third of the frames or fewer, one after the other, hold half of the
    weight, the shortest such run is told, and else the whole segment.

    Args:
        attention: [N], mean attention from the answer's tokens to each row of the prefix; None where there is none.
        video: as it went into the prefix.
        num_global: rows of the prefix before the local tokens.
        segments: the video's rows of the table `segments` (start_s, end_s, first_frame, last_frame, frames, times_s),
            in time order; of rows without frames, whole segments are told.

    Returns:
        At most `NUM_SPANS` of start_s, end_s and weight, the strongest first and of equals the earlier; weights sum to
        one. Empty where no attention was given, or no number.

    Raises:
        ValueError: there is not one attention for each row of the prefix.
    """
    if attention is None:
        return []
    weights_N = attention.double().cpu().numpy()[num_global:]
    if len(weights_N) != len(video.spans):
        raise ValueError(f"{len(attention)} attentions for {num_global} global and {len(video.spans)} local tokens")
    if not np.isfinite(weights_N).all():
        return []
    pairs = _over_segments(weights_N, video.spans.numpy(), segments)
    weights_S = np.bincount(pairs.segments, pairs.weights, len(segments))
    strongest = [i for i in np.argsort(-weights_S, kind="stable")[:NUM_SPANS].tolist() if weights_S[i] > 0]
    total = sum(weights_S[i] for i in strongest)
    found = []
    for i in strongest:
        is_here_E = pairs.segments == i
        spans_E2 = video.spans.numpy()[pairs.tokens[is_here_E]]
        start_s, end_s = _within(segments[i], pairs.weights[is_here_E], spans_E2)
        found.append({"start_s": start_s, "end_s": end_s, "weight": float(weights_S[i] / total)})
    return found


def describe(evidence: Sequence[Mapping[str, Any]]) -> str:
    """Evidence for people: `0:12-0:18 (41 %), 1:02:03-1:02:13 (22 %)`."""
    return ", ".join(
        f"{clock(span['start_s'])}-{clock(span['end_s'])} ({span['weight'] * 100:.0f} %)" for span in evidence
    )


class _Pairs(NamedTuple):
    """Tokens and the segments that they meet."""

    tokens: NDArray[np.int64]  # [E]
    segments: NDArray[np.int64]  # [E]
    weights: NDArray[np.float64]  # [E]: the part of the token's weight that is the segment's


def _over_segments(
    weights_N: NDArray[np.float64], spans_N2: NDArray[np.int64], segments: Sequence[Mapping[str, Any]]
) -> _Pairs:
    """Each token's weight shared out. Segments follow each other, so those that a span meets are consecutive."""
    first_S = np.array([segment["first_frame"] for segment in segments])
    last_S = np.array([segment["last_frame"] for segment in segments])
    from_N = np.searchsorted(last_S, spans_N2[:, 0])
    num_met_N = np.maximum(np.searchsorted(first_S, spans_N2[:, 1], side="right") - from_N, 0)
    token_E = np.repeat(np.arange(len(weights_N)), num_met_N)
    segment_E = from_N[token_E] + np.arange(len(token_E)) - np.repeat(np.cumsum(num_met_N) - num_met_N, num_met_N)
    frames_E = (
        np.minimum(last_S[segment_E], spans_N2[token_E, 1]) - np.maximum(first_S[segment_E], spans_N2[token_E, 0]) + 1
    )
    frames_N = np.bincount(token_E, frames_E, len(weights_N))
    return _Pairs(token_E, segment_E, weights_N[token_E] * frames_E / frames_N[token_E])


def _within(
    segment: Mapping[str, Any], weight_E: NDArray[np.float64], spans_E2: NDArray[np.int64]
) -> tuple[float, float]:
    """The seconds of a segment that its tokens point to: all of it where they do not say."""
    start_s, end_s = float(segment["start_s"]), float(segment["end_s"])
    frames_F = np.array(segment.get("frames") or [])  # null in rows of before
    from_E = np.searchsorted(frames_F, spans_E2[:, 0])
    to_E = np.searchsorted(frames_F, spans_E2[:, 1], side="right")
    is_wide_E = (to_E - from_E > _OF_FRAMES * len(frames_F)) | (from_E == to_E)
    from_E, to_E = np.where(is_wide_E, 0, from_E), np.where(is_wide_E, len(frames_F), to_E)
    per_frame_E = weight_E / np.maximum(to_E - from_E, 1)
    changes = np.zeros(len(frames_F) + 1)  # of a frame's weight against that of the one before it
    np.add.at(changes, from_E, per_frame_E)
    np.add.at(changes, to_E, -per_frame_E)
    held = np.concatenate([[0.0], np.cumsum(np.cumsum(changes[:-1]))])  # by the first 0, 1, ... F frames
    enough = _OF_WEIGHT * weight_E.sum() * (1 - _ROUNDING)
    firsts = np.flatnonzero(held[-1] - held[:-1] >= enough)
    ends = np.minimum(np.searchsorted(held, held[firsts] + enough), len(frames_F))  # which a sum's rounding may pass
    if not len(firsts) or (ends - firsts).min() > _OF_FRAMES * len(frames_F):
        return start_s, end_s
    # of equally short runs that which holds most, then the earlier
    best = min(range(len(firsts)), key=lambda i: (ends[i] - firsts[i], -(held[ends[i]] - held[firsts[i]])))
    shown = pairwise(zip(segment["frames"], segment["times_s"], strict=True))
    edges_s = [start_s, *(_edge(*a, *b) for a, b in shown), end_s]
    return float(edges_s[firsts[best]]), float(edges_s[ends[best]])


def _edge(frame: int, shown_s: float, following: int, following_s: float) -> float:
    """Where what a frame stands for ends and what the following one stands for begins.

    That is when the following one is shown, if there is none between them; else halfway, since each was taken from the
    middle of what it stands for.
    """
    return following_s if following == frame + 1 else (shown_s + following_s) / 2
