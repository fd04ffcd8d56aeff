import json

import pytest

from longvlm.pipeline.judging.judges import (
    _PROMPTS,
    Case,
    ChatJudge,
    ExactJudge,
    Verdict,
    judge_all,
    messages_for,
    read_reply,
    reply_dict,
)
from longvlm.schemas.errors import ErrorCode, InputError, TransientError

QUESTION = {"question": "What runs?", "question2": "Which animal runs?", "answer": "a dog", "type": "text"}
QUESTION |= {"choices": None, "schema": None, "kind": None}


class Parrot:
    """A chat model that says what it is told to, one thing after the other."""

    name, concurrency = "parrot:1", 2

    def __init__(self, *replies):
        self.replies = list(replies)
        self.heard = []
        self.closed = False

    def reply(self, messages):
        self.heard.append(messages)
        said = self.replies.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    def close(self):
        self.closed = True


@pytest.mark.parametrize("dimension", ["qa", "correctness", "detail", "context", "temporal", "consistency"])
def test_a_prompt_holds_the_criterion_and_all_texts_as_quotations(dimension):
    predictions = ('a "big"\ndog', "a cat")[: 2 if dimension == "consistency" else 1]
    system, user = messages_for(Case(dimension, QUESTION, predictions))
    assert (system["role"], user["role"]) == ("system", "user")
    assert _PROMPTS["criteria"][dimension].strip() in system["content"]
    assert ("'pred'" in system["content"]) == (dimension == "qa")
    texts = [QUESTION["question"], QUESTION["answer"], *predictions]
    texts += [QUESTION["question2"]] if dimension == "consistency" else []
    assert all(json.dumps(text) in user["content"] for text in texts)
    assert len(user["content"].splitlines()) == len(texts)


@pytest.mark.parametrize(
    ("reply", "dimension", "score", "right"),
    [
        ("{'pred': 'yes', 'score': 4}", "qa", 4, True),
        ('{"pred": "No", "score": 1.5}', "qa", 1.5, False),
        ("{'pred': True, 'score': '5'}", "qa", 5, True),
        ("Here you are:\n```python\n{'score': 3}\n```\nI hope it helps.", "detail", 3, None),
        ("{'score': 3} as I said: {'score': 3}", "detail", 3, None),
        ("{'score': 0, 'why': 'no {braces}'}", "context", 0, None),
        ("<think>Is it {'score': 1}?</think>\n{'score': 4}", "detail", 4, None),
        ("Not {'score': 1}.\n</think>\n\n{'score': 4}", "detail", 4, None),
    ],
)
def test_a_reply_is_read_strictly_or_found_in_prose(reply, dimension, score, right):
    assert read_reply(reply, dimension) == Verdict("judged", score, right, reply)


@pytest.mark.parametrize(
    ("reply", "dimension"),
    [
        ("I would say four out of five.", "detail"),
        ("", "detail"),
        ("{'score': 6}", "detail"),
        ("{'score': -1}", "detail"),
        ("{'score': 'nan'}", "detail"),
        ("{'score': 1e999}", "detail"),
        ("{'score': True}", "detail"),
        ("{'score': [3]}", "detail"),
        ("{'points': 3}", "detail"),
        ("[{'score': 3}, {'score': 4}]", "detail"),
        ("{'score': 3} or {'score': 4}", "detail"),
        ("<think>It is {'score': 3}", "detail"),
        ("{'score': 3}", "qa"),
        ("{'pred': 'yes'}", "qa"),
        ("{'pred': 'unknown', 'score': 2}", "qa"),
        ("{'score': __import__('os').getpid()}", "detail"),
        ("{" * 100_000, "detail"),
        ("{'score': " + "(" * 10_000, "detail"),
        ("\0{'score': 3", "detail"),
    ],
)
def test_a_reply_that_says_nothing_clear_is_unparsed_and_kept(reply, dimension):
    assert read_reply(reply, dimension) == Verdict("unparsed", raw_reply=reply)


def test_two_dictionaries_that_differ_are_none():
    assert reply_dict("{'a': 1} {'a': 1}") == {"a": 1}
    assert reply_dict("{'a': 1} {'a': 2}") is None


def test_prose_is_asked_for_once_more_in_the_same_conversation():
    chat = Parrot("well...", "{'score': 2}")
    assert ChatJudge(chat).judge(Case("detail", QUESTION, ("x",))) == Verdict("judged", 2.0, None, "{'score': 2}")
    first, again = chat.heard
    assert again[: len(first)] == first
    assert [message["role"] for message in again[len(first) :]] == ["assistant", "user"]
    assert again[-2]["content"] == "well..."


def test_prose_twice_is_unparsed():
    verdict = ChatJudge(Parrot("well...", "hm")).judge(Case("detail", QUESTION, ("x",)))
    assert verdict == Verdict("unparsed", raw_reply="hm")


def test_a_failure_is_a_verdict_with_a_code():
    verdict = ChatJudge(Parrot(TransientError(ErrorCode.NETWORK, "gone."))).judge(Case("qa", QUESTION, ("x",)))
    assert verdict == Verdict("failed", error_code=ErrorCode.NETWORK, error="gone.")


@pytest.mark.parametrize(
    ("said", "right"), [("The dog!", True), ("A  DOG", True), ("dogs", False), ("", False), ("a 'dog'", True)]
)
def test_exact_match_looks_past_case_articles_punctuation_and_white_space(said, right):
    assert ExactJudge().judge(Case("qa", QUESTION, (said,))) == Verdict("judged", is_right=right)


def test_exact_match_of_typed_questions_compares_values():
    number = QUESTION | {"type": "number", "answer": "7"}
    assert ExactJudge().judge(Case("qa", number, ("about 7.0",))).is_right
    assert not ExactJudge().judge(Case("qa", number, ("seven or so",))).is_right


def test_equal_prompts_are_equal_cases():
    judges = ExactJudge(), ChatJudge(Parrot())
    one, other = Case("qa", QUESTION, ("x",)), Case("qa", QUESTION, ("y",))
    for judge in judges:
        assert judge.prompt(one) == judge.prompt(Case("qa", dict(QUESTION), ("x",))) != judge.prompt(other)
    assert judges[1].name == f"parrot:1#{_PROMPTS['version']}"


def test_all_cases_are_judged_and_the_judge_is_closed():
    chat = Parrot(*["{'score': 1}"] * 9)
    cases = [(i, Case("detail", QUESTION, (f"{i}",))) for i in range(9)]
    found = dict(judge_all(ChatJudge(chat), cases))
    assert sorted(found) == list(range(9))
    assert chat.closed


def test_what_no_case_can_cure_is_raised_after_what_was_under_way():
    chat = Parrot("{'score': 1}", InputError("no access."), *["{'score': 1}"] * 9)
    chat.concurrency = 1
    cases = [(i, Case("detail", QUESTION, (f"{i}",))) for i in range(9)]
    found = []
    with pytest.raises(InputError, match="no access"):
        found.extend((key, verdict.status) for key, verdict in judge_all(ChatJudge(chat), cases))
    assert found[0] == (0, "judged")
    assert len(chat.heard) < 5
    assert chat.closed
