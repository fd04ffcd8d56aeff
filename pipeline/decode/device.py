"""A GPU's own video decoder (NVDEC): whether there is one, and what it may be asked to decode.

FFmpeg's decoders stay at work: stamps, the order of frames and what is passed over are theirs, and only the pictures
are made on the card. They come back as NV12, of which the scaler makes what it makes of the CPU's: the standards of
these codecs say what each bit of a picture is. It runs in the decoder's child, on the device that its worker was given.
Never tried on a GPU so far.
"""

from typing import Any, Literal

Device = Literal["cpu", "cuda"]
CODECS = ("h264", "hevc", "vp9")  # pictures are defined to the bit; AV1 too, but cards of data centres lack it
FORMATS = ("yuv420p", "yuvj420p", "yuv420p10le")  # what such cards have of them
# The process's one context: a video's own would take half a second and 300 MB.
_PRIMARY: dict[str, object] = {"primary_ctx": "1"}


class DeviceDecoder:
    """The GPU's decoder, held for as long as a process lives; `missing` says why there is none, if so."""

    def __init__(self) -> None:
        from av.codec import CodecContext

        self.missing: str | None = None
        self._held: Any = None  # keeps the context from being made anew for every video
        try:
            self._held = CodecContext.create("h264", "r", hwaccel())
        except (OSError, RuntimeError, NotImplementedError) as error:  # FFmpeg's are the one or the other
            self.missing = f"no device: {getattr(error, 'strerror', None) or error}"

    def refuses(self, codec: str, pixels: str | None, *, is_interlaced: bool) -> str | None:
        """Why a stream is to be decoded on the CPU, in a word or two; None where it is not.

        Args:
            codec: its name.
            pixels: the name of their format, on the CPU.
            is_interlaced: a packet may be a field.
        """
        if self.missing:
            return self.missing
        if codec not in CODECS:
            return f"codec {codec}"
        if pixels not in FORMATS:
            return f"pixels {pixels}"
        return "interlaced" if is_interlaced else None


def hwaccel() -> Any:
    """What opens a file for the GPU's decoder, and for nothing else."""
    from av.codec.hwaccel import HWAccel

    return HWAccel("cuda", allow_software_fallback=False, options=_PRIMARY)
