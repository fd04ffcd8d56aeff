"""How a video is shown for each of its questions: within the budget, and with the focus that was asked for."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from longvlm.jobs.stored_videos import StoredVideo
from longvlm.pipeline.answering.about import around, asked_about, is_of_a_moment, near_text, near_times, times_named
from longvlm.pipeline.vision.budget import Budget, fit
from longvlm.pipeline.vision.focus import Layout, coarsened, gives_way, lay_out, show
from longvlm.pipeline.vision.text_encoder import TextEncoder
from longvlm.pipeline.vision.tokens import VideoTokens
from longvlm.schemas.errors import ErrorCode, PipelineError, TerminalError
from longvlm.schemas.recipe import Focus

_CACHED_TEXTS = 10_000  # questions about all videos come up again and again


@dataclass(frozen=True, eq=False)
class VideoView:
    """A video as some questions see it."""

    tokens: VideoTokens
    focus: Focus | None  # what gave way: even or question; None where nothing had to
    kept: tuple[int, ...] | None  # of focus question: the segments that are shown as stored


class Viewer:
    """Shows videos within a budget.

    Args:
        focus: what gives way to it.
        texts: encoder of questions, for a focus that follows them; None where the tower has none.
    """

    def __init__(self, focus: Focus | None, texts: TextEncoder | None) -> None:
        self.focus = focus
        self.reads_vectors = texts is not None
        self._encoded = lru_cache(_CACHED_TEXTS)(lambda text: texts.encode([text])[0]) if texts else None

    def views(
        self, video: StoredVideo, budget: Budget, questions: Sequence[str]
    ) -> Iterator[tuple[VideoView | PipelineError, list[int]]]:
        """What questions see of a video, or why they cannot be asked, and the places of those that see the same."""
        places: dict[Layout | None, list[int]] = defaultdict(list)
        follows = self.focus in ("question", "auto") and gives_way(video.tokens, budget)
        for place, question in enumerate(questions):
            try:
                layout = self._layout(video, budget, question) if follows else None
            except TerminalError as error:
                yield error, [place]
            else:
                places[layout].append(place)
        coarse = coarsened(video.tokens, budget) if any(places) else None
        for layout, some in places.items():
            if layout is not None and coarse is not None:
                yield VideoView(show(video.tokens, coarse, layout, budget), "question", layout.kept), some
                continue
            try:
                fitted = fit(video.tokens, budget)
            except TerminalError as error:
                yield error, some
            else:
                yield VideoView(fitted, None if fitted is video.tokens else "even", None), some

    def _layout(self, video: StoredVideo, budget: Budget, question: str) -> Layout | None:
        """How a question sees a video; None where all of it is shown alike.

        Raises:
            TerminalError: (bad_tokens) a segment has no search vector, and the focus is to follow the question.
        """
        if times_s := times_named(question, video.segments[-1]["end_s"]):
            return lay_out(video.tokens, budget, near_times(times_s, video.segments))
        if self._encoded is None or video.vectors is None:
            if self.focus == "auto":
                return None
            raise TerminalError(ErrorCode.BAD_TOKENS, "a segment has no search vector; ask with --focus even.")
        nearness = near_text(video.vectors, self._encoded(asked_about(question)))
        if self.focus == "auto" and not is_of_a_moment(question, nearness):
            return None
        return lay_out(video.tokens, budget, around(question, nearness))
