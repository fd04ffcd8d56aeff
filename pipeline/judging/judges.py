"""Judges of predicted answers: whether an answer is right, and how good it is.

Exact match needs no model. A chat model is shown a prompt out of `judging.toml` and replies with a dictionary; how it
is reached (`judge_http.py`, `judge_local.py`) makes no difference here.
"""

import ast
import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from typing import Any, Protocol, TypeVar

from longvlm.pipeline.jsontext import compact
from longvlm.pipeline.judging.agreement import is_right
from longvlm.pipeline.models.thinking import split_thinking
from longvlm.schemas.errors import ErrorCode, InputError, PipelineError

Messages = list[dict[str, str]]  # role and content, as chat models take them
K = TypeVar("K")

MAX_SCORE = 5
_PROMPTS: dict[str, Any] = tomllib.loads(
    (files("longvlm.pipeline.judging") / "judging.toml").read_text(encoding="utf-8")
)
PROMPT_VERSION: int = _PROMPTS["version"]
_FLAT_DICT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Case:
    """An evaluation case: an answer to be judged."""

    dimension: str  # qa | correctness | detail | context | temporal | consistency
    question: dict[str, Any]  # a row of benchmarks.ITEMS
    predictions: tuple[str, ...]  # one, or two of consistency


@dataclass(frozen=True)
class Verdict:
    """The verdict of a judge on a case."""

    status: str  # judged | unparsed | failed
    score: float | None = None  # 0 to 5
    is_right: bool | None = None
    raw_reply: str | None = None
    error_code: ErrorCode | None = None
    error: str | None = None


class Judge(Protocol):
    """A judge of answers. Equal names and equal prompts mean equal verdicts, so that none is asked for twice."""

    name: str  # KIND:MODEL@HOST#PROMPTS, without credentials
    concurrency: int  # cases at a time

    def prompt(self, case: Case) -> str:
        """The prompt: all that the judge goes by, as one text."""

    def judge(self, case: Case) -> Verdict:
        """The verdict; a failure of this one case is a verdict too. InputError where no case can be judged."""

    def close(self) -> None:
        """Close the judge's model; a case under way fails soon."""


class ChatModel(Protocol):
    """A chat model. Raises PipelineError for one conversation, InputError where none is possible."""

    name: str
    concurrency: int

    def reply(self, messages: Messages) -> str:
        """The model's reply."""

    def close(self) -> None:
        """Close it; a reply that is waited for fails soon."""


class ExactJudge:
    """Exact match: equal values of typed questions; equal texts but for case, articles, punctuation and white space."""

    name = "exact#1"
    concurrency = 1

    def prompt(self, case: Case) -> str:
        """The prompt: what is compared."""
        asked = {name: case.question[name] for name in ("type", "choices", "schema", "answer")}
        return compact({**asked, "predictions": case.predictions})

    def judge(self, case: Case) -> Verdict:
        """Right or wrong; no score."""
        right = all(is_right(case.question, said, case.question["answer"]) for said in case.predictions)
        return Verdict("judged", is_right=right)

    def close(self) -> None:
        """Do nothing: no model is held."""


class ChatJudge:
    """A chat model as judge (LLM-as-a-judge); a reply that is no dictionary of the right kind is asked for again."""

    def __init__(self, chat: ChatModel) -> None:
        self.chat = chat
        self.name = f"{chat.name}#{PROMPT_VERSION}"
        self.concurrency = chat.concurrency

    def prompt(self, case: Case) -> str:
        """The prompt: the conversation as JSON."""
        return compact(messages_for(case))

    def judge(self, case: Case) -> Verdict:
        """The verdict that the model replies; `unparsed` if that says nothing twice, `failed` if there is no reply."""
        messages = messages_for(case)
        try:
            reply = self.chat.reply(messages)
            verdict = read_reply(reply, case.dimension)
            if verdict.status == "unparsed":
                again = {"role": "user", "content": _PROMPTS["again"].strip()}
                verdict = read_reply(
                    self.chat.reply([*messages, {"role": "assistant", "content": reply}, again]), case.dimension
                )
        except PipelineError as error:
            return Verdict("failed", error_code=error.code, error=error.message)
        return verdict

    def close(self) -> None:
        """Close the chat model."""
        self.chat.close()


