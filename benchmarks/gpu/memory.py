"""Memory limits: on a full device the engine halves its batches, and keys and values stay within their budget.

On a GPU the memory is filled with one plain allocation until about a quarter of what the questions need is left. On a
CPU, which has no such end, a stand-in says that memory is out when keys and values hold more than that.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.answer import LlamaShape, Load, RandomModel, random_model
from benchmarks.gpu.section import Found, Run, check
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.schemas.recipe import AnswerRecipe

# In float32 some 3 GB of keys and values, and as much again that passes need: more than what a driver keeps for itself.
SHAPE, NUM_VIDEOS, LOAD = LlamaShape(1024, 8, 8, 2816, vocabulary=8192), 32, Load(answer_tokens=(40,) * 8)
TINY_SHAPE, TINY_VIDEOS, TINY_LOAD = (
    LlamaShape(64, 2, 4, 64, vocabulary=256),
    4,
    Load(answer_tokens=(6,) * 8, num_visual=20),
)
TOWER_DIM = 64
LEFT = 4  # what is needed over what is left
# Of the texts; other sizes of a product round in another way, which once in a while changes the likeliest token.
MUST_BE_THE_SAME = 0.95


def run(run: Run) -> None:
    """Answer with all the memory there is, on a full device, and within a budget."""
    torch.manual_seed(0)
    shape, num_videos, load = (TINY_SHAPE, TINY_VIDEOS, TINY_LOAD) if run.is_tiny else (SHAPE, NUM_VIDEOS, LOAD)
    model = random_model(shape, run.device, torch.float32, TOWER_DIM)
    prefixes = [torch.randn(load.num_visual, TOWER_DIM) for _ in range(num_videos)]
    asked = Asked(model, prefixes, load)
    engine = asked.engine()
    asked.answers(engine)  # libraries' own memory is taken before any is counted
    watched, before = WatchedEngine(engine), allocated(run.device)
    wanted = asked.answers(engine)
    needed = peak(run.device) - before if run.device.type == "cuda" else watched.most_bytes
    run.note(questions=len(wanted), needed_bytes=needed, kv_bytes=watched.most_bytes)
    del engine
    run.part("full", lambda: full(run, asked, wanted, needed // LEFT))
    run.part("budget", lambda: budget(run, asked, wanted, watched.most_bytes // 3))


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions of both kinds about some videos."""

    model: RandomModel
    prefixes: list[Tensor]
    load: Load

    def engine(self, kv_bytes: int | None = None) -> Engine:
        """One that has its memory to itself, as far as it knows."""
        recipe = AnswerRecipe("random", "random", "random", max_new_tokens=max(self.load.answer_tokens))
        return Engine(self.model, recipe, kv_bytes)

    def answers(self, engine: Engine) -> dict[Hashable, str]:
        """Each question's answer; all of them are there, once, and none is an error."""
        groups = [Group(VideoPrefix(prefix), self._requests(v)) for v, prefix in enumerate(self.prefixes)]
        found = list(engine.answer(iter(groups)))
        for answer in found:
            check(answer.error is None, f"an answer failed: {answer.error}.")
        texts = {answer.key: answer.text or "" for answer in found}
        keys = {request.key for group in groups for request in group.requests}
        check(len(found) == len(keys) and texts.keys() == keys, f"{len(found)} answers came to {len(keys)} questions.")
        return texts

    def _requests(self, video: int) -> list[Request]:
        return [
            Request((video, i), text, ("Yes", "No") if i % 4 == 3 else (), max_new_tokens=most)
            for i, text, most in self.load.questions
        ]


def full(run: Run, asked: Asked, wanted: dict[Hashable, str], left_bytes: int) -> Found:
    """With so much memory left: real refusals by the allocator, smaller batches, the same answers."""
    engine = asked.engine()
    rows = engine.max_rows
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info()
        check(free_bytes > left_bytes, f"only {free_bytes / 1e6:.0f} MB are free to begin with.")
        filler = torch.empty(free_bytes - left_bytes, dtype=torch.uint8, device=run.device)
        before = torch.cuda.memory_stats()["num_ooms"]
        found = asked.answers(engine)
        refusals = torch.cuda.memory_stats()["num_ooms"] - before
        del filler
        torch.cuda.empty_cache()
    else:
        watched = WatchedEngine(engine, left_bytes)
        found = asked.answers(engine)
        refusals = watched.refusals
    run.say(f"{left_bytes / 1e6:.1f} MB left: {refusals} times out of memory, rows {rows} -> {engine.max_rows}")
    check(refusals > 0, "memory was never out, so that nothing is proven.")
    check(engine.max_rows < rows, f"memory was out {refusals} times, and the engine kept its {rows} rows.")
    same = share_same(found, wanted)
    check(same >= MUST_BE_THE_SAME, f"only {same:.1%} of the answers are those of a device with room.")
    return {"left_bytes": left_bytes, "refusals": refusals, "rows": [rows, engine.max_rows], "same": same}


def budget(run: Run, asked: Asked, wanted: dict[Hashable, str], kv_bytes: int) -> Found:
    """Keys and values stay within what they were given."""
    engine = asked.engine(kv_bytes)
    watched, before = WatchedEngine(engine), allocated(run.device)
    found = asked.answers(engine)
    passing = peak(run.device) - before if run.device.type == "cuda" else None
    beside = "" if passing is None else f", {passing / 1e6:.1f} MB at the peak of a pass"
    run.say(f"budget {kv_bytes / 1e6:.1f} MB: keys and values {watched.most_bytes / 1e6:.1f} MB{beside}")
    check(watched.most_bytes <= kv_bytes, f"keys and values took {watched.most_bytes} bytes of {kv_bytes}.")
    check(watched.most_bytes > kv_bytes // 4, f"keys and values took only {watched.most_bytes} bytes of {kv_bytes}.")
    same = share_same(found, wanted)
    check(same >= MUST_BE_THE_SAME, f"only {same:.1%} of the answers are those of an engine with room.")
    return {"kv_bytes": kv_bytes, "most_kv_bytes": watched.most_bytes, "peak_bytes": passing, "same": same}


class WatchedEngine:
    """What an engine holds of keys and values after each step. All that looks inside an engine is in here.

    Args:
        engine: to watch.
        room: bytes of a device that has no more; None: that of the device itself.
    """

    def __init__(self, engine: Any, room: int | None = None) -> None:
        self.most_bytes = self.refusals = 0
        self._batch = engine._batch  # noqa: SLF001
        self._room, self._decode = room, self._batch.decode
        self._batch.decode = self._watch

    def _watch(self, *arguments: Any, **named: Any) -> Any:
        """In place of the engine's own step over its rows."""
        if self._room is not None and self._held() > self._room:
            self.refusals += 1
            raise torch.OutOfMemoryError("as a full device says it")
        result = self._decode(*arguments, **named)
        self.most_bytes = max(self.most_bytes, self._held())
        return result

    def _held(self) -> int:
        parts = [part for kv in (self._batch.prefix_kv, self._batch.tail_kv) for part in vars(kv).values()]
        return sum(tensor.nbytes for part in parts if isinstance(part, list | Tensor) for tensor in part)


def share_same(found: dict[Hashable, str], wanted: dict[Hashable, str]) -> float:
    """Of the answers."""
    return sum(found[key] == text for key, text in wanted.items()) / len(wanted)


def allocated(device: torch.device) -> int:
    """Bytes of a GPU now; its peak is counted anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: torch.device) -> int:
    """Bytes of a GPU at the most, since then."""
    return torch.cuda.max_memory_allocated(device)
