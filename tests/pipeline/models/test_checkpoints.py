"""What real checkpoints bring, for every family that transformers knows whole; each case changes one that loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from longvlm.pipeline.models.families import describe_model, load_model, load_whole, save
from longvlm.pipeline.models.saving import TrainedWeights
from longvlm.pipeline.vision.towers.families import describe_tower, load_tower
from longvlm.pipeline.weights import read_tensors
from longvlm.schemas.errors import InputError
from models import save_llava, save_qwen3_vl, save_smolvlm

MAKERS = {
    "qwen": lambda path: save_qwen3_vl(path, tied=False),
    "smolvlm": save_smolvlm,
    "llava": save_llava,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def made(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / made.name)


def configure(folder, name="config.json", part=None, **changes):
    """Set fields of a JSON file; those that are ... are taken out."""
    content = json.loads((folder / name).read_text())
    inside = content if part is None else content[part]
    inside.update(changes)
    for field in [field for field, value in inside.items() if value is ...]:
        del inside[field]
    (folder / name).write_text(json.dumps(content))


def rewrite(folder, change):
    """Put other tensors in place of those of a checkpoint, in one file."""
    tensors = dict(read_tensors(folder, lambda name: name))
    changed = {name: tensor.clone() for name, tensor in change(dict(tensors)).items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def end_with(tensors, ending):
    (found,) = (name for name in tensors if name.endswith(ending))
    return found


def parts(model):
    return model.llm.get_input_embeddings().weight, model.llm.lm_head.weight


# --- tied embeddings ---


@pytest.mark.parametrize(
    ("top", "text", "held"),
    [
        (True, ..., "embed_tokens.weight"),
        (True, ..., "lm_head.weight"),
        (True, ..., "both"),
        (False, True, "embed_tokens.weight"),
    ],
)
def test_embeddings_are_tied_where_a_config_says_so_whatever_files_hold(folder, top, text, held):
    configure(folder, tie_word_embeddings=top)
    configure(folder, part="text_config", tie_word_embeddings=text)

    def change(tensors):
        embed, head = (end_with(tensors, ending) for ending in ("embed_tokens.weight", "lm_head.weight"))
        tensors[head] = tensors[embed]
        if held != "both":
            del tensors[head if held.startswith("embed") else embed]
        return tensors

    tensors = rewrite(folder, change)
    embed, head = parts(load_model(str(folder)))
    assert embed is head
    assert torch.equal(embed, tensors[end_with(tensors, "embed_tokens.weight")])
    whole = load_whole(str(folder)).llm
    assert torch.equal(whole.get_output_embeddings().weight, embed)
    assert torch.equal(whole.get_input_embeddings().weight, embed)


@pytest.mark.parametrize(("top", "text"), [(..., ...), (True, True)])
def test_two_that_differ_stay_two_as_in_transformers(folder, top, text):
    configure(folder, tie_word_embeddings=top)
    configure(folder, part="text_config", tie_word_embeddings=text)
    ours, theirs = load_model(str(folder)), load_whole(str(folder)).llm
    for weight, of_transformers in zip(
        parts(ours), (theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight), strict=True
    ):
        assert torch.equal(weight, of_transformers)
    assert not torch.equal(*parts(ours))


def test_equal_weights_have_one_fingerprint_however_a_tied_head_is_stored(folder):
    configure(folder, tie_word_embeddings=True)
    seen = set()
    for without in ("embed_tokens.weight", "lm_head.weight", None):

        def change(tensors, without=without):
            whole = next(t for name, t in tensors.items() if name.endswith(("embed_tokens.weight", "lm_head.weight")))
            rest = {n: t for n, t in tensors.items() if not n.endswith(("embed_tokens.weight", "lm_head.weight"))}
            names = {"embed_tokens.weight": EMBED[folder.name[:4]], "lm_head.weight": HEAD[folder.name[:4]]}
            return rest | {name: whole for ending, name in names.items() if ending != without}

        rewrite(folder, change)
        seen.add(describe_model(str(folder)).weights)
    assert len(seen) == 1


EMBED = {
    "qwen": "model.language_model.embed_tokens.weight",
    "smol": "model.text_model.embed_tokens.weight",
    "llav": "language_model.model.embed_tokens.weight",
}
HEAD = {"qwen": "lm_head.weight", "smol": "lm_head.weight", "llav": "language_model.lm_head.weight"}


def test_a_head_that_is_missing_and_not_tied_is_named(folder):
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if "lm_head" not in name})
    for use in (describe_model, load_model):
        with pytest.raises(InputError, match=r"do not fit its config\.json: they lack lm_head\.weight"):
            use(str(folder))


# --- tensors and files that are not expected ---


def test_parts_may_have_their_names_without_model_before_them(folder):
    before = describe_model(str(folder)).weights, describe_tower(str(folder)).weights
    total = sum(float(tensor.double().sum()) for tensor in load_whole(str(folder)).llm.state_dict().values())
    rewrite(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert (describe_model(str(folder)).weights, describe_tower(str(folder)).weights) == before
    again = load_whole(str(folder)).llm
    assert sum(float(tensor.double().sum()) for tensor in again.state_dict().values()) == pytest.approx(total)


def test_a_whole_model_is_never_drawn_in_part(folder):
    gone = "patch_embed"  # of the tower, which answering itself does without

    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if gone not in name})
    describe_model(str(folder))
    with pytest.raises(InputError, match=r"lack model\..*patch_embed.*, which transformers needs for the whole of it"):
        load_whole(str(folder))
    with pytest.raises(InputError, match="which transformers needs for the whole of it; copy the checkpoint again"):
        save(str(folder), TrainedWeights({}, {}), None, folder / "to")


def test_an_adapter_beside_a_config_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for use in (describe_model, load_model, describe_tower):
        with pytest.raises(InputError, match="is an adapter of another one"):
            use(str(folder))


# --- precision ---


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_weights_in_bfloat16_load_in_the_precision_that_is_asked_for(folder, field):
    for part in (None, "text_config", "vision_config"):
        configure(folder, part=part, **{"dtype": ..., field: "bfloat16"})
    rewrite(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    embeds = []
    for precision in ("float32", "bfloat16", "float16"):
        model, tower = load_model(str(folder), precision), load_tower(str(folder), precision)
        wanted = getattr(torch, precision)
        assert {parameter.dtype for parameter in model.llm.parameters()} == {wanted}
        assert model.llm.model.rotary_emb.inv_freq.dtype == torch.float32
        assert tower.dtype == wanted
        assert {parameter.dtype for parameter in load_whole(str(folder), precision).llm.parameters()} == {wanted}
        embeds.append(model.llm.get_input_embeddings().weight.float())
    assert torch.equal(embeds[0], embeds[1])
    save(str(folder), TrainedWeights({}, {}), None, folder / "to")
    assert {tensor.dtype for _, tensor in read_tensors(folder / "to", lambda name: name)} == {torch.bfloat16}


# --- how it generates ---


def test_several_end_marks_the_tokenizer_s_own_first(folder):
    own, unknown = eos_ids(folder)[0], 999_999
    for eos, found in (
        (own, (own,)),
        ([own], (own,)),
        ([9, own], (own, 9)),
        ([9, 5], (5, 9)),
        ([unknown, 9, own, -1], (own, 9)),
    ):
        configure(folder, "generation_config.json", eos_token_id=eos)
        assert eos_ids(folder) == found, eos
    assert load_model(str(folder)).eos_ids == load_whole(str(folder)).vocabulary.eos_ids == found


def eos_ids(folder):
    return describe_model(str(folder)).vocabulary.eos_ids


def test_an_end_mark_that_there_is_not_is_looked_for_elsewhere(folder):
    own = eos_ids(folder)[0]
    configure(folder, part="text_config", eos_token_id=None)
    for unknown in (None, [], 999_999, [999_999]):
        configure(folder, "generation_config.json", eos_token_id=unknown)
        assert eos_ids(folder) == (own,), unknown
    configure(folder, part="text_config", eos_token_id=7)
    for unknown in (None, [], 999_999, [999_999]):
        configure(folder, "generation_config.json", eos_token_id=unknown)
        assert eos_ids(folder) == (7,), unknown
    assert load_model(str(folder)).eos_ids == (7,)


@pytest.mark.parametrize("eos", ["</s>", [2.0], True, {"id": 2}])
def test_an_end_mark_that_is_no_number_is_refused(folder, eos):
    configure(folder, "generation_config.json", eos_token_id=eos)
    with pytest.raises(
        InputError, match=r"generation_config\.json of .* has the eos_token_id .*; it must be a token's"
    ):
        describe_model(str(folder))


@pytest.mark.parametrize(("content", "says"), [("{", "is not valid JSON"), ("[]", "no object"), ("\xff", "not valid")])
def test_a_broken_generation_config_is_one_sentence(folder, content, says):
    (folder / "generation_config.json").write_bytes(content.encode("latin-1"))
    for use in (describe_model, load_model, load_whole):
        with pytest.raises(InputError, match=rf"generation_config\.json .*{says}.*; copy it again\.$"):
            use(str(folder))


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.0},
         {"do_sample": True, "temperature": 0.7, "top_k": 20}),
        ({"repetition_penalty": 1.05, "top_p": 0.9}, {"repetition_penalty": 1.05}),
        ({"do_sample": True, "temperature": None, "top_p": "much"}, {"do_sample": True}),
    ],
)  # fmt: skip
def test_what_a_checkpoint_asks_of_decoding_is_part_of_its_spec_and_not_of_its_fingerprint(folder, said, asked):
    (folder / "generation_config.json").unlink()
    before = describe_model(str(folder))
    assert before.asked_decoding == {}
    (folder / "generation_config.json").write_text(json.dumps(said))
    spec = describe_model(str(folder))
    assert spec.asked_decoding == asked
    assert spec.weights == before.weights


# --- chat templates ---


@pytest.fixture(params=["qwen", "llava"])
def templated(request, tmp_path):
    """A checkpoint that is asked by its own template, and this."""
    folder = MAKERS[request.param](tmp_path / request.param)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    return folder, template


def asked(folder):
    model = load_model(str(folder))
    prompt = model.lay_out("What?", 1, "chat")
    return model.vocabulary.tokenizer.decode(list(prompt.ids), skip_special_tokens=False)


NOT_THIS = "{{ raise_exception('not this one') }}"


def test_of_named_templates_the_default_is_taken_wherever_they_stand(templated):
    folder, template = templated
    (folder / "chat_template.jinja").write_text(template)
    expected = asked(folder)
    assert "What?" in expected
    named = [{"name": "tool_use", "template": NOT_THIS}, {"name": "default", "template": template}]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(NOT_THIS)
    assert asked(folder) == expected
    shutil.rmtree(folder / "additional_chat_templates")
    (folder / "chat_template.jinja").unlink()
    configure(folder, "tokenizer_config.json", chat_template=named)
    assert asked(folder) == expected
    configure(folder, "tokenizer_config.json", chat_template=NOT_THIS)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert asked(folder) == expected


def test_named_templates_without_a_default_are_one_sentence(templated):
    folder, template = templated
    named = [{"name": name, "template": template} for name in ("tool_use", "rag")]
    configure(folder, "tokenizer_config.json", chat_template=named)
    with pytest.raises(InputError, match=r"are called rag, tool_use, and none of them default, .*; call it default"):
        describe_model(str(folder))


@pytest.mark.parametrize("broken", [[{"name": "default"}], [3], 7, {"default": {}}])
def test_templates_that_are_none_are_one_sentence(templated, broken):
    folder, _ = templated
    configure(folder, "tokenizer_config.json", chat_template=broken)
    with pytest.raises(InputError) as caught:
        describe_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_template_with_a_date_makes_one_prompt_on_all_days(templated):
    folder, template = templated
    dated = "{% if tools %}{{ raise_exception('tools') }}{% endif %}{{ strftime_now('%Y-%m-%d') }}" + template
    (folder / "chat_template.jinja").write_text(dated)
    assert "2024-07-26" in asked(folder)


def test_a_template_that_refuses_all_is_one_sentence(templated):
    folder, _ = templated
    (folder / "chat_template.jinja").write_text("{{ raise_exception('Only text is supported') }}")
    with pytest.raises(InputError, match=r"cannot be filled with .*Only text is supported.*; take the (one|template)"):
        describe_model(str(folder))