def messages_for(case: Case) -> Messages:
    """The messages to a chat model: the criterion of the dimension, then question, right answer and predictions."""
    told = [_PROMPTS["role"], _PROMPTS["criteria"][case.dimension]]
    told.append(_PROMPTS["match_reply" if case.dimension == "qa" else "score_reply"])
    lines = {"Question": case.question["question"]}
    if len(case.predictions) > 1:
        lines["The same question in other words"] = case.question["question2"]
    lines["Correct answer"] = case.question["answer"]
    names = ["Predicted answer", "Predicted answer to the question in other words"]
    lines |= dict(zip(names, case.predictions, strict=False))
    shown = [f"{name}: {json.dumps(text, ensure_ascii=False)}" for name, text in lines.items()]
    return [
        {"role": "system", "content": "\n".join(part.strip() for part in told)},
        {"role": "user", "content": "\n".join(shown)},
    ]


def read_reply(reply: str, dimension: str) -> Verdict:
    """Parse a reply: `judged` with a score from 0 to 5 (and of qa, whether the answer is right), or `unparsed`.

    What a judge thinks on the way to it is kept in `raw_reply` alone.
    """
    said = reply_dict(split_thinking(reply, is_open=False).answer or "")
    score = None if said is None else _score(said.get("score"))
    right = None if said is None or dimension != "qa" else _yes_or_no(said.get("pred"))
    if score is None or (dimension == "qa" and right is None):
        return Verdict("unparsed", raw_reply=reply)
    return Verdict("judged", score=score, is_right=right, raw_reply=reply)


def reply_dict(reply: str) -> dict[Any, Any] | None:
    """Parse the dictionary of a reply, in JSON or Python; else the one that stands in it; None if there are two."""
    whole = _literal(reply)
    if whole is not None:
        return whole
    found = [said for text in _FLAT_DICT.findall(reply) if (said := _literal(text)) is not None]
    return found[0] if found and all(said == found[0] for said in found) else None


def _literal(text: str) -> dict[Any, Any] | None:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # as both say: not one of mine
            continue
        if isinstance(value, dict):
            return value
    return None


def _score(value: Any) -> float | None:
    """A score, also one in quotes; None for what is none, or lies outside 0 to 5."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        score = float(value)
    except (ValueError, OverflowError):
        return None
    return score if 0 <= score <= MAX_SCORE else None


def _yes_or_no(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    said = value.strip(" .").casefold() if isinstance(value, str) else None
    return {"yes": True, "no": False}.get(said or "")


def judge_all(judge: Judge, cases: Iterable[tuple[K, Case]]) -> Iterator[tuple[K, Verdict]]:
    """Verdicts as they come, as many cases at a time as the judge takes; the judge is closed at the end.

    Raises:
        InputError: no case can be judged; verdicts that were under way then are yielded first.
    """
    todo = iter(cases)
    waiting: dict[Future[Verdict], K] = {}
    pool = ThreadPoolExecutor(judge.concurrency, thread_name_prefix="judge")
    refused: InputError | None = None
    try:
        while True:
            for key, case in islice(todo, 0 if refused else 2 * judge.concurrency - len(waiting)):
                waiting[pool.submit(judge.judge, case)] = key
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                key = waiting.pop(future)
                try:
                    verdict = future.result()
                except InputError as error:
                    refused = refused or error
                    judge.close()
                    continue
                if not (refused and verdict.status == "failed"):  # it failed because the judge was closed
                    yield key, verdict
    finally:
        judge.close()
        pool.shutdown(cancel_futures=True)
    if refused:
        raise refused
