import re

import pytest

from longvlm.pipeline.answering.typed import as_request, read_value
from longvlm.pipeline.judging.agreement import right_value
from longvlm.tinyworld.questions import KINDS, MOTION_ANSWERS, NUMBERS, PLACE_ANSWERS, place_of, with_article
from longvlm.tinyworld.scenes import draw_scene
from longvlm.tinyworld.typed import MOST_CHOICES, TYPED_KINDS, draw_typed

SCENES = [draw_scene(5, number) for number in range(150)]
DRAWN = [draw_typed(scene, 5, number) for number, scene in enumerate(SCENES)]


def of_type(kind_of_answer):
    return [
        (scene, one) for scene, drawn in zip(SCENES, DRAWN, strict=True) for one in drawn if one.type == kind_of_answer
    ]


def test_every_kind_is_asked_as_every_type_that_it_has_and_drawn_the_same_again():
    assert {(one.type, one.kind) for drawn in DRAWN for one in drawn} == {
        (kind_of_answer, kind) for kind_of_answer, kinds in TYPED_KINDS.items() for kind in kinds
    }
    assert set(TYPED_KINDS["bool"]) == set(KINDS) - {"caption"}
    assert draw_typed(SCENES[3], 5, 3) == DRAWN[3]
    few = draw_typed(SCENES[3], 5, 3, {"bool": 4, "choice": 2})
    assert [one.type for one in few] == ["bool"] * 4 + ["choice"] * 2
    assert len({one.kind for one in few if one.type == "bool"}) == 4
    more = draw_typed(SCENES[3], 5, 3, {"bool": 4, "choice": 2}, {"what": 3})
    assert more[: len(few)] == few
    assert [(one.type, one.kind) for one in more[len(few) :]] == [("bool", "what")] * 3


def _infinitive(motion):
    verb, *rest = MOTION_ANSWERS[motion].split()
    return " ".join([verb.removesuffix("s"), *rest])


def _true_statements(scene):
    """All that could be asked of a scene and is so, in the words that questions have."""
    names = [with_article(event.name) for event in scene.events]
    camera = {"still": "stay still", "left": "pan to the left", "right": "pan to the right", "zoom": "zoom in"}
    said = {
        f"do {NUMBERS[len(names)]} objects appear?",
        f"does the camera {camera[scene.camera]}?",
        f"does it take place {PLACE_ANSWERS[scene.place]}?",
        f"does {names[0]} appear first?",
        f"does {names[-1]} appear last?",
        *(f"is there {name}?" for name in names),
        *(f"does the {event.name} {_infinitive(event.motion)}?" for event in scene.events),
        *(f"is the {event.shape} {event.colour}?" for event in scene.events),
        *(f"is the {event.colour} object {with_article(event.shape)}?" for event in scene.events),
        *(f"does {b} come after the {a.name}?" for a, b in zip(scene.events, names[1:], strict=False)),
        *(f"does {a} come before the {b.name}?" for a, b in zip(names, scene.events[1:], strict=False)),
    }
    for segment in range(scene.num_segments):
        event = scene.event_at(segment)
        at = f"{segment * 2 // 60}:{segment * 2 % 60:02}"
        said |= {f"is {with_article(event.name)} seen at {at}?"}
        said |= {f"is the object at {at} in the {place_of(event, segment)}?"}
    return said


def test_a_statement_is_true_where_the_answer_is_yes_and_about_as_often_false():
    asked = of_type("bool")
    for scene, one in asked:
        assert (one.question in _true_statements(scene)) == (one.answer == "yes"), one
    for kind in TYPED_KINDS["bool"]:
        answers = [one.answer for _, one in asked if one.kind == kind]
        assert 0.35 < answers.count("yes") / len(answers) < 0.65, kind


def test_choices_hold_the_right_answer_once_in_any_place_and_in_several_wordings():
    places, numbers = set(), set()
    for _, one in of_type("choice"):
        assert one.choices.count(one.answer) == 1
        assert 2 <= len(one.choices) <= MOST_CHOICES
        assert len({choice.casefold() for choice in one.choices}) == len(one.choices)
        places.add(one.choices.index(one.answer))
        numbers.add(len(one.choices))
    assert places == set(range(MOST_CHOICES))
    assert numbers == set(range(2, MOST_CHOICES + 1))
    of_scene = {one.answer.lower() for _, one in of_type("choice") if one.kind == "scene"}
    assert {"desert", "in the desert"} <= of_scene
    of_what = [one.answer for _, one in of_type("choice") if one.kind == "what"]
    assert any(answer.startswith("a ") for answer in of_what)
    assert any(answer[0].isupper() for answer in of_what)
    assert any(re.fullmatch(r"[a-z]+ [a-z]+", answer) for answer in of_what)


def test_a_number_is_written_in_digits():
    for scene, one in of_type("number"):
        assert (one.kind, one.answer) == ("count", str(len(scene.events)))


@pytest.mark.parametrize("kind_of_answer", list(TYPED_KINDS))
def test_prompts_are_what_answering_asks_and_answers_are_of_their_type(kind_of_answer):
    for _, one in of_type(kind_of_answer)[:50]:
        row = one.as_row()
        request = as_request("key", row)
        assert one.prompt == request.question
        wanted = right_value(row, one.answer)
        assert wanted is not None
        if request.options:
            assert [option.casefold() for option in request.options].count(one.answer.casefold()) == 1
            assert wanted in [read_value(row, option) for option in request.options]
