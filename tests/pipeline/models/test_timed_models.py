"""Qwen3-VL and SmolVLM2 from frames to answers, held to transformers' own models over the same frames."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from longvlm.pipeline.answering.typed import as_request
from longvlm.pipeline.engine.batch import Batch
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.grammar import Speller
from longvlm.pipeline.engine.reference import PlainWhole
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.engine.sequences import read_group
from longvlm.pipeline.models.families import describe_model, load_model, load_whole, save
from longvlm.pipeline.models.prefix import VideoPrefix, prefix_of
from longvlm.pipeline.models.row_layout import text_and_places
from longvlm.pipeline.models.saving import TrainedWeights
from longvlm.pipeline.training.finetune import finetune
from longvlm.pipeline.training.packing import ConversationTokenizer, Example, collate, pack
from longvlm.pipeline.training.parameters import TrainableModel
from longvlm.pipeline.vision.budget import fit
from longvlm.pipeline.vision.encode import encode_units
from longvlm.pipeline.vision.pictures import distinct_numbers
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.pipeline.vision.towers.families import describe_tower, load_tower
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import AnswerRecipe, IndexRecipe, from_settings
from longvlm.schemas.training import from_settings as train_settings
from models import save_qwen3_vl, save_smolvlm

QUESTIONS = ("What is it?", "Who?", "Why does it go there, and when?")


@pytest.fixture(scope="module", params=[save_qwen3_vl, save_smolvlm])
def folder(request, tmp_path_factory):
    return str(request.param(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def recipe(folder):
    """Four frames a segment, all of their tokens kept."""
    tower = describe_tower(folder)
    if isinstance(tower.image_size, tuple):
        tower = tower.shown((2, 3), None)
    return unmerged(tower)


def unmerged(tower, frames_per_segment=4) -> IndexRecipe:
    settings = {"base": "tiny", "frames_per_segment": frames_per_segment, "segment_s": 2.0}
    keep = tower.num_pictures(frames_per_segment) * tower.num_patches
    return from_settings({**settings, "tokens_per_segment": keep}, tower)


def watched(recipe, segments=((0, 12, 25, 37), (50, 62, 75, 87), (100, 112, 125)), seed=0) -> pa.Table:
    """A unit of FRAMES: random pictures, at 25 frames a second."""
    height, width = recipe.tower.frame_size
    numbers = sorted({number for segment in segments for number in segment})
    pictures = np.random.default_rng(seed).integers(0, 256, (max(numbers) + 1, height, width, 3), np.uint8)
    frames = pictures[numbers]
    described = [
        {
            "segment": i,
            "start_s": 2.0 * i,
            "end_s": 2.0 * i + len(segment) / 2,
            "frames": list(segment),
            "times_s": [number / 25 for number in segment],
        }
        for i, segment in enumerate(segments)
    ]
    row = {"video_id": "v", "write_id": "w", "unit": 0, "num_units": 1, "num_segments": len(segments)}
    row |= {"segments": described, "frame_height": height, "frame_width": width, "frames": frames.tobytes()}
    return pa.Table.from_pylist([row], schema=tables.FRAMES)


def stored(folder, recipe, unit):
    """The video as an index stores it: its tokens, and its segments."""
    (encoded,) = encode_units(unit, load_tower(folder), recipe).to_pylist()
    assert encoded["error"] is None
    rows = [{"video_id": "v", "recipe": "r", "write_id": "w", **segment} for segment in encoded["segments"]]
    return from_arrow(pa.Table.from_pylist(rows, schema=tables.TOKENS)), encoded["segments"]


def shown_frames(recipe, unit):
    """All frames as the tower is shown them, a last picture that is not full filled up."""
    row = unit.to_pylist()[0]
    frames = np.frombuffer(row["frames"], np.uint8).reshape(-1, row["frame_height"], row["frame_width"], 3)
    numbers, shown = distinct_numbers(row["segments"]), []
    for segment in row["segments"]:
        own = segment["frames"]
        shown += own + own[-1:] * (-len(own) % recipe.tower.frames_per_picture)
    return torch.from_numpy(frames[np.searchsorted(numbers, shown)])


def answer_recipe(folder, precision="float32", **settings):
    return AnswerRecipe(folder, "w", "i", template="chat", precision=precision, max_new_tokens=12, **settings)


def logits_after(model, prefix, question):
    """The engine's logits after a prompt's last token."""
    group, refused = read_group(
        model, Speller(model.vocabulary), answer_recipe(model.name), Group(prefix, [Request(0, question)])
    )
    assert not refused
    batch = Batch(model.llm, model.device)
    with torch.inference_mode():
        batch.add_prefixes([group.prefix])
        (done,) = batch.begin([group.pending[0]])
        return batch.logits(done.hidden)[0]


def prefix_with(prefix, rows):
    """The same video with other numbers in its rows."""
    return VideoPrefix(rows, prefix.num_whole_frames, prefix.times, prefix.positions, prefix.patch_grid)


def their_logits(whole, prefix, frames, question, rows=None):
    """Transformers' own after a prompt's last token; over given rows in place of what its tower makes of the frames."""
    view, prompt = whole.show(frames, prefix), whole.words.lay_out(question, 1, "chat")
    ids = torch.tensor([*prompt.ids[: prompt.first_patch], *view.ids, *prompt.ids[prompt.first_patch + 1 :]])
    inputs = view.inputs(ids, prompt.first_patch)
    if rows is not None:
        first, *streams = rows.split(whole.llm.config.get_text_config().hidden_size, dim=1)
        if streams:
            made = BaseModelOutputWithDeepstackFeatures(
                pooler_output=[first], deepstack_features=[(stream,) for stream in streams]
            )
        else:
            made = BaseModelOutputWithPooling(pooler_output=[first])
        inputs["mm_encoder_outputs"] = {"video" if streams else "image": made}
        inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}
    with torch.inference_mode():
        return whole.llm(**inputs).logits[0, -1]


@pytest.fixture(scope="module")
def video(folder, recipe):
    """Frames of a video, and its prefix as read from a store."""
    unit = watched(recipe)
    tokens, segments = stored(folder, recipe, unit)
    prefix = prefix_of(tokens, segments, describe_model(folder).sight.reading(recipe.tower))
    return shown_frames(recipe, unit), prefix


@pytest.fixture(scope="module")
def whole(folder):
    return load_whole(folder)


@pytest.mark.parametrize("question", QUESTIONS)
def test_logits_over_a_shared_prefix_are_those_of_the_whole_model_over_frames(folder, video, whole, question):
    frames, prefix = video
    exact = load_tower(folder).encode(frames).patches.flatten(0, 1)
    ours = logits_after(load_model(folder), prefix_with(prefix, exact), question)
    torch.testing.assert_close(ours, their_logits(whole, prefix, frames, question), atol=1e-4, rtol=0)
    through_store = logits_after(load_model(folder), prefix, question)
    rounded = their_logits(whole, prefix, frames, question, prefix.rows.float())
    torch.testing.assert_close(through_store, rounded, atol=1e-4, rtol=0)
    assert 0 < (through_store - ours).abs().max() < 1e-2


def test_ten_questions_together_are_answered_as_one_by_one_and_by_the_whole_model(folder, video, whole):
    frames, prefix = video
    exact = prefix_with(prefix, load_tower(folder).encode(frames).patches.flatten(0, 1))
    questions = [f"{question} {number}" for number in range(3) for question in QUESTIONS] + ["Yes?"]
    model, plain = load_model(folder), PlainWhole(whole, answer_recipe(folder))
    engine = Engine(model, answer_recipe(folder))
    together = {answer.key: answer for answer in engine.answer([Group(exact, [Request(q, q) for q in questions])])}
    view = plain.show(frames, prefix)
    for question in questions:
        (alone,) = engine.answer([Group(exact, [Request(question, question)])])
        theirs = plain.answer(view, Request(question, question))
        assert alone.text == together[question].text == theirs.text
        assert alone.num_prompt_tokens == theirs.num_prompt_tokens
        assert alone.num_visual_tokens == theirs.num_visual_tokens == model.extent(exact).num_rows
        assert together[question].attention.shape == (len(exact.rows),)
        assert 0 < together[question].attention.sum() <= 1
    assert len({answer.text for answer in together.values()}) > 1


def test_options_and_grammars_are_held_as_the_whole_model_holds_them(folder, video, whole):
    frames, prefix = video
    exact = prefix_with(prefix, load_tower(folder).encode(frames).patches.flatten(0, 1))
    engine, plain = Engine(load_model(folder), answer_recipe(folder)), PlainWhole(whole, answer_recipe(folder))
    view = plain.show(frames, prefix)
    for kind in ("bool", "number"):
        asked = {"question": "Does it move?", "type": kind, "choices": None, "schema": None}
        (ours,) = engine.answer([Group(exact, [as_request(0, asked)])])
        theirs = plain.answer(view, as_request(0, asked))
        assert ours.text == theirs.text
        if kind == "bool":
            np.testing.assert_allclose(ours.shares, theirs.shares, atol=1e-5)


@pytest.mark.parametrize("segments", [((0, 12, 25), (50, 62)), ((7,), (9, 9, 9, 20, 20)), ((0, 0, 0, 0),)])
def test_rows_sizes_spans_and_places_of_merging_are_a_plain_float64_version_s(folder, recipe, segments):
    unit = watched(recipe, segments)
    merging = replace(recipe, tokens_per_segment=3)
    tokens, _ = stored(folder, merging, unit)
    encoded, frames = load_tower(folder), shown_frames(recipe, unit)
    patches = encoded.encode(frames).patches
    rows, columns = recipe.tower.patch_grid
    per_picture, first = recipe.tower.frames_per_picture, 0
    expected = []
    for numbers in segments:
        pictures = [numbers[i : i + per_picture] for i in range(0, len(numbers), per_picture)]
        own = patches[first : first + len(pictures)].double().flatten(0, 1)
        first += len(pictures)
        places = [
            ((picture[0] + picture[-1]) / 2 / 25, row, column)
            for picture in pictures
            for row in range(rows)
            for column in range(columns)
        ]
        spans = [(picture[0], picture[-1]) for picture in pictures for _ in range(rows * columns)]
        expected.append(plainly_merged(own, places, spans, 3, recipe.tower.metric_dim))
    values, sizes, spans, places = (torch.cat(parts) for parts in zip(*expected, strict=True))
    torch.testing.assert_close(tokens.local.double(), values, atol=0.02, rtol=2e-3)
    assert torch.equal(tokens.sizes, sizes)
    assert torch.equal(tokens.spans, spans)
    torch.testing.assert_close(tokens.positions, places, atol=1e-9, rtol=0)


def plainly_merged(values, places, spans, keep, metric_dim):
    """Halve, one token after the other: an even one goes to the odd one that is most like it by its first stream."""
    tokens = [
        (value, 1, span, torch.tensor(place, dtype=torch.float64))
        for value, place, span in zip(values, places, spans, strict=True)
    ]
    while len(tokens) > keep:
        num_merged = min(len(tokens) // 2, len(tokens) - keep)
        metric = torch.stack([value[:metric_dim].view(16, -1).mean(dim=0) for value, *_ in tokens])
        unit = metric / metric.norm(dim=1, keepdim=True)
        even, odd = tokens[::2], tokens[1::2]
        scores = unit[::2] @ unit[1::2].T
        order = scores.max(dim=1).values.argsort(descending=True, stable=True).tolist()
        groups = [[token] for token in odd]
        for place in order[:num_merged]:
            groups[int(scores[place].argmax())].append(even[place])
        tokens = [even[place] for place in order[num_merged:]] + [joined(group) for group in groups]
    return (
        torch.stack([value for value, *_ in tokens]),
        torch.tensor([size for _, size, *_ in tokens]),
        torch.tensor([span for *_, span, _ in tokens]),
        torch.stack([place for *_, place in tokens]),
    )


def joined(group):
    size = sum(size for _, size, *_ in group)
    value = sum(value * size for value, size, *_ in group) / size
    place = sum(place * size for _, size, _, place in group) / size
    span = (min(span[0] for *_, span, _ in group), max(span[1] for *_, span, _ in group))
    return value, size, span, place


def test_once_merged_each_segment_is_one_run_with_the_middle_of_its_time(folder, recipe):
    tokens, segments = stored(folder, replace(recipe, tokens_per_segment=3), watched(recipe))
    prefix = prefix_of(tokens, segments, describe_model(folder).sight.reading(recipe.tower))
    model = load_model(folder)
    text = model.prompt.tokenizer.decode(text_and_places(model.blocks(prefix), model.prompt.place))
    times = [text.index(said) for said in TIMES[model.llm.config.model_type]]
    assert times == sorted(times)
    counts = [block.num_tokens for block in model.blocks(prefix)]
    assert counts == list(tokens.counts) == [3, 3, 3]
    rows, extent = model.read(prefix), model.extent(prefix)
    assert len(rows.embeds) == extent.num_rows == sum(block.num_rows for block in model.blocks(prefix))
    (answer,) = Engine(model, answer_recipe(folder)).answer([Group(prefix, [Request(0, "What?")])])
    assert answer.error is None
    assert answer.attention.shape == (9,)


TIMES = {  # segments of 0 to 2 s, 2 to 4 s and 4 to 5.5 s
    "qwen3_vl_text": ("<1.0 seconds>", "<3.0 seconds>", "<4.8 seconds>"),
    "llama": ("series of three frames from a 0:00:05", "from 00:01:", "from 00:03:", "from 00:04:"),
}


def test_a_budget_counts_the_words_that_stand_beside_tokens(folder, recipe):
    tokens, segments = stored(folder, recipe, watched(recipe))
    sight, model = describe_model(folder).sight.reading(recipe.tower), load_model(folder)
    num_beside = max(model.num_text_rows(one["start_s"], one["end_s"]) for one in segments)
    num_pictures = sum(recipe.tower.num_pictures(number) for number in tokens.num_frames)
    whole = len(tokens.local) + num_beside * num_pictures
    for room, is_whole in ((whole, True), (whole - 1, False), (whole - num_beside * num_pictures + 10, False)):
        budget = sight.budget(room, None, "even", num_beside)
        assert budget.holds(tokens) == is_whole
        fitted = fit(tokens, budget)
        assert (fitted.num_whole_frames is not None) == is_whole
        prefix = prefix_of(fitted, segments, sight)
        first, *_ = model.blocks(prefix)
        introduced = max(len(first.before) + len(first.after) - num_beside, 0)  # once, however long the video is
        assert model.extent(prefix).num_rows - introduced <= room


def test_a_video_is_asked_about_only_with_its_times(folder):
    model = load_model(folder)
    with pytest.raises(ValueError, match="say when tokens were seen, and nobody did"):
        model.read(VideoPrefix(torch.zeros(4, model.mm_hidden_size)))


@pytest.mark.parametrize("stage", ["lora", "full"])
def test_learning_from_stored_tokens_brings_the_loss_down(folder, recipe, stage):
    tokens, segments = stored(folder, replace(recipe, tokens_per_segment=3), watched(recipe))
    prefix = prefix_of(tokens, segments, describe_model(folder).sight.reading(recipe.tower))
    settings = {"base": stage, "precision": "float32", "learning_rate": 0.02, "warmup_ratio": 0.0}
    if stage == "lora":
        settings |= {"lora_rank": 4, "lora_targets": ("q_proj", "v_proj")}
    training = train_settings(settings)
    example = Example(prefix, [(("What is it?", "a box"),), (("Where?", "here"),)])
    model, losses = load_model(folder), []
    before = logits_after(model, prefix, "What is it?")
    tuned = finetune(model, [[example]] * 8, training, 8, on_step=lambda step: losses.append(step.loss))
    assert losses[-1] < 0.7 * losses[0]
    after = logits_after(tuned.trainable.merge_and_unload(), prefix, "What is it?")
    assert (after - before).abs().max() > 0.1


def test_what_training_is_given_is_what_the_engine_reads(folder, video):
    _, prefix = video
    model, training = load_model(folder), train_settings({"base": "full", "precision": "float32"})
    trainable = TrainableModel(model, training)
    tokenizer = ConversationTokenizer(model, "chat")
    example = Example(prefix, [(("What is it?", "a box"),), (("Who?", "nobody"),)])
    batch = collate(pack(tokenizer, [example], 4096).sequences, "token", model.device)
    with torch.no_grad():
        hidden = trainable.hidden_states([example], batch)[0]
        logits = model.llm.lm_head(hidden)
    first = int((batch.conversation_ids[0] == 1).nonzero()[0])
    asked = tokenizer._first_turn_ids("What is it?")
    at = first + len(asked) - 1
    torch.testing.assert_close(logits[at], logits_after(load_model(folder), prefix, "What is it?"), atol=1e-4, rtol=0)
    second = int((batch.conversation_ids[0] == 2).nonzero()[0]) + len(tokenizer._first_turn_ids("Who?")) - 1
    torch.testing.assert_close(logits[second], logits_after(load_model(folder), prefix, "Who?"), atol=1e-4, rtol=0)


def test_there_is_no_projector_to_train(folder):
    assert not describe_model(folder).has_projector
    with pytest.raises(InputError, match="no projector to train or to whiten for; train with the stage lora or full"):
        TrainableModel(load_model(folder), train_settings({"base": "projector"}))


def test_a_trained_model_is_saved_in_the_layout_it_came_in(folder, tmp_path):
    head = load_model(folder).llm.get_input_embeddings().weight
    changed = TrainedWeights({"model.norm.weight": torch.full((head.shape[1],), 2.0)}, {})
    save(folder, changed, None, tmp_path / "to")
    assert describe_tower(str(tmp_path / "to")).weights == describe_tower(folder).weights
    assert describe_model(str(tmp_path / "to")).weights != describe_model(folder).weights
    again = load_model(str(tmp_path / "to"))
    assert again.llm.model.norm.weight.unique().tolist() == [2.0]
    torch.testing.assert_close(again.llm.get_input_embeddings().weight, head)


def test_quantised_weights_are_refused_in_a_sentence(folder, tmp_path):
    made = shutil.copytree(folder, tmp_path / "fp8")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"are quantised \(fp8\), and only plain ones can be read here"):
        describe_model(str(made))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_a_checkpoint_that_lacks_a_file_says_which(folder, tmp_path, name):
    made = shutil.copytree(folder, tmp_path / "model")
    for path in made.glob("*preprocessor_config.json" if "preprocessor" in name else name):
        path.unlink()
    with pytest.raises(InputError, match=f"lacks ({name}|a tokenizer)"):
        describe_tower(str(made)) if "preprocessor" in name else describe_model(str(made))


def test_keys_and_values_take_what_is_asked_and_not_what_is_possible(folder, video):
    _, prefix = video
    model = load_model(folder)
    engine = Engine(model, answer_recipe(folder))
    engine.kv_bytes = 600 * engine._batch.bytes_per_token  # a context of 262,144 would take a thousand times that
    (answer,) = engine.answer([Group(prefix, [Request(0, "What?")])])
    assert answer.error is None
