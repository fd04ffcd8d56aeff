"""Search for the page of that name: a text, and the moments of the pinned store that are nearest to it."""

import threading
from typing import TYPE_CHECKING

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.serve.own_sql import segments_of_own
from longvlm.jobs.serve.pinned import PinnedStore, waiting
from longvlm.schemas.errors import InputError

if TYPE_CHECKING:
    from longvlm.pipeline.store.query.search import Hit
    from longvlm.pipeline.vision.text_encoder import TextEncoder

MAX_HITS = 24
MAX_TEXT = 500  # characters


class MomentSearch:
    """Search over all moments, one text at a time. The text encoder is loaded for the first, and kept."""

    def __init__(self) -> None:
        self._turn = threading.BoundedSemaphore(SERVE.searches_at_once)
        self._encoder: tuple[str, TextEncoder] | None = None  # the tower that it is of

    def find(self, pinned: PinnedStore, text: str, where: str = "") -> "list[Hit]":
        """The hits, best first, as `longvlm search` finds them.

        Args:
            pinned: the store as it is shown.
            text: what they look like.
            where: a predicate over segments and what is known of their videos; empty: all.

        Raises:
            InputError: the store is empty, its tower has no text encoder, the text is too long, or the predicate cannot
                run.
            BusyError: others search already.
        """
        from longvlm.jobs.query.search import nearest_moments

        if len(text) > MAX_TEXT:
            raise InputError(f"that text is too long; say it in {MAX_TEXT} characters.")
        within = segments_of_own(pinned, where) if where else None
        with waiting(self._turn):
            return nearest_moments(pinned.snapshot, self._encoder_of(pinned.tower), text, MAX_HITS, within).rows

    def _encoder_of(self, tower: str) -> "TextEncoder":
        from longvlm.pipeline.vision.text_encoder import load_text_encoder

        if self._encoder is None or self._encoder[0] != tower:
            self._encoder = (tower, load_text_encoder(tower))
        return self._encoder[1]
