import pyarrow as pa
import pytest
import torch

from clips import read_number, write_clip
from longvlm.jobs.choose import choose_index_recipe
from longvlm.jobs.compare.sample import draw, watch_sample
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.pipeline.vision.towers.families import load_tower
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from models import save_llava


def listing(*names):
    uris = [f"/bucket/{name}.mp4" for name in names]
    return pa.Table.from_pylist([{"video_id": uri, "uri": uri} for uri in uris], schema=tables.LISTING)


def questions(*videos):
    rows = [{"question": f"Number {i}?", "type": "text", "video": video} for i, video in enumerate(videos)]
    return pa.Table.from_pylist(rows, schema=tables.QUESTIONS)


def names(drawn):
    return [video["uri"].split("/")[-1][:-4] for video, _ in drawn]


def test_equal_seeds_draw_equal_videos_in_the_order_of_the_listing():
    bucket = listing(*(f"v{i:02}" for i in range(50)))
    drawn, num_elsewhere = draw(bucket, questions(None, None), 5, 0)
    assert num_elsewhere == 0
    assert [places for _, places in drawn] == [[0, 1]] * 5
    assert names(drawn) == sorted(set(names(drawn)))
    assert draw(bucket, questions(None), 5, 0)[0] == [(video, [0]) for video, _ in drawn]
    assert names(draw(bucket, questions(None), 5, 1)[0]) != names(drawn)
    assert len(draw(bucket, questions(None), 500, 0)[0]) == 50


def test_only_videos_that_are_asked_about_are_drawn():
    bucket = listing(*(f"v{i:02}" for i in range(50)))
    drawn, num_elsewhere = draw(bucket, questions("v07", "/bucket/v31.mp4", "nowhere", "v07"), 5, 0)
    assert [(name, places) for name, (_, places) in zip(names(drawn), drawn, strict=True)] == [
        ("v07", [0, 3]),
        ("v31", [1]),
    ]
    assert num_elsewhere == 1
    with pytest.raises(InputError, match="none of the questions is about a video of the source"):
        draw(bucket, questions("nowhere"), 5, 0)
    with pytest.raises(InputError, match="could mean 2 videos"):
        draw(listing("a/v", "b/v"), questions("v"), 5, 0)


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """A recipe of interval segments for a LLaVA's tower, and the tower."""
    model = str(save_llava(tmp_path_factory.mktemp("eyes"), "llava"))
    recipe, _ = choose_index_recipe(None, model, "tiny", None)
    return recipe, load_tower(model)


def one_video(folder):
    return list_source(Source(str(folder))).to_pylist()[0]


@pytest.mark.parametrize("most_frames", [3, 1000])
def test_frames_are_the_recipes_evenly_chosen_with_all_their_patches(tmp_path, eyes, most_frames):
    recipe, tower = eyes
    write_clip(tmp_path / "long.mp4", 75 * 25)  # 150 frames of the recipe, in two units
    (watched,) = watch_sample([one_video(tmp_path)], recipe, tower, most_frames)
    number = min(most_frames, 150)
    assert watched.frames.shape == (number, 56, 56, 3)
    shown = [read_number(frame.numpy()) for frame in watched.frames]
    assert shown == watched.whole.spans[::16, 0].tolist()
    assert shown == sorted(shown)
    steps = torch.tensor([0, *shown, 75 * 25]).diff()
    assert steps[1:-1].max() - steps[1:-1].min() <= 15
    assert watched.whole.num_whole_frames == number
    patches = tower.encode(watched.frames, recipe.feature_layer, 0).patches.flatten(0, 1)
    torch.testing.assert_close(watched.whole.local.float(), patches, atol=1e-2, rtol=1e-3)
    assert watched.tokens.counts == (8,) * 37 + (8,)
    assert (watched.tokens.num_global_tokens, watched.whole.num_global_tokens) == (0, 0)


def test_without_frames_there_are_tokens_alone_and_a_broken_video_has_its_code(tmp_path, eyes):
    write_clip(tmp_path / "a.mp4", 50)
    (tmp_path / "b.mp4").write_bytes(b"")
    write_clip(tmp_path / "c.mp4", 25)
    videos = list_source(Source(str(tmp_path))).to_pylist()
    first, broken, last = watch_sample(videos, *eyes, 0)
    for watched, number in ((first, 4), (last, 2)):
        assert (len(watched.frames), watched.whole) == (0, None)
        assert watched.tokens.num_frames == (number,)
    assert isinstance(broken, TerminalError)
    assert broken.code == ErrorCode.EMPTY_FILE
