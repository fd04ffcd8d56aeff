"""Image preprocessing: decoded frames to a tower's input, exactly as its image processor does (LONGVLM.md, 2).

Torch, whose import takes seconds, is loaded with the first frames: who plans a run only reads the settings.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from longvlm.pipeline.model_folder import read_json
from longvlm.schemas.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROCESSOR = "preprocessor_config.json"
# Where transformers keeps how frames are prepared: a video model's own settings first; its fifth version writes those
# of all kinds into one file.
_PLACES = (
    ("video_preprocessor_config.json", None),
    ("processor_config.json", "video_processor"),
    (PROCESSOR, None),
    ("processor_config.json", "image_processor"),
)


@dataclass(frozen=True)
class Normalisation:
    """The normalisation of RGB bytes for a tower; read from the model's processor file."""

    rescale: float  # uint8 times this, before mean and std
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> "Normalisation":
        """Read a model folder's processor file (one of `_PLACES`).

        Raises:
            InputError: it is missing, or lacks something.
        """
        _, raw = _settings(folder, "image_mean", "image_std")
        return cls(raw.get("rescale_factor", 1 / 255), tuple(raw["image_mean"]), tuple(raw["image_std"]))

    def apply(self, frames: "Tensor", device: "torch.device", dtype: "torch.dtype") -> "Tensor":
        """Normalise frames uint8 [F, h, w, 3] on the CPU -> [F, 3, h, w] on the device.

        Bytes travel, from pinned memory (frames that lie there already are not copied into it once more), while the
        device computes and without the host's waiting; converting and normalising happens on the device, in float32.
        """
        import torch

        from longvlm.pipeline.transfer import to_device_beside

        frames = to_device_beside(frames, device).permute(0, 3, 1, 2)
        shift, scale = _shift_and_scale(self, device)
        return torch.addcmul(shift, frames.float(), scale).to(dtype)


@dataclass(frozen=True)
class Pixels:
    """The preprocessing of square RGB frames for a tower; read from the model's processor file."""

    resize_px: int  # frames of another size than `image_size` are resized to this, then cut to `image_size`
    image_size: int  # what the tower takes
    resample: int  # a PIL filter
    normalisation: Normalisation

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> "Pixels":
        """Read a model folder's processor file (one of `_PLACES`).

        Raises:
            InputError: it is missing, lacks something, or makes another size than the tower takes.
        """
        path, raw = _settings(folder, "image_mean", "image_std", "size")
        resize_px = _side(raw["size"])
        result_px = _side(raw["crop_size"]) if raw.get("do_center_crop") and raw.get("crop_size") else resize_px
        if result_px != image_size:
            raise InputError(
                f"{path} makes images of {result_px} px, but the tower beside it takes {image_size} px; "
                "use the processor file that belongs to this tower."
            )
        resample = raw.get("resample", Image.Resampling.BICUBIC)
        return cls(resize_px, image_size, resample, Normalisation.from_folder(folder))

    def prepare(self, frames: "Tensor", device: "torch.device", dtype: "torch.dtype") -> "Tensor":
        """Preprocess frames uint8 [F, px, px, 3] on the CPU -> [F, 3, image_size, image_size] on the device.

        Frames that have the tower's size already are only normalised, see `Normalisation.apply`.
        """
        if frames.shape[1:3] != (self.image_size, self.image_size):
            frames = self._resize(frames)
        return self.normalisation.apply(frames, device, dtype)

    def _resize(self, frames: "Tensor") -> "Tensor":
        """PIL's filter frame by frame, since its rounding is what the reference has, then the centre."""
        import torch

        size = (self.resize_px, self.resize_px)
        filter_ = Image.Resampling(self.resample)
        resized = np.stack([np.asarray(Image.fromarray(frame).resize(size, filter_)) for frame in frames.numpy()])
        cut = (self.resize_px - self.image_size) // 2
        return torch.from_numpy(resized[:, cut : cut + self.image_size, cut : cut + self.image_size].copy())


def _settings(folder: Path, *needed: str) -> tuple[Path, dict[str, Any]]:
    """The processor's settings, and the file they stand in; InputError unless they are there."""
    path, raw = _found_settings(folder)
    if missing := [key for key in needed if not raw.get(key)]:
        raise InputError(f"{path} lacks {', '.join(missing)}; copy it again from the model.")
    return path, raw


def _found_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    for name, part in _PLACES:
        if (folder / name).is_file():
            raw = read_json(folder, name)
            if part is None or part in raw:
                return folder / name, raw if part is None else raw[part]
    return folder / PROCESSOR, read_json(folder, PROCESSOR)  # raises, naming the file that every tower comes with


@functools.cache
def _shift_and_scale(norm: Normalisation, device: "torch.device") -> tuple["Tensor", "Tensor"]:
    """What (x * rescale - mean) / std adds to and multiplies x by, [3, 1, 1] each."""
    import torch

    from longvlm.pipeline.transfer import to_device

    mean, std = (torch.tensor(values)[:, None, None] for values in (norm.mean, norm.std))
    return to_device(-mean / std, device), to_device(norm.rescale / std, device)


def _side(size: int | dict[str, int]) -> int:
    """The side of a square in the notations that processor files use; 0 for what is not square."""
    if isinstance(size, int):
        return size
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return size["height"] if size.get("height") == size.get("width") else 0
