"""A handle on a store for notebooks and pipelines: SQL, tables, tokens, search and answers, as Arrow and numpy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longvlm.jobs.query.sql import find_live, run_sql
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_segments, read_tokens
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import Focus, Precision

if TYPE_CHECKING:
    import pandas as pd

    from longvlm.jobs.serve.frame import VideoFrame
    from longvlm.pipeline.vision.tokens import VideoTokens

_HIT = pa.schema(
    [
        ("uri", pa.string()),
        ("external_id", pa.string()),
        ("segment", pa.int32()),  # of the best moment
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("best_s", pa.float64()),
        ("score", pa.float64()),
    ]
)
_VERIFIED_HIT = _HIT.append(pa.field("yes", pa.float64()))


@dataclass(frozen=True, eq=False)
class StoredTokens:
    """The tokens of one video as stored, in time order: N local ones of width D, and G global ones.

    The arrays are views of what was read and cannot be written to.
    """

    uri: str
    write_id: str  # of the indexing that made them
    segments: pa.Table  # rows of the table `segments`, without search embeddings
    torch: "VideoTokens"  # the same as torch tensors, with all that answering knows of them

    @property
    def local(self) -> npt.NDArray[np.float16]:
        """[N, D]: patch tokens after merging."""
        return self._view(self.torch.local)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """[N]: how many patch tokens were merged into each."""
        return self._view(self.torch.sizes)

    @property
    def spans(self) -> npt.NDArray[np.int64]:
        """[N, 2]: first and last frame number that each draws on, inclusive."""
        return self._view(self.torch.spans)

    @property
    def segment_of(self) -> npt.NDArray[np.int64]:
        """[N]: the row of `segments` that each belongs to."""
        return np.repeat(np.arange(len(self.torch.counts)), self.torch.counts)

    @property
    def global_tokens(self) -> npt.NDArray[np.float32]:
        """[G, D]: CLS of the last layers, mean over all frames; G is 0 where the recipe keeps none."""
        return self._view(self.torch.global_tokens)

    @staticmethod
    def _view(tensor: Any) -> Any:
        array = tensor.numpy().view()
        array.flags.writeable = False
        return array


class VideoIndex:
    """What is known of the videos of a source. Every method looks at the store as it is when it is called.

    Args:
        store: folder or bucket prefix that holds the tables.

    Raises:
        InputError: there is no store.
    """

    def __init__(self, store: str) -> None:
        self.store = Store.open(store).uri

    def __repr__(self) -> str:
        return f"longvlm.open({self.store!r})"

    def sql(self, query: str, attach: Iterable[str] = ()) -> pa.Table:
        """The result of one SELECT over the views, which are those of `longvlm sql`.

        Args:
            query: it reads the store and what is attached, and changes nothing.
            attach: parquet, CSV, JSON or DuckDB files, each as NAME=FILE.

        Raises:
            InputError: the query cannot run, or a file cannot be attached.
        """
        return run_sql(self.store, query, attach)

    def videos(self, where: str | None = None) -> pa.Table:
        """The view `videos`, a row a video: the live one, or else what it failed of.

        Args:
            where: only rows for which this SQL predicate holds.

        Raises:
            InputError: the predicate cannot run.
        """
        return self._view("videos", where)

    def segments(self, where: str | None = None) -> pa.Table:
        """The view `segments`, a row a segment of a live video; see `videos`."""
        return self._view("segments", where)

    def answers(self, where: str | None = None) -> pa.Table:
        """The view `answers`, a row for each question and live video; see `videos`."""
        return self._view("answers", where)

    def tokens(self, video: str) -> StoredTokens:
        """The stored tokens of a live video.

        Args:
            video: its uri, external_id, path, file name or stem.

        Raises:
            InputError: no live video answers to the name, or several do.
            TerminalError: its stored tokens are damaged.
        """
        from longvlm.pipeline.vision.tokens import from_arrow

        snapshot = Store.open(self.store).pin()
        uri, write_id = find_live(snapshot, video)
        segments = read_segments(snapshot, [write_id])
        return StoredTokens(uri, write_id, segments, from_arrow(read_tokens(snapshot, [write_id])))

    def show(self, video: str, start_s: float | None = None) -> "VideoFrame":
        """A live video in a notebook: player, time bar, evidence and answers, at a second of it.

        Its page is served on the loopback, by a thread that ends with the kernel; print it for the address.

        Args:
            video: its uri, external_id, path, file name or stem.
            start_s: where the player stands, in seconds; None: at the beginning.

        Raises:
            InputError: no live video answers to the name, several do, or the extra `serve` is not installed.
        """
        if find_spec("starlette") is None or find_spec("uvicorn") is None:
            raise InputError("show needs starlette and uvicorn; pip install 'longvlm-index[serve]'.")
        from longvlm.jobs.serve.frame import show_video

        _, write_id = find_live(Store.open(self.store).pin(), video)
        return show_video(self.store, write_id, start_s)

    def search(
        self,
        text: str,
        *,
        limit: int = 10,
        where: str | None = None,
        verify: str | None = None,
        model: str | None = None,
    ) -> pa.Table:
        """The moments that look most like a text, best first: uri, external_id, segment, times and score.

        Args:
            text: in the words of the tower's text encoder.
            limit: how many hits.
            where: only of videos for which this predicate over the view `videos` holds.
            verify: a question that a model answers from the tokens around each hit; `yes` is the likelihood of its yes.
            model: which one, if not that which the store remembers.

        Raises:
            InputError: the store is empty, its tower has no text encoder, the predicate cannot run, or the model cannot
                answer.
        """
        from longvlm.jobs.query.search import SearchOrder, find_moments

        found = find_moments(SearchOrder(self.store, text, limit, where, verify, model))
        return pa.Table.from_pylist(found.hits, schema=_HIT if verify is None else _VERIFIED_HIT)

    def ask(
        self,
        questions: "str | pa.Table | pd.DataFrame",
        *,
        kind: str = "text",
        choices: Sequence[str] = (),
        model: str | None = None,
        where: str | None = None,
        limit: int | None = None,
        budget: int | None = None,
        tokens_per_segment: int | None = None,
        focus: Focus | None = None,
        precision: Precision = "bfloat16",
        max_new_tokens: int = 256,
        ray_address: str | None = None,
    ) -> pa.Table:
        """Answers to one question or a table of them, as rows of the table `answers`; what was answered is not asked.

        Args:
            questions: one, about every selected video; or rows as in a question file of `longvlm answer`.
            kind: of one question: text, bool, choice, number or json.
            choices: of one question of the kind choice.
            model: folder or hub id of a model, or tinyworld; None: what the store remembers.
            where: only videos for which this predicate over the view `videos` holds.
            limit: at most so many videos.
            budget: most visual tokens of a video; None: as stored, or what the model's context holds.
            tokens_per_segment: most visual tokens of a segment.
            focus: what gives way to the budget: all alike, what is far from the question, or as each question has it.
            precision: of the model.
            max_new_tokens: of an answer.
            ray_address: a Ray cluster; None: RAY_ADDRESS or a local Ray; "none": this process alone.

        Raises:
            InputError: the questions, model, predicate or budget cannot be used; nothing is written.
            RuntimeError: the run stopped early; what was answered by then is in the store.
        """
        from longvlm.jobs.answer.run import AnswerOrder, run_answer
        from longvlm.pipeline.answering.questions import ask, check_questions

        asked = ask(questions, kind, choices) if isinstance(questions, str) else check_questions(questions)
        order = AnswerOrder(
            self.store,
            asked,
            model=model,
            where=where,
            limit=limit,
            budget=budget,
            tokens_per_segment=tokens_per_segment,
            focus=focus,
            precision=precision,
            max_new_tokens=max_new_tokens,
            ray_address=ray_address,
        )
        report = run_answer(order)
        if report.stopped:
            raise RuntimeError(
                f"stopped ({report.stopped}); what was answered is kept, the same call goes on from there."
            )
        return pa.Table.from_pylist(list(report.rows()), schema=tables.ANSWERS)

    def _view(self, name: str, where: str | None) -> pa.Table:
        return run_sql(self.store, f"FROM {name}" if where is None else f"FROM {name} WHERE (\n{where}\n)")
