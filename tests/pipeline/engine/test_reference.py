import json

import pytest
import torch
from transformers import GenerationConfig

from longvlm.pipeline.answering.typed import as_request, read_value
from longvlm.pipeline.engine.reference import PlainTokens, PlainWhole
from longvlm.pipeline.engine.requests import Request
from longvlm.pipeline.models.families import load_whole
from longvlm.pipeline.models.llava.model import load_llava
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.schemas.errors import ErrorCode
from longvlm.schemas.recipe import AnswerRecipe
from models import LLAVAS, save_llava
from support import moved

NEW = 6


def recipe(**changes):
    settings = {"model": "m", "weights": "w", "index_recipe": "r", "template": "chat", "precision": "float32"}
    return AnswerRecipe(**{**settings, "max_new_tokens": NEW, **changes})


def frames(number, side=56):
    shape = (number, side, side, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def whole(folder, device="cpu", **changes):
    return PlainWhole(load_whole(str(folder), "float32", device), recipe(**changes))


def shown(plain, pictures):
    """A LLaVA's view of frames: its prompts say no times."""
    return plain.show(pictures, VideoPrefix(torch.zeros(1, 64)))


def llava(folder, device="cpu"):
    try:
        return whole(folder, device=str(device))
    except TypeError as error:  # before the pinned release, transformers' two video families name frames differently
        if "get_video_features() missing" not in str(error):
            raise
        pytest.skip(f"this release of transformers is asked for a video's rows in another way: {error}")


@torch.inference_mode()
def greedy(plain, view, question):
    """One token after the other, each from a forward pass over everything, without a cache."""
    prompt = plain.words.lay_out(question, view.num_rows, plain.recipe.template)
    ids = list(prompt.ids)
    banned = plain.llm.generation_config.suppress_tokens
    while len(ids) < len(prompt.ids) + NEW and (len(ids) == len(prompt.ids) or ids[-1] not in plain.eos_ids):
        logits = plain.llm(**view.inputs(torch.tensor(ids), prompt.first_patch)).logits[0, -1]
        logits[banned] = float("-inf")
        ids.append(int(logits.argmax()))
    return plain.words.decode(ids[len(prompt.ids) :])


def test_a_llava_is_asked_greedily_over_its_own_look_at_the_frames(folder, device):
    plain, here = llava(folder, device), llava(folder)
    answers = set()
    for number in (1, 3):
        view, view_here = shown(plain, frames(number)), shown(here, frames(number))
        for question in ("What?", "Who is in the picture?"):
            answer = plain.answer(view, Request("key", question))
            assert answer.text == greedy(here, view_here, question)
            assert (answer.key, answer.error, answer.num_visual_tokens) == ("key", None, view.num_rows)
            assert 0 < answer.num_new_tokens <= NEW
            answers.add(answer.text)
    assert len(answers) > 1
    assert plain.name == LLAVAS[folder.name][1].__name__


def test_a_longvlm_is_asked_greedily_over_its_tokens(untrained, device):
    prefix = VideoPrefix(torch.randn(9, 64, generator=torch.Generator().manual_seed(0)))
    plain, here = (PlainTokens(moved(untrained, to), recipe(template="long_vlm_v1")) for to in (device, "cpu"))
    answer = plain.answer(plain.show(prefix), Request(0, "What?"))
    assert answer.text == greedy(here, here.show(prefix), "What?")
    assert answer.num_visual_tokens == 9
    assert 0 < answer.num_new_tokens <= NEW


def test_sampling_and_penalties_of_a_checkpoint_are_left_out(folders, tmp_path):
    folder = save_llava(tmp_path / "llava", "llava")
    GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=3).save_pretrained(folder)
    view_of = [whole(path) for path in (folder, folders["llava"])]
    ours, theirs = (plain.answer(shown(plain, frames(2)), Request(0, "What?")).text for plain in view_of)
    assert ours == theirs


@pytest.mark.parametrize(
    ("family", "per_frame", "at_end"), [("llava", 16, 0), ("llava_next_video", 4, 0), ("llava_onevision", 4, 1)]
)
def test_as_many_frames_are_shown_as_the_room_holds(folders, family, per_frame, at_end):
    plain = llava(folders[family])
    room = 5 * per_frame + at_end
    assert [plain.most_pictures(rows, None) for rows in (room - 1, room, room + 1)] == [4, 5, 5]
    assert plain.most_pictures(0, None) == 0
    assert shown(plain, frames(5)).num_rows == room


def test_options_are_judged_by_a_forward_pass_over_each(folder, device, agree):
    there, plain, options = llava(folder, device), llava(folder), ("Yes", "No", "Not at all")
    answer = there.answer(shown(there, frames(2)), Request(0, "Red?", options=options))
    view = shown(plain, frames(2))
    prompt = plain.words.lay_out("Red?", view.num_rows, "chat")
    sums = []
    for option, ids in zip(options, plain.words.option_ids(options), strict=True):
        ends = ids if option != "No" else (*ids, plain.eos_ids[0])  # "Not at all" goes on from it
        with torch.inference_mode():
            whole = torch.tensor([*prompt.ids, *ends])
            logits = plain.llm(**view.inputs(whole, prompt.first_patch)).logits[0].double()
        at = range(len(prompt.ids), len(whole))
        sums.append(-sum(torch.nn.functional.cross_entropy(logits[i - 1], whole[i]) for i in at))
    shares = torch.stack(sums).softmax(dim=0)
    assert answer.text == options[int(shares.argmax())]
    agree(answer.confidence, float(shares.max()), atol=1e-5)
    assert answer.num_new_tokens == 0


def test_a_grammar_is_kept_as_the_engine_keeps_it(folder):
    plain = whole(folder, max_new_tokens=40)
    view = shown(plain, frames(1))
    schema = '{"type":"object","required":["a"],"properties":{"a":{"type":"string"}},"additionalProperties":false}'
    for kind, form in (("number", None), ("json", schema)):
        question = {"question": "What?", "type": kind, "choices": None, "schema": form}
        answer = plain.answer(view, as_request("it", question))
        assert read_value(question, answer.text) is not None
    short = plain.answer(view, Request(0, "What?", max_new_tokens=2))
    assert short.num_new_tokens == 2


def test_a_question_that_cannot_be_asked_carries_its_error(folders, tmp_path):
    plain = whole(folders["llava"])
    view = shown(plain, frames(1))
    assert plain.answer(view, Request(0, "What <image>?")).error.code == ErrorCode.ANSWER_FAILED
    assert plain.answer(view, Request(0, "What " * 1000)).error.code == ErrorCode.PROMPT_TOO_LONG
    folder = save_llava(tmp_path / "short", "llava")
    config = json.loads((folder / "config.json").read_text())
    prompt = plain.words.lay_out("What?", view.num_rows, "chat")
    config["text_config"]["max_position_embeddings"] = len(prompt.ids) + 2
    (folder / "config.json").write_text(json.dumps(config))
    short = whole(folder)
    assert short.answer(shown(short, frames(1)), Request(0, "What?")).num_new_tokens == 2
    assert load_llava(str(folder)).context == len(prompt.ids) + 2
