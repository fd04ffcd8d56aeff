"""How many bytes of long videos in a bucket keyframe mode reads, and how much sooner it is done than by downloads.

    LONGVLM_VIDEOS=../shared/videos python -m benchmarks.bytes [--files 48] [--rounds 3] [--folder F]
        [--decode exact]

The files are real clips made long (`corpus.py`): 20 MB and more, MP4 with its index first or last and Matroska, groups
of 2, 5 and 10 s. They lie on an S3 server of the benchmark's own on the loopback, which adds 30 ms to each request and
gives each connection 20 MB a second. In each round the index job's decode stage watches all of them under `paper` with
keyframes, one worker a core: downloading all, one after the other (`whole`); likewise, but the next while one is
decoded (`ahead`); and as it does by itself (`sparse`), reading ahead too. The clock runs when the workers are warm.
With `--decode exact` ten frames of each are decoded exactly, and of the MP4s groups of pictures are read.

Tokens follow from a video's rows of FRAMES alone, so these are compared bit for bit: every pixel, which frames each
segment shows and when, and all that is told of the video. A file counts as a fall-back if it was sent nearly whole.
With --folder the files are kept and made once. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bytes.corpus import GROUPS_S, LongFile, clips_to_lengthen, make_corpus
from benchmarks.bytes.server import DistantBucket
from benchmarks.bytes.watching import RECIPES, Watching, watch_bucket
from longvlm.jobs.cluster.resources import DECODER_THREADS

# By side: whether all is downloaded whole, and how many threads of a worker fetch and decode in turn.
SIDES = {"whole": (True, 1), "ahead": (True, DECODER_THREADS), "sparse": (False, DECODER_THREADS)}
NEARLY_WHOLE = 0.95  # of its bytes, sent: a fall-back
LONG_GROUPS_S = 5  # from here on groups count for `share_of_bytes`


def measure(folder: Path, files: Sequence[LongFile], rounds: int, decode: str = "keyframe") -> dict[str, Any]:
    """Watch the files of a corpus from afar on both sides, in turn; prints a table, returns what JSON is to say."""
    runs: dict[str, list[Watching]] = defaultdict(list)
    with DistantBucket(folder / "bucket") as bucket:
        for _ in range(rounds):
            for side, (whole, readers) in SIDES.items():
                run = watch_bucket(bucket, [file.name for file in files], decode, whole=whole, readers=readers)
                runs[side].append(run)
                print(f"  {side:6} {run.wall_s:6.1f} s, CPU {run.cpu_s:.1f} s", file=sys.stderr)
    if any(run.sent_bytes[file.name] < file.size_bytes for run in [*runs["whole"], *runs["ahead"]] for file in files):
        raise RuntimeError("the run is no measurement: what was to be downloaded whole was not")
    print_table(files, runs)
    return summary(files, runs)


def share_of(files: Sequence[LongFile], run: Watching) -> float | None:
    """The share of all bytes of these files that the server sent; None without files."""
    size_bytes = sum(file.size_bytes for file in files)
    return sum(run.sent_bytes.get(file.name, 0) for file in files) / size_bytes if size_bytes else None


def print_table(files: Sequence[LongFile], runs: dict[str, list[Watching]]) -> None:
    """What each length of groups, each form and each clip cost in the last sparse run, beside its keyframes alone."""
    last = runs["sparse"][-1]
    kinds: dict[str, list[LongFile]] = defaultdict(list)
    for key in ("group_s", "form", "clip"):
        for file in files:
            value = getattr(file, key)
            kinds[f"groups of {value} s" if key == "group_s" else value].append(file)
    print(f"{'':36} files     MB  sent  keyframes  requests a file")
    for kind, some in kinds.items():
        size_bytes = sum(file.size_bytes for file in some)
        keyframes = sum(file.keyframe_bytes for file in some) / size_bytes
        requests = sum(last.requests.get(file.name, 0) for file in some) / len(some)
        sent = share_of(some, last)
        print(f"  {kind:36} {len(some):3} {size_bytes / 1e6:6.0f} {sent:6.1%} {keyframes:8.1%} {requests:10.1f}")


def summary(files: Sequence[LongFile], runs: dict[str, list[Watching]]) -> dict[str, Any]:
    """The figures; ratios are of medians."""
    last = runs["sparse"][-1]
    by_group = {group_s: [file for file in files if file.group_s == group_s] for group_s in GROUPS_S}
    of_long = [file for group_s, some in by_group.items() if group_s >= LONG_GROUPS_S for file in some]
    wall_s, cpu_s, server_s = (
        {side: median(getattr(run, name) for run in runs[side]) for side in SIDES}
        for name in ("wall_s", "cpu_s", "server_cpu_s")
    )
    num_whole = sum(last.sent_bytes.get(file.name, 0) >= NEARLY_WHOLE * file.size_bytes for file in files)
    every = [run for side in SIDES for run in runs[side]]
    return {
        "share_of_bytes": share_of(of_long, last),
        **{f"share_{group_s}s": share_of(some, last) for group_s, some in by_group.items()},
        "speedup": wall_s["whole"] / wall_s["sparse"],
        "speedup_reading_ahead": wall_s["whole"] / wall_s["ahead"],
        "fallbacks": num_whole / len(files),
        "equal": all(run.digests == every[0].digests and len(run.digests) == len(files) for run in every),
        "files": len(files),
        "rounds": len(runs["sparse"]),
        **{f"{side}_s": wall_s[side] for side in SIDES},
        **{f"{side}_cpu_s": cpu_s[side] for side in SIDES},
        **{f"{side}_server_cpu_s": server_s[side] for side in SIDES},
    }


def main() -> None:
    """Make the corpus where it is missing, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--decode", choices=tuple(RECIPES), default="keyframe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are kept, 1 GB of them; else they are made anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        files = make_corpus(folder, clips_to_lengthen(), options.files)
        result = measure(folder, files, options.rounds, options.decode)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
