import torch

from longvlm.pipeline.vision.pictures import SegmentPictures, distinct_numbers, distinct_pictures, still_frames


def test_frames_that_show_what_the_one_before_shows_are_still():
    shown = [0, 0, 0, 1, 0, 2, 2]
    pixels = torch.zeros(7, 2, 3, 3, dtype=torch.uint8)
    pixels[:, 1, 2, 2] = torch.tensor(shown)  # they differ in the very last byte
    assert still_frames([10, 12, 14, 16, 18, 20, 22], pixels) == {12: 10, 14: 10, 22: 20}
    assert still_frames([], pixels[:0]) == {}


def test_a_still_picture_is_encoded_once_and_stands_in_every_place():
    one_by_one = [SegmentPictures.of(numbers, [0.0] * 3, 1) for numbers in ((0, 1, 2), (3, 4, 5))]
    assert distinct_pictures([one_by_one], [{1: 0, 3: 2}]) == ([[0, 2, 4, 5]], [[0, 0, 1], [1, 2, 3]])
    pairs = [SegmentPictures.of((0, 1, 2, 3), [0.0] * 4, 2)]  # of which the second shows what the first does
    assert distinct_numbers([{"frames": [3, 3, 7]}, {"frames": [7, 5]}]) == [3, 5, 7]
    assert distinct_pictures([pairs, pairs], [{1: 0, 2: 0, 3: 0}, {}]) == ([[0, 1], [0, 1, 2, 3]], [[0, 0], [1, 2]])
