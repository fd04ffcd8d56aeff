import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longvlm.pipeline.model_folder import (
    build_module,
    load_tokenizer,
    read_json,
    read_tensors,
    resolve,
    short_name,
    weights_fingerprint,
)
from longvlm.schemas.errors import InputError

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.ones(4, dtype=torch.bfloat16),
}


def everything(name):
    return name


def save_in(folder, form):
    names = list(TENSORS)
    if form == "safetensors":
        save_file(TENSORS, folder / "model.safetensors")
    elif form == "pickle":
        torch.save(TENSORS, folder / "pytorch_model.bin")
    else:
        shards = {"one": names[:1], "two": names[1:]}
        for shard, members in shards.items():
            save_file({name: TENSORS[name] for name in members}, folder / f"{shard}.safetensors")
        weight_map = {name: f"{shard}.safetensors" for shard, members in shards.items() for name in members}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("form", ["safetensors", "shards", "pickle"])
def test_the_same_tensors_and_fingerprint_however_they_are_stored(tmp_path, form):
    save_in(tmp_path, form)
    read = dict(read_tensors(tmp_path, everything))
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert weights_fingerprint(read.items()) == weights_fingerprint(reversed(TENSORS.items()))


@pytest.mark.parametrize(
    "change",
    [
        {"a.weight": TENSORS["a.weight"] + 1e-6},
        {"a.weight": TENSORS["a.weight"].reshape(3, 2)},
        {"c": TENSORS["c"].view(torch.float16)},
        {"d": torch.ones(1)},
    ],
)
def test_the_fingerprint_sees_values_shapes_types_and_names(change):
    assert weights_fingerprint((TENSORS | change).items()) != weights_fingerprint(TENSORS.items())


def test_names_are_chosen_and_changed_on_reading(tmp_path):
    save_in(tmp_path, "safetensors")
    read = dict(read_tensors(tmp_path, lambda name: "inner" if name == "b" else None))
    assert read == {"inner": TENSORS["b"]}


def test_a_folder_without_weights_a_missing_shard_and_a_broken_file(tmp_path):
    with pytest.raises(InputError, match=r"has no weights; it needs model\.safetensors"):
        dict(read_tensors(tmp_path, everything))
    save_in(tmp_path, "shards")
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks two\.safetensors"):
        dict(read_tensors(tmp_path, everything))
    (tmp_path / "two.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="cannot be read"):
        dict(read_tensors(tmp_path, everything))


def test_pickles_that_would_run_code_are_refused(tmp_path):
    torch.save({"a": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        dict(read_tensors(tmp_path, everything))


def test_json_that_is_missing_or_broken(tmp_path):
    with pytest.raises(InputError, match=r"lacks config\.json"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(tmp_path, "config.json")


def test_a_folder_is_its_own_and_a_path_that_is_none_is_named(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    for path in (str(tmp_path / "nothing"), "./a/b", "models/of/mine", "clip"):
        with pytest.raises(InputError, match="does not exist"):
            resolve(path)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="could not be fetched from the hub"):
        resolve("nobody/nothing-of-the-kind")


def test_weights_that_do_not_fit_or_are_not_all_there():
    class Linear(torch.nn.Linear):
        def __init__(self, config):
            super().__init__(*config)

    with pytest.raises(InputError, match=r"lack bias \(1 missing in all\)"):
        build_module(Linear, (2, 3), {"weight": torch.ones(3, 2)}, "somewhere")
    with pytest.raises(InputError, match=r"do not fit its config\.json"):
        build_module(Linear, (2, 3), {"weight": torch.ones(2, 3), "bias": torch.ones(3)}, "somewhere")


REVISIONS = {"main": "a" * 40, "v1.0": "b" * 40, "refs/pr/1": "c" * 40}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """What a machine without a network has of a model on the hub: three revisions."""
    made = tmp_path / "hub" / "models--org--name"
    for name, commit in REVISIONS.items():
        snapshot = made / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save_file({"of": torch.tensor([ord(commit[0])])}, snapshot / "model.safetensors")
        (made / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (made / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return made


@pytest.mark.parametrize("said", ["", "@main", "@v1.0", "@refs/pr/1", f"@{'b' * 40}"])
def test_a_revision_may_be_pinned(cached, said):
    revision = said.removeprefix("@") or "main"
    commit = REVISIONS.get(revision, revision)
    assert resolve(f"org/name{said}") == cached / "snapshots" / commit
    assert dict(read_tensors(resolve(f"org/name{said}"), everything))["of"].item() == ord(commit[0])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            "org/name@v2",
            r"fetched from the hub \(it is out of reach, and the cache here does not hold all of revision v2",
        ),
        (f"org/name@{'d' * 40}", "does not hold all of revision dddd"),
        ("org/name@", "the model org/name@ names no revision after the @; write a branch, a tag or a commit there"),
        ("org/name@../../x", "names no revision after the @"),
        ("org/name@a b", "names no revision after the @"),
        ("org/other@main", "could not be fetched from the hub"),
        ("name@main", "the model folder name@main does not exist"),
        ("./a/b@main", "does not exist"),
    ],
)
@pytest.mark.usefixtures("cached")
def test_a_revision_that_there_is_not_is_one_sentence(model, says):
    with pytest.raises(InputError, match=says) as caught:
        resolve(model)
    assert str(caught.value).count(". ") == 0
    assert str(caught.value).endswith(".")


@pytest.mark.usefixtures("cached")
def test_a_folder_whose_name_holds_an_at_stays_a_folder(tmp_path, monkeypatch):
    (tmp_path / "org" / "name@v1.0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name@v1.0") == Path("org/name@v1.0")


def test_a_short_name_keeps_the_revision(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert short_name(str(tmp_path / "a@b")) == "a@b"
    assert short_name("org/name") == "name"
    assert short_name("org/name@refs/pr/1") == "name@refs/pr/1"


def test_an_adapter_is_to_be_merged_first(tmp_path):
    save_in(tmp_path, "safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/name"}')
    with pytest.raises(
        InputError, match=r"is an adapter of another one .* merge it into that one first \(peft's merge_"
    ):
        resolve(str(tmp_path))


@pytest.mark.parametrize("more", ["pytorch_model.bin", "model.safetensors.index.json", "consolidated.safetensors"])
def test_what_lies_beside_whole_weights_is_left_alone(tmp_path, more):
    save_in(tmp_path, "safetensors")
    (tmp_path / more).write_bytes(b"{}")
    assert dict(read_tensors(tmp_path, everything)).keys() == TENSORS.keys()


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]"])
def test_an_index_that_names_no_shards_is_broken(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json (has no weight_map|is JSON, but no object).*copy it again\."):
        dict(read_tensors(tmp_path, everything))


@pytest.mark.parametrize("content", ["null", "[1]", '"text"'])
def test_json_that_is_no_object(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="is JSON, but no object with fields; copy it again"):
        read_json(tmp_path, "config.json")


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}', "[]"])
def test_a_broken_tokenizer_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
