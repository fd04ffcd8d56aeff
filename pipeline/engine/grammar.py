"""Answers that a grammar holds: which tokens may come next, and how an answer is closed before its room is full.

llguidance follows a grammar on the host, over the bytes that tokens stand for. What a row writes follows from its
grammar, its room and its own logits, whoever else is in the batch.

At every step a way is known to close the answer within its room. A token after which there would be none, say one that
opens an object with more keys than there is room for, is not taken: the first of that way stands in its place.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from textwrap import shorten
from typing import Any

import numpy as np

from longvlm.pipeline.models.contract import Vocabulary
from longvlm.schemas.errors import ErrorCode, TerminalError

MAX_DEPTH = 32  # brackets within each other: what reads JSON, and what holds it against a schema, recurses
WORD_BITS = 32  # of a mask
MAX_LEAST = 4096  # tokens of the shortest answer
_CLOSES_TEXT, _CLOSES = b'"', b"}],"  # JSON: within a text, and outside of any, the first that is allowed
_MAX_TRIED = 300  # tokens that may come next: more than there are bytes
_DEAD_END = "NoExtension"  # how llguidance begins to say that no token goes on
_KEPT_GRAMMARS = 256  # a grammar takes about 5 ms and a MB


@dataclass(frozen=True)
class Nesting:
    """Where in JSON a text has come to."""

    depth: int = 0  # open brackets
    in_text: bool = False
    is_escaped: bool = False  # the next character of a text

    def after(self, spelt: bytes) -> "Nesting":
        """Where it is some bytes later."""
        depth, in_text, is_escaped = self.depth, self.in_text, self.is_escaped
        for byte in spelt:
            if is_escaped:
                is_escaped = False
            elif in_text:
                is_escaped, in_text = byte == ord("\\"), byte != ord('"')
            else:
                in_text = byte == ord('"')
                depth += (byte in b"[{") - (byte in b"]}")
        return Nesting(depth, in_text, is_escaped)


class Speller:
    """A model's vocabulary as llguidance knows it, and the grammars that are followed over it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.eos_ids = vocabulary, vocabulary.eos_ids
        self._begun = lru_cache(_KEPT_GRAMMARS)(self._begin)

    @cached_property
    def tokens(self) -> Any:
        """The vocabulary, a trie of bytes: made when the first grammar comes."""
        return _tokens_of(self.vocabulary)

    @cached_property
    def executor(self) -> Any:
        """Threads that make masks, as many as compute otherwise."""
        import torch  # takes seconds to load, and whoever reads or judges an answer needs none
        from llguidance import LLExecutor

        return LLExecutor(torch.get_num_threads())

    @property
    def num_words(self) -> int:
        """Words of a mask."""
        return -(-int(self.tokens.vocab_size) // WORD_BITS)

    @cached_property
    def closing_ids(self) -> dict[int, int]:
        """The tokens that are one character that closes, and nothing else, by that."""
        return {byte: token for byte in _CLOSES_TEXT + _CLOSES if (token := self._token_of(byte)) is not None}

    @cached_property
    def ranks(self) -> dict[int, int]:
        """The tokens that are one digit, as 0, or one letter of ASCII, as 1."""
        spelt = {i: self.tokens.decode_bytes([i]) for i in self._bytes}
        return {i: int(byte.isalpha()) for i, byte in spelt.items() if byte.isalnum()}

    @cached_property
    def _bytes(self) -> list[int]:
        """The tokens that are one byte."""
        own = (i for i in range(self.tokens.vocab_size) if not self.tokens.is_special_token(i))
        return [i for i in own if len(self.tokens.decode_bytes([i])) == 1]

    def begin(self, grammar: str, room: int) -> "Spelling":
        """An answer that has no token yet.

        Args:
            grammar: as llguidance writes them.
            room: tokens that it may have, an end mark among them.

        Raises:
            TerminalError: CUT_OFF: the room does not do for any answer. ANSWER_FAILED: the vocabulary can spell nothing
                that the grammar allows, or following the grammar goes beyond its limits.
        """
        begun = self._begun(grammar)
        if len(begun.closing) > room:
            raise TerminalError(
                ErrorCode.CUT_OFF,
                f"an answer of the type that was asked for takes about {len(begun.closing)} tokens or more, and only "
                f"{room} are allowed or fit the context; raise --max-new-tokens, or ask for less.",
            )
        return begun.copy(room)

    def text(self, ids: Sequence[int]) -> str:
        """What tokens spell, byte by byte: a tokenizer that knows words alone would set spaces within a number."""
        spelt: bytes = self.tokens.decode_bytes([i for i in ids if i not in self.eos_ids])
        return spelt.decode(errors="replace").strip()

    def shortest(self, matcher: Any) -> list[int]:
        """Some of the tokens that may come next: bytes, or where there are none any others."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")
        found = [i for i in self._bytes if allowed[i]] or np.flatnonzero(allowed).tolist()
        return [i for i in found if i not in self.eos_ids][:_MAX_TRIED]

    def lacking(self, characters: str) -> str:
        """Which of some characters of ASCII are no token."""
        return "".join(character for character in characters if self._token_of(ord(character)) is None)

    def _token_of(self, byte: int) -> int | None:
        """The token that is one character of ASCII; None where there is none."""
        ids: list[int] = self.tokens.greedy_tokenize(chr(byte))
        return ids[0] if self.tokens.decode_bytes(ids) == bytes([byte]) and len(ids) == 1 else None

    def _begin(self, grammar: str) -> "Spelling":
        matcher = _follow(self.tokens, grammar)
        end = matcher.deep_copy()
        closing = _close(self, end, Nesting(), MAX_LEAST)
        if end.is_error() and not end.get_error().startswith(_DEAD_END):
            raise TerminalError(ErrorCode.ANSWER_FAILED, f"decoding cannot follow it ({_stopped_by(end)}).")
        if closing is None:
            raise TerminalError(ErrorCode.ANSWER_FAILED, "nothing fits it that is short enough and can be spelt.")
        return Spelling(self, matcher, closing, Nesting(), 0)


class Spelling:
    """One answer on its way, and the tokens that would close it. `Speller.begin` makes one."""

    def __init__(self, speller: Speller, matcher: Any, closing: tuple[int, ...], nesting: Nesting, room: int) -> None:
        self.speller, self.matcher = speller, matcher
        self.closing = closing  # from here to the end of an answer, without an end mark
        self.room = room  # tokens that may follow, an end mark among them
        self.error: str | None = None  # why the grammar could not be followed any further
        self._nesting = nesting

    def copy(self, room: int) -> "Spelling":
        """Another one that has come as far, with a room of its own."""
        return Spelling(self.speller, self.matcher.deep_copy(), self.closing, self._nesting, room)

    @property
    def forced(self) -> int | None:
        """The one token that may come next, where there is no room for any other."""
        if self.error is None and self.room > max(len(self.closing), 1):
            return None
        return self._closes_by

    @property
    def _closes_by(self) -> int:
        """The token that an answer would be closed by now: the end mark, where it is complete or given up."""
        return self.closing[0] if self.closing and self.error is None else self.speller.eos_ids[0]

    def take(self, token: int) -> int:
        """Go on by a token that was chosen; returns the one that stands: it, or the first of those that close."""
        if token in self.speller.eos_ids or self._follow(token):
            return token
        if self.error is None and self.matcher.rollback(1):
            token = self._closes_by
            if token in self.speller.eos_ids or self._follow(token):
                return token
        self.error = f"the answer's grammar cannot be followed any further ({_stopped_by(self.matcher)})."
        return self._closes_by

    def _follow(self, token: int) -> bool:
        """Take a token in, if the answer can still be closed after it."""
        nesting = self._nesting.after(self.speller.tokens.decode_bytes([token]))
        if not self.matcher.consume_token(token) or nesting.depth > MAX_DEPTH:
            return False
        closing = self._closing_after(nesting)
        if closing is None:
            return False
        self.closing, self._nesting, self.room = closing, nesting, self.room - 1
        return True

    def _closing_after(self, nesting: Nesting) -> tuple[int, ...] | None:
        """What closes the answer now, if its room allows it when one token less fits: mostly what did before."""
        for ids in (self.closing[1:], self.closing):
            if self._closes(ids):
                return ids
        return _close(self.speller, self.matcher.deep_copy(), nesting, self.room - 1)

    def _closes(self, ids: tuple[int, ...]) -> bool:
        if len(ids) >= self.room:
            return False
        if not ids:
            return bool(self.matcher.is_accepting())
        whole = [*ids, self.speller.eos_ids[0]]
        return bool(self.matcher.validate_tokens(whole) == len(whole))


def _close(speller: Speller, matcher: Any, nesting: Nesting, room: int) -> tuple[int, ...] | None:
    """Tokens that end an answer within a room; None where none are found, or the matcher, which goes on, gets in error.

    What may be closed is closed, and what has to be written is written. Where neither leads on (`[ab]*c`), each byte
    that may stand there gets its turn, the least used first, since it may be the one that is missing; digits before
    letters before others, since a number is the shortest value, and patterns are mostly of these.
    """
    ids: list[int] = []
    num_used: Counter[int] = Counter()
    while not matcher.is_accepting():
        if found := _forced(matcher) or _closing_token(speller, matcher, nesting):
            num_used.clear()
        elif shortest := speller.shortest(matcher):
            found = [min(shortest, key=lambda token: (num_used[token], speller.ranks.get(token, 2)))]
            num_used.update(found)
        ids += found
        if not found or len(ids) > room or not matcher.consume_tokens(found):
            return None
        nesting = nesting.after(speller.tokens.decode_bytes(found))
    return tuple(ids)


def _forced(matcher: Any) -> list[int]:
    """Tokens that have to come next, where the tokenizer can make them of the bytes that have to."""
    ids: list[int] = matcher.compute_ff_tokens()
    return ids[: matcher.validate_tokens(ids)]


def _closing_token(speller: Speller, matcher: Any, nesting: Nesting) -> list[int]:
    closing = _CLOSES_TEXT if nesting.in_text else _CLOSES
    known = ([token] for byte in closing if (token := speller.closing_ids.get(byte)) is not None)
    return next((ids for ids in known if matcher.validate_tokens(ids)), [])


class _Words:
    """A vocabulary of whole words for llguidance, which reads those of bytes and of byte fallback by itself."""

    is_tokenizer_wrapper = True  # what llguidance looks for
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokenizer = vocabulary.tokenizer
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        num_ids = 1 + max(tokenizer.get_vocab().values())
        self.tokens = [(tokenizer.id_to_token(i) or "").removeprefix("##").encode() for i in range(num_ids)]
        self.special_token_ids = sorted(special | {i for i, spelt in enumerate(self.tokens) if not spelt})
        self.eos_token_id = vocabulary.eos_ids[0]

    def __call__(self, text: bytes) -> list[int]:  # noqa: ARG002 - the parameter that llguidance gives
        """No tokens: words have no one way to spell bytes. So nothing that is forced is written in one go."""
        return []


def _tokens_of(vocabulary: Vocabulary) -> Any:
    from llguidance import LLTokenizer

    eos_ids = list(vocabulary.eos_ids)
    try:
        return LLTokenizer(vocabulary.tokenizer.to_str(), eos_token=eos_ids)
    except ValueError:  # "can't determine decoder type"
        words: Any = _Words(vocabulary)
        return LLTokenizer(words, eos_token=eos_ids)


def _follow(tokens: Any, grammar: str) -> Any:
    """A matcher of llguidance at the beginning of a grammar, perhaps in error, within limits of time and memory.

    A step takes at most some 15 ms, and its automaton 40 MB.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_grammar_size=100_000, max_lexer_states=20_000, verbose_errors=False)
    return LLMatcher(tokens, grammar, log_level=0, limits=limits)


def _stopped_by(matcher: Any) -> str:
    """Why a matcher is in error, in llguidance's words, but for where in the grammar, which nobody has seen."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    return shorten(reason.rpartition("JSON schema: ")[2].removeprefix("error: ").rstrip("."), 150)
