"""What a model in bfloat16 answers and attends to, on any device, beside one in float32 on the CPU."""

from dataclasses import replace

import pytest
import torch

from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.schemas.recipe import AnswerRecipe

RECIPE = AnswerRecipe("model", "weights", "index", precision="float32", max_new_tokens=1)
QUESTIONS = ("What happens?", "Describe the large yellow square in detail, then count the stars.", "Is it red?")
OPTIONS = ("red", "blue car", "red car", "two red dogs")


def answers(folder, precision, device):
    """Of free answers the first token only: what follows it depends on it."""
    requests = [Request((question, options), question, options) for question in QUESTIONS for options in ((), OPTIONS)]
    prefixes = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (7, 40, 200)]
    groups = [
        Group(VideoPrefix(prefix), [replace(request, key=(n, *request.key)) for request in requests])
        for n, prefix in enumerate(prefixes)
    ]
    engine = Engine(load_longvlm(str(folder), precision, str(device)), replace(RECIPE, precision=precision))
    return {answer.key: answer for answer in engine.answer(groups)}


def test_attention_and_shares_in_bfloat16_are_finite_and_near_those_of_float32(untrained_folder, device):
    wide = answers(untrained_folder, "float32", "cpu")
    narrow = answers(untrained_folder, "bfloat16", device)
    assert wide.keys() == narrow.keys()
    for key, answer in narrow.items():
        assert answer.error is None
        assert answer.attention.isfinite().all()
        assert torch.cosine_similarity(answer.attention, wide[key].attention, dim=0) > 0.999
        assert float(answer.attention.sum()) == pytest.approx(float(wide[key].attention.sum()), rel=0.02)
        if answer.confidence is not None:
            assert answer.confidence == pytest.approx(wide[key].confidence, abs=0.02)
