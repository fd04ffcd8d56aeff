from pathlib import Path

import pytest

from longvlm.pipeline.model_folder import load_tokenizer, read_json, resolve, short_name
from longvlm.schemas.errors import InputError


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


REVISIONS = {"main": "a" * 40, "v1.0": "b" * 40, "refs/pr/1": "c" * 40}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """What a machine without a network has of a model on the hub: three revisions."""
    made = tmp_path / "hub" / "models--org--name"
    for name, commit in REVISIONS.items():
        snapshot = made / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").touch()
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
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/name"}')
    with pytest.raises(
        InputError, match=r"is an adapter of another one .* merge it into that one first \(peft's merge_"
    ):
        resolve(str(tmp_path))


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
