"""Units of frames for tests, as the decode stage hands them on."""

import numpy as np
import pyarrow as pa

from longvlm.schemas import tables


def frames_table(*units: dict) -> pa.Table:
    """FRAMES rows; each unit gives `frames` (uint8 [F, px, px, 3]) and the frame numbers of its `segments`."""
    rows = []
    for i, unit in enumerate(units):
        frames = unit.pop("frames", None)
        segments = [
            {"segment": s, "start_s": float(s), "end_s": s + 1.0, "frames": list(numbers)}
            for s, numbers in enumerate(unit.pop("segments", []))
        ]
        row = {"video_id": f"video{i}", "write_id": f"write{i}", "unit": 0, "num_units": 1, "decode_ms": 1.0}
        row |= {"num_segments": len(segments), "segments": segments}
        if frames is not None:
            row |= {"frames": np.ascontiguousarray(frames).tobytes(), "frame_px": frames.shape[1]}
        rows.append({**row, **unit})
    return pa.Table.from_pylist(rows, schema=tables.FRAMES)


def segment_numbers(num_frames: int, per_segment: int) -> list[list[int]]:
    """Frame numbers 0, 3, 6, ... cut into segments, the last perhaps shorter."""
    numbers = list(range(0, 3 * num_frames, 3))
    return [numbers[i : i + per_segment] for i in range(0, num_frames, per_segment)]
