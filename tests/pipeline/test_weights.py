import json

import pytest
import torch
from safetensors.torch import save_file

from longvlm.pipeline.stored_tensors import stored_fingerprint, stored_tensors
from longvlm.pipeline.weights import build_module, read_tensors, weights_fingerprint
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
    assert stored_fingerprint(stored_tensors(tmp_path, everything)) == weights_fingerprint(TENSORS.items())


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
    ((name, stored),) = stored_tensors(tmp_path, lambda name: "inner" if name == "a.weight" else None)
    assert (name, stored.dtype, stored.shape) == ("inner", "float32", (2, 3))
    assert stored.data.tobytes() == TENSORS["a.weight"].numpy().tobytes()


@pytest.mark.parametrize("read", [read_tensors, stored_tensors])
def test_a_folder_without_weights_a_missing_shard_and_a_broken_file(tmp_path, read):
    with pytest.raises(InputError, match=r"has no weights; it needs model\.safetensors"):
        dict(read(tmp_path, everything))
    save_in(tmp_path, "shards")
    whole = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks two\.safetensors"):
        dict(read(tmp_path, everything))
    for broken in (b"not tensors", whole[:-1], b""):
        (tmp_path / "two.safetensors").write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read"):
            dict(read(tmp_path, everything))


@pytest.mark.parametrize("read", [read_tensors, stored_tensors])
def test_pickles_that_would_run_code_are_refused(tmp_path, read):
    torch.save({"a": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        dict(read(tmp_path, everything))


def test_weights_that_do_not_fit_or_are_not_all_there():
    class Linear(torch.nn.Linear):
        def __init__(self, config):
            super().__init__(*config)

    with pytest.raises(InputError, match=r"lack bias \(1 missing in all\)"):
        build_module(Linear, (2, 3), {"weight": torch.ones(3, 2)}, "somewhere")
    with pytest.raises(InputError, match=r"do not fit its config\.json"):
        build_module(Linear, (2, 3), {"weight": torch.ones(2, 3), "bias": torch.ones(3)}, "somewhere")


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
