"""Which seconds of a video an answer rests on: attention to visual tokens, folded onto the stored segments.

Shape letters: N tokens, S stored segments, E pairs of a token and a segment that it meets.
"""

# ruff: noqa: N803, N806 - arrays are named by their shape

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from longvlm.pipeline.models.prompt import clock
from longvlm.pipeline.vision.tokens import VideoTokens

NUM_SPANS = 3  # more are not read, and attention beyond the strongest few is spread thin


def fold(
    attention: Tensor | None, video: VideoTokens, num_global: int, segments: Sequence[Mapping[str, Any]]
) -> list[dict[str, float]]:
    """The stored segments that drew the most attention, as a row of `tables.EVIDENCE`.

    What a local token drew is shared out over the segments whose frames it draws on, in proportion to how many frames
    of its span are theirs; a token whose span lies between segments counts for nothing. Global tokens have no time and
    are left out. Segments are never joined, so that start_s and end_s are those of rows of `segments`.

    Args:
        attention: [N], mean attention from the answer's tokens to each row of the prefix; None where there is none.
        video: as it went into the prefix.
        num_global: rows of the prefix before the local tokens.
        segments: the video's rows of the table `segments` (start_s, end_s, first_frame, last_frame), in time order.

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
    weights_S = _over_segments(weights_N, video.spans.numpy(), segments)
    strongest = [i for i in np.argsort(-weights_S, kind="stable")[:NUM_SPANS].tolist() if weights_S[i] > 0]
    total = sum(weights_S[i] for i in strongest)
    return [
        {
            "start_s": float(segments[i]["start_s"]),
            "end_s": float(segments[i]["end_s"]),
            "weight": float(weights_S[i] / total),
        }
        for i in strongest
    ]


def describe(evidence: Sequence[Mapping[str, Any]]) -> str:
    """Evidence for people: `0:12-0:18 (41 %), 1:02:03-1:02:13 (22 %)`."""
    return ", ".join(
        f"{clock(span['start_s'])}-{clock(span['end_s'])} ({span['weight'] * 100:.0f} %)" for span in evidence
    )


def _over_segments(weights_N: Any, spans_N2: Any, segments: Sequence[Mapping[str, Any]]) -> Any:
    """Each token's weight shared out, [S]. Segments follow each other, so those that a span meets are consecutive."""
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
    return np.bincount(segment_E, weights_N[token_E] * frames_E / frames_N[token_E], len(segments))
