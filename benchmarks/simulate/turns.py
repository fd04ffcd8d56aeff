"""A history as data: what happens turn by turn, drawn from a seed and nothing else."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

ACTORS = 4
Kind = Literal["job", "people", "clock", "skew", "rot"]
Ending = Literal["pause", "kill", "lose", "refuse"]
_KINDS: dict[Kind, int] = {"job": 70, "people": 16, "clock": 6, "skew": 4, "rot": 4}
JOBS = {
    "index": 20,
    "prune": 14,
    "manifest": 3,
    "restale": 3,
    "answer": 14,
    "forget": 9,
    "maintain": 9,
    "repair": 3,
    "promote": 3,
    "export": 2,
    "nightly": 6,
    "read": 5,
}
PEOPLE = {"add": 8, "remove": 4, "rename": 4, "overwrite": 2, "restore": 4}
ROT = {"tokens": 3, "segments": 2, "checkpoint": 2, "lease": 2, "note": 1}
_ENDINGS: dict[Ending, int] = {"pause": 60, "kill": 20, "lose": 12, "refuse": 8}
_HOURS = (0.2, 1.0, 30.0, 60.0, 200.0)
_SKEWS_S = (0.0, 2.0, -2.0, 3600.0, -86_400.0, 86_400.0, 366 * 86_400.0)
_MOST_POINTS = 300


@dataclass(frozen=True)
class Turn:
    """One step of a history: an actor's job goes on, or something happens to the world."""

    kind: Kind
    what: str  # the job that begins if the actor has none; what people do; what rots
    actor: int = 0
    number: int = 0  # decides what the turn leaves open: which video, which file, where in it
    points: int | None = None  # after which the actor's turn ends; None: its job goes on to its end
    ending: Ending = "pause"
    amount: float = 0.0  # hours that go by; seconds that an actor's clock is ahead

    def __str__(self) -> str:
        """The turn in words."""
        match self.kind:
            case "job":
                words = {
                    "pause": "then others go on",
                    "kill": "then it is killed",
                    "lose": "then the answer to what it writes is lost",
                    "refuse": "then what it writes is refused",
                }
                ends = "to its end" if self.points is None else f"for {self.points} points, {words[self.ending]}"
                return f"actor {self.actor}: {self.what} (or what it is at), {ends} [{self.number}]"
            case "clock":
                return f"{self.amount:g} hours go by"
            case "skew":
                return f"the clock of actor {self.actor} is {self.amount:+g} s off"
        return f"{self.kind}: {self.what} [{self.number}]"


def draw(seed: int, steps: int) -> list[Turn]:
    """The history of a seed."""
    chance = random.Random(seed)

    def one_of(weights: dict[str, int]) -> str:
        return chance.choices([*weights], [*weights.values()])[0]

    turns = [Turn("people", "add", number=n) for n in range(3)]
    for _ in range(steps - len(turns)):
        (kind,) = chance.choices([*_KINDS], [*_KINDS.values()])
        number, actor = chance.randrange(1 << 30), chance.randrange(ACTORS)
        match kind:
            case "job":
                points = None if chance.random() < 0.35 else int(_MOST_POINTS ** chance.random())
                (ending,) = chance.choices([*_ENDINGS], [*_ENDINGS.values()])
                turns.append(Turn(kind, one_of(JOBS), actor, number, points, ending))
            case "people":
                turns.append(Turn(kind, one_of(PEOPLE), number=number))
            case "clock":
                turns.append(Turn(kind, "", amount=chance.choice(_HOURS)))
            case "skew":
                turns.append(Turn(kind, "", actor, amount=chance.choice(_SKEWS_S)))
            case "rot":
                turns.append(Turn(kind, one_of(ROT), number=number))
    return turns


def shrink(turns: Sequence[Turn], fails: Callable[[Sequence[Turn]], bool], tries: int) -> list[Turn]:
    """A history without turns that it does not need to fail, by leaving out ever smaller parts of it.

    Args:
        turns: that fail.
        fails: whether some turns fail likewise.
        tries: how often that may be asked.
    """
    kept, size = [*turns], max(1, len(turns) // 2)
    while tries > 0:
        start, before = 0, len(kept)
        while start < len(kept) and tries > 0:
            some = kept[:start] + kept[start + size :]
            tries -= 1
            if some and fails(some):
                kept = some
            else:
                start += size
        if size == 1 and len(kept) == before:
            break
        size = max(1, size // 2)
    return kept
