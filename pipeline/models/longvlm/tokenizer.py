"""The tokenizer of a checkpoint, so that prompts have the same ids as under the reference's fast tokenizer.

transformers 5 rebuilds LLaMA tokenizers and gives other ids (LONGVLM.md section 6); `tokenizer.json` read as it stands
does not, and where a checkpoint only has sentencepiece's `tokenizer.model`, the same tokenizer is made from that.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from longvlm.pipeline.models.prompt import VIDEO_TOKENS
from longvlm.schemas.errors import InputError

_NORMAL, _CONTROL = 1, 3  # kinds of sentencepiece pieces
_Field = int | bytes


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` or `tokenizer.model`, the three video tokens added where it lacks them.

    Raises:
        InputError: the file is damaged or of another kind.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.suffix == ".json" else from_sentencepiece(path.read_bytes())
    except Exception as error:  # tokenizers raises nothing more special
        raise InputError(f"the tokenizer {path} cannot be read ({error}); copy the file again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in VIDEO_TOKENS])
    return tokenizer


def from_sentencepiece(model: bytes) -> Tokenizer:
    """LLaMA's fast tokenizer out of a serialised sentencepiece BPE model.

    Merges follow from the pieces: each way to cut a piece in two others, in the order of ids. A piece with score zero
    gets none, as in the conversion the reference ran with (LONGVLM.md section 6: LLaMA's double space).

    Raises:
        ValueError: not a sentencepiece BPE model with byte fallback.
    """
    pieces = [_piece(value) for number, value in _fields(model) if number == 1 and isinstance(value, bytes)]
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    if "<0x00>" not in ids or "<unk>" not in ids:
        raise ValueError("no sentencepiece model with byte fallback")
    merges: list[tuple[str, str]] = []
    for text, score, kind in pieces:
        if kind == _NORMAL and score:
            cuts = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
            merges += sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    tokenizer.add_special_tokens([AddedToken("<unk>", normalized=False)])
    control = [text for text, _, kind in pieces if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=True) for text in control])
    return tokenizer


def _piece(message: bytes) -> tuple[str, float, int]:
    """Text, score and kind of one `SentencePiece` message."""
    fields = dict(_fields(message))
    text, score = fields[1], fields.get(2, bytes(4))
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise TypeError("no sentencepiece model")
    kind = fields.get(3, _NORMAL)
    return text.decode(), struct.unpack("<f", score)[0], kind if isinstance(kind, int) else 0


def _fields(message: bytes) -> Iterator[tuple[int, _Field]]:
    """The fields of a protobuf message: number and value, an int or raw bytes (protobuf.dev, Encoding)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("no protobuf message")
        if at + size > len(message):
            raise ValueError("the file ends early")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and where it ends."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("the file ends early")
