import hashlib
import json

from longvlm.tinyworld import WORLD_VERSION
from longvlm.tinyworld.questions import KINDS, all_questions, caption, draw_questions, with_article
from longvlm.tinyworld.scenes import draw_scene, random_generator

SCENES = [draw_scene(5, number) for number in range(200)]


def _asked(number):
    return all_questions(SCENES[number], random_generator(5, number, 1))


def test_a_question_about_a_video_has_one_answer():
    for number in range(len(SCENES)):
        answers = {}
        for asked in _asked(number):
            assert answers.setdefault(asked.question, asked.answer) == asked.answer


def test_every_kind_is_asked():
    assert {asked.kind for number in range(20) for asked in _asked(number)} == set(KINDS)


def test_answers_are_what_the_scene_shows():
    for number, scene in enumerate(SCENES):
        by_question = {asked.question: asked.answer for asked in _asked(number)}
        names = [event.name for event in scene.events]
        assert by_question["what appears first?"] == with_article(names[0])
        assert by_question[f"what comes after the {names[0]}?"] == with_article(names[1])
        assert by_question["what is seen at 0:04?"] == with_article(scene.event_at(2).name)
        assert by_question["what happens in the video?"].split(", then ")[0].startswith(with_article(names[0]))
        for event in scene.events:
            assert by_question[f"is there {with_article(event.name)}?"] == "yes"


def test_things_that_are_not_there_are_answered_with_no():
    for number, scene in enumerate(SCENES):
        denied = [asked for asked in _asked(number) if asked.answer == "no"]
        assert len(denied) == len(scene.events)
        assert not {asked.question for asked in denied} & {
            f"is there {with_article(event.name)}?" for event in scene.events
        }


def test_nobody_is_asked_for_a_place_near_a_border():
    asked = [asked for number in range(len(SCENES)) for asked in _asked(number) if asked.kind == "where"]
    assert len(asked) < sum(scene.num_segments for scene in SCENES)
    assert {one.answer for one in asked} == {
        f"{a} {b}" for a in ("upper", "lower") for b in ("left", "center", "right")
    }


def test_kinds_are_drawn_evenly_and_the_same_again():
    drawn = draw_questions(SCENES[0], 5, 0, {"what": 3})
    assert drawn == draw_questions(SCENES[0], 5, 0, {"what": 3})
    counts = {kind: sum(asked.kind == kind for asked in drawn) for kind in KINDS}
    assert counts["what"] == 3
    assert all(count <= 1 for kind, count in counts.items() if kind != "what")
    assert len({asked.question for asked in drawn}) == len(drawn)


def test_this_version_of_the_world_is_frozen():
    """Who changes what a seed shows or asks raises WORLD_VERSION: the model was trained on the world as it was."""
    asked = [[(q.kind, q.question, q.answer) for q in draw_questions(draw_scene(0, n), 0, n)] for n in range(20)]
    scenes = [repr(draw_scene(0, number)) for number in range(20)]
    digest = hashlib.sha256(json.dumps([asked, scenes]).encode()).hexdigest()[:16]
    assert (WORLD_VERSION, digest) == (1, "d8c50a3fb8053ebc")


def test_captions_tell_all_events_in_order():
    assert caption(SCENES[0]).count(", then ") == len(SCENES[0].events) - 1
