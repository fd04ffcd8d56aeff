"""What a device may be told once and do again: a decoding step, recorded and replayed."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from longvlm.pipeline.engine import batch
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.schemas.recipe import AnswerRecipe

RECIPE = AnswerRecipe("model", "weights", "index", precision="float32", max_new_tokens=12)


class Recorder(TorchDispatchMode):
    """Every operation as it is done, on the very tensors that it was done on."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self):
        """All of it again, with what one operation makes handed to the next. No Python of the engine's runs."""
        remade = {}

        def current(value):
            return remade.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, made in self.calls:
            again = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(
                *([value] if not isinstance(value, list | tuple) else value for value in (made, again)),
                strict=True,
            ):
                if not any(old is argument for argument in args):
                    remade[id(old)] = new


def asked():
    return [
        Group(
            VideoPrefix(torch.randn(n, 64, generator=torch.Generator().manual_seed(n))),
            [Request((n, q), q) for q in ("What happens?", "Who walks in the street?", "Why?")],
        )
        for n in (9, 30)
    ]


class ReplayedStep:
    """In place of a RecordedStep: from the second run on what the first did is replayed, whatever the device."""

    replays = 0

    def __init__(self, step, memory):  # noqa: ARG002 - as the other takes it
        self.step, self.recorder = step, None

    def __call__(self):
        if self.recorder is None:
            with Recorder() as self.recorder:
                self.step()
        else:
            self.recorder.replay()
            ReplayedStep.replays += 1


@torch.inference_mode()
def test_a_recorded_step_goes_on_as_the_engine_would(untrained_folder, monkeypatch):
    wanted = {a.key: a.text for a in Engine(load_longvlm(str(untrained_folder)), RECIPE).answer(asked())}
    monkeypatch.setattr(batch, "RecordedStep", ReplayedStep)
    engine = Engine(load_longvlm(str(untrained_folder)), RECIPE)
    assert {a.key: a.text for a in engine.answer(asked())} == wanted
    assert ReplayedStep.replays > 5
