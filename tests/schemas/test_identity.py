import time
import uuid

from longvlm.schemas.identity import new_write_id, video_id


def test_write_ids_are_uuid7_and_follow_time():
    first = new_write_id()
    time.sleep(0.002)
    second = new_write_id()
    assert first < second
    assert uuid.UUID(first).version == 7
    assert uuid.UUID(first).variant == uuid.RFC_4122


def test_a_video_is_its_uri():
    assert video_id("/a.mp4") == video_id("/a.mp4") != video_id("/b.mp4")
