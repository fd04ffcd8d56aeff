"""From a sample of videos that were watched to all of them: hours, bytes, wall and cost, each with an interval.

All figures follow from four sums over videos: seconds of video, segments, seconds of decoding (CPU) and seconds of
encoding (of one encoder).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from longvlm.jobs.cluster.resources import IndexResources

DRAWS = 2000  # of the bootstrap
COVERAGE = 0.9  # of every interval
_Z = 1.645  # standard errors to each side that cover as much
_SUMS = ("video_s", "segments", "decode_s", "encode_s")


@dataclass(frozen=True)
class CostModel:
    """A cost model: what turns the four sums into figures, on the cluster that the sample ran on."""

    resources: IndexResources  # of the whole run
    segment_bytes: float  # in the store's files
    decoder_s: float  # wall seconds of a decoder for each CPU second of decoding: it also fetches and waits
    encoder_s: float  # wall seconds of an encoder for each second of encoding
    encode_cpu_s: float  # CPU seconds for each second of encoding
    gpu_price: float | None  # of an hour
    cpu_price: float | None

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Every figure of a run, from rows of sums [n, 4] in the order above; not finite where nothing was encoded.

        The cost is that of the hours in which cores decode and GPUs (else cores) encode: of a cluster with as many
        cores for each GPU as `cpus_per_encoder` says, which is given back in time.
        """
        video_s, segments, decode_s, encode_s = sums.T
        on_gpu = self.resources.encoder_gpus > 0
        decoding_s = decode_s * self.decoder_s / self.resources.decoders
        encoding_s = encode_s * self.encoder_s / self.resources.encoders
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = decode_s / encode_s
        figures = {
            "video_hours": video_s / 3600,
            "store_bytes": segments * self.segment_bytes,
            "decode_cpu_hours": decode_s / 3600,
            "encode_hours": encode_s / 3600,
            "wall_hours": np.maximum(decoding_s, encoding_s) / 3600,
            "cpus_per_encoder": ratio,
        }
        if self.cpu_price is not None and not on_gpu:
            figures["cost"] = (decode_s + encode_s * self.encode_cpu_s) / 3600 * self.cpu_price
        elif self.cpu_price is not None and self.gpu_price is not None:
            figures["cost"] = (decode_s * self.cpu_price + encode_s * self.gpu_price) / 3600
        return figures


def project(
    rows: list[dict[str, Any]], work: dict[str, float], cost_model: CostModel, seed: int
) -> tuple[dict[str, float | None], dict[str, list[float | None]]]:
    """Every figure for all of the work, and the interval it is likely to lie in.

    In proportion to bytes, or to videos where not every size is known. The intervals come from a bootstrap: the sample
    is drawn again from itself, video by video, and projected each time. They know nothing of machines that slow down.

    Args:
        rows: a video each: size_bytes, video_s, segments, decode_s, encode_s.
        work: as `Changes.workload` gives it.
        cost_model: as the sample gave it.
        seed: of the draws.
    """
    by_bytes = not work["num_unknown_sizes"] and sum(row["size_bytes"] for row in rows) > 0
    base = np.array([row["size_bytes"] if by_bytes else 1.0 for row in rows])
    total = work["size_bytes"] if by_bytes else work["videos"]
    measured = np.array([[row[name] for name in _SUMS] for row in rows], dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(rows), size=(DRAWS, len(rows)))
    if len(rows) == work["videos"]:  # nothing is left to chance
        picks = np.arange(len(rows))[None]
    weights = base[picks].sum(axis=1)
    shares = total / np.where(weights > 0, weights, np.nan)
    drawn = cost_model.figures(shares[:, None] * measured[picks].sum(axis=1))
    all_of_it = cost_model.figures(total / base.sum() * measured.sum(axis=0, keepdims=True))
    tail = (1 - COVERAGE) / 2
    values = {name: _plain(value[0]) for name, value in all_of_it.items()}
    intervals = {
        name: [_plain(bound) for bound in np.nanquantile(drawn[name], [tail, 1 - tail])]
        for name, value in values.items()
        if value is not None
    }
    return values, intervals


def failure_shares(codes: list[str | None]) -> dict[str, dict[str, Any]]:
    """Failures by code, and `any` of all together: how many of the sample, and between which shares they are of all.

    Args:
        codes: of the sample's videos; None of one that did not fail.
    """
    found = Counter(code for code in codes if code)
    return {
        code: {"videos": number, "share": round(number / len(codes), 6), "interval": wilson(number, len(codes))}
        for code, number in {"any": found.total(), **dict(found.most_common())}.items()
    }


def wilson(num_hits: int, num_tries: int) -> list[float]:
    """Wilson's score interval of a share, which says something also where nothing was hit."""
    share, spread = num_hits / num_tries, _Z**2 / num_tries
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * (share * (1 - share) / num_tries + spread / (4 * num_tries)) ** 0.5 / (1 + spread)
    return [round(max(0.0, middle - half), 6), round(min(1.0, middle + half), 6)]


def _plain(value: Any) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
