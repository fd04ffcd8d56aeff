"""Who is who: ids of videos and of the writes that produced their tokens."""

import hashlib
import os
import time
import uuid

from longvlm.schemas import clock


def video_id(uri: str) -> str:
    """The id of the video at a canonical URI: 128 bits of SHA-256, hex."""
    return hashlib.sha256(uri.encode()).hexdigest()[:32]


def new_write_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): ordered by the millisecond it was made in."""
    unix_ms = clock.now_ms()
    random = int.from_bytes(os.urandom(10), "big")
    value = (unix_ms & (1 << 48) - 1) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def new_run_id() -> str:
    """A short sortable id for one run of a job, such as `20261122T115424-3f9a1c`."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(clock.now_s())) + "-" + os.urandom(3).hex()
