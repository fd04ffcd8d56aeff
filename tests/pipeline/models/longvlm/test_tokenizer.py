import json

import pytest
from reference_outputs import read_json

from longvlm.pipeline.models.longvlm.model import LongVLM
from longvlm.pipeline.models.longvlm.tokenizer import from_sentencepiece, load_tokenizer
from longvlm.pipeline.models.prompt import silent_ids, tidy
from longvlm.schemas.errors import InputError
from support import lent, missing


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout", ["full/tokenizer.json", "full/tokenizer.model", "base/tokenizer.json", "base/tokenizer.model"]
)
def test_ids_and_texts_are_those_of_the_reference_s_fast_tokenizer(golden, layout):
    tokenizer = load_tokenizer(lent(golden.folder / layout))
    settings = {"use_start_end": True, "layout": "plain", "templates": (), "eos_ids": (), "banned_ids": ()}
    model = LongVLM("", None, None, tokenizer, **settings)
    for case in read_json(golden.folder / "tokenizer_golden.json") or missing(golden.folder, "texts"):
        assert tokenizer.encode(case["text"]).ids == case["fast"], case["text"]
        assert model.decode(case["fast"]) == tidy(case["decode_fast"])


@pytest.mark.parity
def test_sentencepiece_gives_the_very_tokenizer_that_transformers_made(golden):
    ours = json.loads(from_sentencepiece(lent(golden.folder / "base/tokenizer.model").read_bytes()).to_str())
    theirs = read_json(golden.folder / "base/tokenizer.json")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in theirs["model"]["merges"]]
    assert [tuple(merge) for merge in ours["model"]["merges"]] == merges
    for part in ("normalizer", "decoder", "pre_tokenizer", "added_tokens"):
        assert ours[part] == theirs[part]


def test_video_tokens_are_added_in_order_where_they_are_lacking(untrained_folder, tmp_path):
    spec = json.loads((untrained_folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if "vid_" not in token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    plain, known = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(untrained_folder / "tokenizer.json")
    for token in ("<vid_patch>", "<vid_start>", "<vid_end>"):
        assert plain.token_to_id(token) == known.token_to_id(token)
    assert plain.get_vocab_size() == known.get_vocab_size()
    assert plain.token_to_id("<vid_patch>") + 1 == plain.token_to_id("<vid_start>")
    assert silent_ids(plain) == silent_ids(known)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x0a\xff\xff\xff", bytes(range(256))])
def test_a_damaged_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"the tokenizer .*{name} cannot be read"):
        load_tokenizer(tmp_path / name)
