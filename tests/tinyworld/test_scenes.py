import pytest

from longvlm.tinyworld.scenes import CAMERAS, HIGH_Y, LOW_Y, MOTIONS, PLACES, SHAPES, draw_scene


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(3, number) for number in range(300)]


def test_a_seed_draws_the_same_scene_again_and_others_draw_others():
    assert draw_scene(3, 7) == draw_scene(3, 7)
    assert len({str(draw_scene(seed, number)) for seed in range(4) for number in range(25)}) == 100


def test_events_follow_each_other_without_gaps_and_last_three_segments_at_least(scenes):
    for scene in scenes:
        assert 2 <= len(scene.events) <= 4
        assert [event.start for event in scene.events] == [0, *(event.end for event in scene.events[:-1])]
        assert all(event.end - event.start >= 3 for event in scene.events)
        assert scene.num_segments <= 12


def test_no_object_appears_twice(scenes):
    for scene in scenes:
        assert len({event.name for event in scene.events}) == len(scene.events)


def test_every_property_takes_all_its_values(scenes):
    events = [event for scene in scenes for event in scene.events]
    assert {scene.place for scene in scenes} == set(PLACES)
    assert {scene.camera for scene in scenes} == set(CAMERAS)
    assert {event.motion for event in events} == set(MOTIONS)
    assert {event.shape for event in events} == set(SHAPES)


def test_objects_move_as_they_are_said_to(scenes):
    for event in (event for scene in scenes for event in scene.events):
        (x, y, radius), (to_x, to_y, to_radius) = event.at(event.start), event.at(event.end)
        moved = {
            "left": x - to_x,
            "right": to_x - x,
            "up": y - to_y,
            "down": to_y - y,
            "grows": to_radius - radius,
            "shrinks": radius - to_radius,
        }
        assert moved.pop(event.motion, 1) > 0.1
        assert all(abs(way) < 1e-9 for name, way in moved.items() if name not in _opposites(event.motion))
        assert min(y, to_y) >= LOW_Y
        assert max(y, to_y) <= HIGH_Y


def _opposites(motion):
    pairs = ({"left", "right"}, {"up", "down"}, {"grows", "shrinks"})
    return next((pair for pair in pairs if motion in pair), set())


def test_a_camera_that_pans_to_the_right_moves_the_house_to_the_left(scenes):
    for scene in scenes:
        (x, half), (to_x, to_half) = scene.house_at(0), scene.house_at(scene.num_segments)
        expected = {"still": (0, 0), "left": (1, 0), "right": (-1, 0), "zoom": (0, 1)}[scene.camera]
        assert (_sign(to_x - x), _sign(to_half - half)) == expected


def _sign(value):
    return 0 if abs(value) < 1e-9 else 1 if value > 0 else -1
