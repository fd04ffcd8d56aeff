"""The reference's training data as LONGVLM.md section 7 tells it, quirks and all: for parity tests, never for users."""

import json

import numpy as np
from tokenizers import Tokenizer

from longvlm.pipeline.models.prompt import TEMPLATES, VIDEO_TOKENS

IGNORED, PAD = -100, 0
_VICUNA = TEMPLATES["vicuna_v1"]
_INSTRUCTION = " ASSISTANT: "


class SlowTokenizer:
    """Sentencepiece's pieces out of tokenizer.json, white space beside the video tokens stripped (section 6)."""

    def __init__(self, path):
        content = json.loads(path.read_text())
        model = content["model"]
        model["merges"] = ["▁ ▁", *model["merges"]]  # the first one, which the conversion drops
        content["added_tokens"] = content["post_processor"] = None
        self.pieces = Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
        size = len(model["vocab"])
        self.special = {"<unk>": 0, "<s>": 1, "</s>": 2, **{token: size + i for i, token in enumerate(VIDEO_TOKENS)}}

    def __call__(self, text):
        ids, rest, strip_left = [1], text, False
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
        name, end = ("USER", "") if role == "human" else ("ASSISTANT", "</s>")
        text += f"{joint}{name}:" + (f" {value}{end}" if value else "")
        joint = " " if role == "human" else ""
    return text


def preprocess(turns, tokenizer, max_length=2048, num_patches=305):
    """Input ids and labels of one conversation."""
    turns = turns[1:] if turns[0][0] == "gpt" else turns
    video = VIDEO_TOKENS[1] + VIDEO_TOKENS[0] * num_patches + VIDEO_TOKENS[2]
    text = render([(role, value.replace("<video>", video)) for role, value in turns])
    ids = np.array(tokenizer(text)[:max_length])
    labels = ids.copy()
    labels[0], at = IGNORED, 1
    for one in text.split("</s>"):
        parts = one.split(_INSTRUCTION)
        if not one or len(parts) != 2:
            break
        num_instruction = len(tokenizer(parts[0] + _INSTRUCTION)) - 2
        labels[at : at + num_instruction] = IGNORED
        at += len(tokenizer(one))
    labels[at:] = IGNORED
    if at < max_length and at != int((ids != PAD).sum()):
        labels[:] = IGNORED
    return ids, labels


def reference_collate(examples):
    """Collate examples, padded on the right: ids, labels, mask."""
    longest = max(len(ids) for ids, _ in examples)
    shape = (len(examples), longest)
    all_ids, all_labels = np.full(shape, PAD), np.full(shape, IGNORED)
    for row, (ids, labels) in enumerate(examples):
        all_ids[row, : len(ids)], all_labels[row, : len(labels)] = ids, labels
    return all_ids, all_labels, all_ids != PAD
