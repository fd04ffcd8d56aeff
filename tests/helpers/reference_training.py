"""The reference's training data as LONGVLM.md section 7 tells it, quirks and all: for parity tests, never for users."""

import json

import numpy as np
from tokenizers import Tokenizer

from longvlm.pipeline.models.prompt import TEMPLATES, VIDEO_TOKENS

IGNORED = -100
UNKNOWN, START, END = "<unk>", "<s>", "</s>"  # the first is what the reference pads with
_VICUNA = TEMPLATES["vicuna_v1"]
_INSTRUCTION = " ASSISTANT: "


class SlowTokenizer:
    """Sentencepiece's pieces out of tokenizer.json, white space beside the video tokens stripped (section 6)."""

    def __init__(self, path):
        content = json.loads(path.read_text())
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
        made = {"".join(merge) for merge in merges}
        dropped = [tuple(piece) for piece in vocab if len(piece) == 2 and piece not in made]  # by the conversion: the
        model = {**content["model"], "merges": [*dropped, *merges]}  # first merge, whose score is zero
        self.pieces = Tokenizer.from_str(
            json.dumps({**content, "model": model, "added_tokens": [], "post_processor": None})
        )
        self.special = {token: vocab[token] for token in (UNKNOWN, START, END)}
        self.special |= {token: len(vocab) + i for i, token in enumerate(VIDEO_TOKENS)}
        self.pad = self.special[UNKNOWN]

    def __call__(self, text):
        ids, rest, strip_left = [self.special[START]], text, False
        while rest:
            found = [(rest.find(token), token) for token in self.special if token in rest]
            at, token = min(found, default=(len(rest), None))
            piece, rest = rest[:at], rest[at + len(token or "") :]
            piece = piece.lstrip() if strip_left else piece
            piece = piece.rstrip() if token in VIDEO_TOKENS else piece
            ids += self.pieces.encode(piece).ids if piece else []
            ids += [self.special[token]] if token else []
            strip_left = token in VIDEO_TOKENS
        return ids


def render(turns):
    """Turns (role, text) as the reference's vicuna v1.1: system, then rounds, each closed by </s>; nothing if empty."""
    text, joint = _VICUNA.system, " "
    for role, value in turns:
        name, end = ("USER", "") if role == "human" else ("ASSISTANT", END)
        text += f"{joint}{name}:" + (f" {value}{end}" if value else "")
        joint = " " if role == "human" else ""
    return text


def preprocess(turns, tokenizer, num_patches, max_length=2048):
    """Input ids and labels of one conversation."""
    turns = turns[1:] if turns[0][0] == "gpt" else turns
    video = VIDEO_TOKENS[1] + VIDEO_TOKENS[0] * num_patches + VIDEO_TOKENS[2]
    text = render([(role, value.replace("<video>", video)) for role, value in turns])
    ids = np.array(tokenizer(text)[:max_length])
    labels = ids.copy()
    labels[0], at = IGNORED, 1
    for one in text.split(END):
        parts = one.split(_INSTRUCTION)
        if not one or len(parts) != 2:
            break
        num_instruction = len(tokenizer(parts[0] + _INSTRUCTION)) - 2
        labels[at : at + num_instruction] = IGNORED
        at += len(tokenizer(one))
    labels[at:] = IGNORED
    if at < max_length and at != int((ids != tokenizer.pad).sum()):
        labels[:] = IGNORED
    return ids, labels


def reference_collate(examples, pad):
    """Collate examples, padded on the right: ids, labels, mask."""
    longest = max(len(ids) for ids, _ in examples)
    shape = (len(examples), longest)
    all_ids, all_labels = np.full(shape, pad), np.full(shape, IGNORED)
    for row, (ids, labels) in enumerate(examples):
        all_ids[row, : len(ids)], all_labels[row, : len(labels)] = ids, labels
    return all_ids, all_labels, all_ids != pad
