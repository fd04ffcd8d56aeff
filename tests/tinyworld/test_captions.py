from longvlm.tinyworld.captions import timed_captions
from longvlm.tinyworld.questions import place_of
from longvlm.tinyworld.scenes import draw_scene

SCENES = [draw_scene(5, number) for number in range(200)]


def test_every_segment_has_a_caption_of_its_own_time():
    for scene in SCENES:
        told = timed_captions(scene)
        assert [at_s for at_s, _ in told] == list(range(0, 2 * scene.num_segments, 2))
        for segment, (_, text) in enumerate(told):
            assert text.startswith(f"{scene.event_at(segment).name} {place_of(scene.event_at(segment), segment)} ")


def test_a_caption_names_the_event_before():
    for scene in SCENES:
        told = [text for _, text in timed_captions(scene)]
        assert not any("former" in text for text in told[: scene.events[0].end])
        for earlier, event in zip(scene.events, scene.events[1:], strict=False):
            for text in told[event.start : event.end]:
                assert f" former{earlier.colour} former{earlier.shape} " in text


def test_words_of_a_movement_change_with_it():
    for scene in SCENES:
        told = [text.split() for _, text in timed_captions(scene)]
        for event in scene.events:
            first, last = told[event.start], told[event.end - 1]
            for place, motions in {4: {"left", "right"}, 5: {"up", "down"}, 6: {"grows", "shrinks"}}.items():
                assert (first[place] != last[place]) == (event.motion in motions)
