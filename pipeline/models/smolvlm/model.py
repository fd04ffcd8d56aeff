"""SmolVLM2 when answering: its language model over what its connector made of a video.

The prompt says how many frames there are, in words, and how long the video is; each run of tokens stands behind `Frame
from 00:12:`, between marks. As long as nothing is merged a run is a frame, and prompts are transformers' own, token by
token. Once tokens are merged a run is a segment, with the middle of its time, and the number in words is that of runs.
"""

from dataclasses import dataclass
from datetime import timedelta

from longvlm.pipeline.models.contract import ModelSpec
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.row_layout import TokenBlock, timed_runs
from longvlm.pipeline.models.smolvlm.checkpoint import FAKE, GLOBAL, SmolCheckpoint
from longvlm.pipeline.models.smolvlm.words import in_words
from longvlm.pipeline.models.timed_model import TimedModel
from longvlm.pipeline.models.timed_prompt import TimedPrompt
from longvlm.schemas.recipe import Precision


@dataclass(frozen=True, eq=False)
class SmolModel(TimedModel):
    """A loaded SmolVLM2, without its tower and connector."""

    def blocks(self, prefix: VideoPrefix) -> list[TokenBlock]:
        """See `time_blocks`."""
        return time_blocks(self.prompt, prefix)

    def num_text_rows(self, start_s: float, end_s: float) -> int:
        """Of the longer of its two times, and the mark after it."""
        return 1 + max(len(self.prompt.encode(_time_text(time_s))) for time_s in (start_s, end_s))


def time_blocks(prompt: TimedPrompt, prefix: VideoPrefix) -> list[TokenBlock]:
    """Each run of a video's tokens behind its time, between marks; the first one after what is said of the video.

    Raises:
        ValueError: the prefix does not say when its tokens were seen.
    """
    runs = timed_runs(prefix)
    assert prefix.times is not None, "`timed_runs` has seen to it"
    length = timedelta(seconds=int(max(prefix.times.ends_s)))
    lead = (
        f"{prompt.gap}You are provided the following series of {in_words(len(runs))} frames from a {length} [H:MM:SS] "
        "video.\n"
    )
    found, after = [], prompt.encode(FAKE)
    for run in runs:
        found.append(TokenBlock(run.num_tokens, prompt.encode(f"{lead}{_time_text(run.time_s)}"), after))
        lead = ""
    return found


def _time_text(time_s: float) -> str:
    """What stands before a frame's tokens."""
    return f"\nFrame from {int(time_s // 60):02}:{int(time_s % 60):02}:{FAKE}{GLOBAL}"


def describe_smol(model: str) -> ModelSpec:
    """See `TimedCheckpoint.describe`."""
    return SmolCheckpoint.find(model).describe()


def load_smol(model: str, precision: Precision = "float32", device: str = "cpu") -> SmolModel:
    """See `TimedCheckpoint.load`."""
    return SmolModel(**SmolCheckpoint.find(model).load(precision, device))
