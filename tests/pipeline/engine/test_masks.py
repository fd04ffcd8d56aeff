import pytest
import torch

from longvlm.pipeline.answering.grammar import grammar_of
from longvlm.pipeline.engine.grammar import Speller
from longvlm.pipeline.engine.growing import Growing
from longvlm.pipeline.engine.masks import Masks
from longvlm.pipeline.models.contract import Vocabulary
from models import byte_fallback_tokenizer

EOS = 2

pytest.importorskip("llguidance", reason="what a machine with a GPU may lack")


def spellings(room=9):
    speller = Speller(Vocabulary(byte_fallback_tokenizer(), (EOS,)))
    return speller, {place: speller.begin(grammar_of("number", None), room) for place in (0, 2)}


def spelt(speller, ids):
    return {speller.tokens.decode_bytes([i]) for i in ids}


def test_rows_with_a_grammar_keep_what_it_allows_and_others_keep_all(device):
    speller, held = spellings()
    logits = torch.zeros(3, speller.tokens.vocab_size + 40, device=device)  # the head has rows without a token
    Masks(held, device).apply(logits)
    assert logits[1].isfinite().all()
    for row in (0, 2):
        allowed = logits[row].isfinite().nonzero().flatten().tolist()
        assert spelt(speller, allowed) == {b" ", b"-", b" 7", b"12", *(str(digit).encode() for digit in range(10))}


def test_a_head_may_be_smaller_than_the_last_word_of_a_mask_and_masks_follow_the_tokens(device):
    speller, held = spellings()
    masks, ends = Masks(held, device), torch.tensor([EOS], device=device)
    growing = Growing([3, 3, 3], [9, 9, 9], None, ends)
    point, zero, minus = (speller.tokens.greedy_tokenize(mark)[0] for mark in ".0-")
    growing.extend(torch.tensor([zero, zero, minus], device=device))
    masks.take(growing)
    logits = torch.zeros(3, speller.tokens.vocab_size, device=device)
    masks.apply(logits)
    assert logits[0].isfinite().nonzero().flatten().tolist() == sorted([EOS, point, *_other(speller, b".", point)])
    assert spelt(speller, logits[2].isfinite().nonzero().flatten().tolist()) >= {b"0", b"9", b"12"}
    assert logits[1].isfinite().all()


def test_a_token_that_may_not_stand_is_replaced_in_the_row(device):
    speller, held = spellings(room=2)
    masks, ends = Masks(held, device), torch.tensor([EOS], device=device)
    growing = Growing([3, 3, 3], [2, 9, 2], None, ends)
    space, minus, seven = (speller.tokens.greedy_tokenize(mark)[0] for mark in " -7")
    growing.extend(torch.tensor([minus, minus, seven], device=device))
    masks.take(growing)  # a digit still fits behind the sign
    assert growing.fetch()[0] == [[minus], [minus], [seven]]
    logits = torch.zeros(3, speller.tokens.vocab_size, device=device)
    masks.apply(logits)
    assert int(logits[0].isfinite().sum()) == 1
    assert int(logits[2].argmax()) == EOS
    assert space not in logits[0].isfinite().nonzero().flatten().tolist()


def _other(speller, spelling, known):
    """Further tokens of the same bytes: those of byte fallback."""
    own = range(speller.tokens.vocab_size)
    return [i for i in own if i != known and speller.tokens.decode_bytes([i]) == spelling]
