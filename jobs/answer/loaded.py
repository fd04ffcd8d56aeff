"""A model that stays loaded in this process and answers from stored tokens, for whoever asks now and then and waits."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from longvlm.jobs.answer.options import check_vocabulary
from longvlm.jobs.answer.plan import HASH
from longvlm.jobs.answer.run import AnswerOrder, recipe_for
from longvlm.jobs.answer.stage import Answerer
from longvlm.jobs.answer.terms import AnswerTerms
from longvlm.jobs.choose import choose_answer_model
from longvlm.jobs.cluster.executor import InProcess
from longvlm.jobs.cluster.resources import for_answer
from longvlm.pipeline.models.families import load_model
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.recipe import AnswerRecipe, Precision
from longvlm.schemas.tables import AskedQuestion, GroupRow

_VIDEOS_A_TURN = 4  # in the engine together; between turns the clock is looked at
_ASKED = """
SELECT coalesce(question_id, id_of("type", choices, "schema", question)) AS question_id, question,
    hash_of("type", choices, "schema", question) AS question_hash, "type", choices, "schema"
FROM given
"""


class LoadedModel:
    """A language model in memory, and the stored recipe whose tokens it reads.

    Args:
        store: whose tokens.
        model: folder or hub id, or tinyworld; None: what the store remembers.
        precision: of the model.

    Raises:
        InputError: the store holds nothing yet, no model can answer, or no recipe of the store fits it.
    """

    def __init__(self, store: Store, model: str | None, precision: Precision = "bfloat16") -> None:
        self.spec, self.stored = choose_answer_model(store, model)
        self.precision: Precision = precision
        self.resources = for_answer(InProcess().resources(), 1)
        self.model = load_model(self.spec.name, precision, "cuda" if self.resources.gpus else "cpu")

    def recipe(self) -> AnswerRecipe:
        """How it answers where nobody says otherwise: as `longvlm answer` does."""
        order = AnswerOrder("", tables.QUESTIONS.empty_table(), precision=self.precision)
        return recipe_for(order, self.spec, self.stored)

    def asked(self, question: pa.Table) -> AskedQuestion:
        """A question as it stands in answers, with its id and hash.

        Args:
            question: one row of tables.QUESTIONS.

        Raises:
            InputError: the model's vocabulary cannot spell its answer.
        """
        with duckdb.connect() as con:
            con.execute(HASH)
            con.register("given", question)
            (asked,) = con.sql(_ASKED).to_arrow_table().to_pylist()
        if asked["type"] in ("number", "json"):
            check_vocabulary(self.spec, [(asked["type"], asked["schema"], asked["question"])])
        found: AskedQuestion = asked
        return found

    def answers(
        self, snapshot: Snapshot, run_id: str, question: AskedQuestion, videos: Sequence[dict[str, Any]], end_s: float
    ) -> Iterator[dict[str, Any]]:
        """Rows of tables.ANSWERS, one a video, as they come; none of those whose turn has not come at the end.

        Args:
            snapshot: from `Store.pin`.
            run_id: that stands in the rows.
            question: from `asked`.
            videos: live under the recipe `stored`: video_id, uri and write_id.
            end_s: by `time.monotonic`; what has begun by then is ended.
        """
        terms = AnswerTerms(self.recipe(), self.spec.sight, snapshot, run_id, None)
        answerer = Answerer(terms, InProcess().start_tally(run_id), self.resources, self.model)
        groups = [
            GroupRow(video_id=video["video_id"], uri=video["uri"], write_id=video["write_id"], questions=[question])
            for video in videos
        ]
        for start in range(0, len(groups), _VIDEOS_A_TURN):
            if time.monotonic() > end_s:
                return
            for found in answerer(pa.Table.from_pylist(groups[start : start + _VIDEOS_A_TURN], tables.GROUPS)):
                yield from found.to_pylist()
