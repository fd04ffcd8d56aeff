"""Search for the page of that name: a text, and the moments of the pinned store that are nearest to it."""

import threading
from dataclasses import asdict
from typing import TYPE_CHECKING

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.serve.library import PinnedStore, Row, waiting
from longvlm.schemas.errors import InputError

if TYPE_CHECKING:
    from longvlm.pipeline.vision.text_encoder import TextEncoder

MAX_HITS = 24
MAX_TEXT = 500  # characters


class MomentSearch:
    """Search over all moments, one text at a time. The text encoder is loaded for the first, and kept."""

    def __init__(self) -> None:
        self._turn = threading.BoundedSemaphore(SERVE.searches_at_once)
        self._encoder: tuple[str, TextEncoder] | None = None  # the tower that it is of

    def find(self, pinned: PinnedStore, text: str) -> list[Row]:
        """The hits, best first, as `longvlm search` finds them: uri, external_id, write_id, times and score.

        Raises:
            InputError: the store is empty, its tower has no text encoder, or the text is too long.
            BusyError: others search already.
        """
        from longvlm.jobs.query.search import nearest_moments

        if len(text) > MAX_TEXT:
            raise InputError(f"that text is too long; say it in {MAX_TEXT} characters.")
        with waiting(self._turn):
            encoder = self._encoder_of(pinned.tower)
            return [asdict(hit) for hit in nearest_moments(pinned.snapshot, encoder, text, MAX_HITS).rows]

    def _encoder_of(self, tower: str) -> "TextEncoder":
        from longvlm.pipeline.vision.text_encoder import load_text_encoder

        if self._encoder is None or self._encoder[0] != tower:
            self._encoder = (tower, load_text_encoder(tower))
        return self._encoder[1]
