import numpy as np
import pytest

from longvlm.pipeline.decode.video import close_video, decode, probe
from longvlm.tinyworld.render import FPS, GROUNDS, PAINTS, SIDE, SKIES, draw_frame, pixel_masks, write_video
from longvlm.tinyworld.scenes import SEGMENT_S, draw_scene

SCENES = [draw_scene(4, number) for number in range(40)]


@pytest.mark.parametrize("scene", SCENES[:10], ids=range(10))
def test_what_is_covered_by_the_object_has_its_colour(scene):
    for segment in range(scene.num_segments):
        frame, event = draw_frame(scene, segment + 0.5), scene.event_at(segment)
        thing, house, _ = pixel_masks(scene, segment + 0.5)
        expected = np.clip(np.array(PAINTS[event.colour]) * scene.brightness, 0, 255)
        assert np.abs(frame[thing == 1] - expected).max() <= 1
        assert 0.01 < thing.mean() < 0.15
        assert house.sum() > 0


def test_sky_and_ground_are_the_places():
    for scene in SCENES:
        frame = draw_frame(scene, 0.5) / scene.brightness
        assert np.abs(frame[0, 0] - SKIES[scene.place]).max() < 12
        assert np.abs(frame[-1, 0] - GROUNDS[scene.place]).max() < 12


def test_a_file_holds_the_frames_that_were_drawn(tmp_path):
    scene = SCENES[0]
    write_video(tmp_path / "a.mp4", scene)
    path = str(tmp_path / "a.mp4")
    video = probe(path)
    assert video.num_frames == scene.num_segments * SEGMENT_S * FPS
    assert (video.height, video.width, video.fps) == (SIDE, SIDE, FPS)
    numbers = [0, video.num_frames // 2, video.num_frames - 1]
    for number, frame in zip(numbers, decode(path, numbers, (SIDE, SIDE)).frames, strict=True):
        drawn = draw_frame(scene, (number + 0.5) / (SEGMENT_S * FPS))
        assert np.abs(frame.astype(int) - drawn).mean() < 5
    close_video()
