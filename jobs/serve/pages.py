"""The pages: what each address shows, out of the pinned store, by templates that escape all they are given."""

import re
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlencode

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from longvlm.jobs.figures import counted, spell_bytes, spell_figure, spell_moment, spell_seconds
from longvlm.jobs.serve import own_sql, questions
from longvlm.jobs.serve.library import Library, Row
from longvlm.jobs.serve.moments import MomentSearch
from longvlm.jobs.serve.videos import LibraryOrder, answers_of, find_video, library_page, segments_of, short_model
from longvlm.pipeline.visible import visible
from longvlm.schemas.errors import InputError

MAX_BLOCKS = 600  # of the time bar: of a longer video several segments share one
_MARK = re.compile(r"(\d{1,7}(?:\.\d{1,3})?)-(\d{1,7}(?:\.\d{1,3})?)", re.ASCII)
_MAX_MARKS = 50
SHADES = 5  # of evidence, a class each


class Pages:
    """The pages over a library.

    Args:
        library: the store.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._search = MomentSearch()
        self._templates = _environment()

    def library(self, request: Request) -> Response:
        """Videos as cards, filtered, and what others failed of."""
        asked = request.query_params
        order = LibraryOrder(
            words=asked.get("q", ""),
            where=asked.get("where", ""),
            status=asked.get("status", ""),
            error_code=asked.get("reason", ""),
            after=asked.get("after", ""),
        )
        pinned, page, trouble = self._library.pinned(), None, None
        try:
            page = library_page(pinned, order)
        except InputError as error:
            trouble = str(error)
        following = None
        if page is not None and page.after is not None:
            kept = {name: asked[name] for name in ("q", "where", "status", "reason") if asked.get(name)}
            following = "/?" + urlencode({**kept, "after": page.after})
        return self._page(
            "library.html",
            HTTPStatus.OK if trouble is None else HTTPStatus.BAD_REQUEST,
            order=order,
            page=page,
            following=following,
            trouble=trouble,
            num_by_status=pinned.num_by_status,
            reasons=pinned.failure_reasons,
        )

    def video(self, request: Request) -> Response:
        """One video: player, time bar, answers."""
        pinned = self._library.pinned()
        video = find_video(pinned, str(request.path_params["write_id"]))
        if video is None:
            return self.nothing_here("There is no video at this address any more: it may have been indexed anew.")
        segments = segments_of(pinned, video["write_id"])
        duration_s = max([video["duration_s"] or 0.0, *(segment["end_s"] for segment in segments), 0.001])
        return self._page(
            "video.html",
            video=video,
            segments=segments,
            blocks=_blocks(segments),
            duration_s=duration_s,
            asked=answers_of(pinned, video["write_id"]),
            marks=_marks(request.query_params.get("marks", "")),
        )

    def search(self, request: Request) -> Response:
        """Moments that look like a text."""
        text, hits, trouble = request.query_params.get("q", "").strip(), None, None
        if text:
            try:
                hits = self._search.find(self._library.pinned(), text)
            except InputError as error:
                trouble = str(error)
        status = HTTPStatus.OK if trouble is None else HTTPStatus.BAD_REQUEST
        return self._page("search.html", status, text=text, hits=hits, trouble=trouble)

    def questions(self, request: Request) -> Response:
        """All questions, or one over all videos."""
        pinned, asked = self._library.pinned(), request.query_params
        found = next((row for row in pinned.questions if row["question_hash"] == asked.get("question")), None)
        if found is None:
            return self._page("questions.html", questions=pinned.questions, question=None)
        sort = asked.get("sort", "confidence")
        sort = sort if sort in questions.SORTS else "confidence"
        value, page = asked.get("value", ""), _whole(asked.get("page", "0"), questions.MAX_PAGE)
        answers = questions.answers_to(pinned, found["question_hash"], sort, value, page)

        def here(**changed: Any) -> str:
            own = {"question": found["question_hash"], "sort": sort, "value": value, **changed}
            return "/questions?" + urlencode({name: what for name, what in own.items() if what != ""})

        return self._page(
            "questions.html",
            question=found,
            answers=answers[: questions.PAGE_ANSWERS],
            following=here(page=page + 1) if len(answers) > questions.PAGE_ANSWERS else None,
            bars=questions.histogram(pinned, found["question_hash"], found["type"]),
            sort=sort,
            value=value,
            here=here,
        )

    def runs(self, _: Request) -> Response:
        """The last runs, and what failed by code."""
        pinned = self._library.pinned()
        failures: dict[str, list[Row]] = {}
        for row in questions.failures_of_runs(pinned):
            failures.setdefault(row["run_id"], []).append(row)
        return self._page(
            "runs.html", runs=questions.last_runs(pinned), failures=failures, reasons=pinned.failure_reasons
        )

    def sql(self, request: Request) -> Response:
        """A query of one's own, and its rows as a table or a file."""
        asked = request.query_params
        query, form = asked.get("query", "").strip(), asked.get("form", "")
        result, trouble = None, None
        if query:
            try:
                if form in _FILES:
                    headers = {"Content-Disposition": f'attachment; filename="result.{form}"'}
                    found = own_sql.run_as(self._library.store_uri, query, form)
                    return Response(found, headers=headers, media_type=_FILES[form])
                result = own_sql.run_own(self._library.store_uri, query)
            except InputError as error:
                trouble = str(error)
        status = HTTPStatus.OK if trouble is None else HTTPStatus.BAD_REQUEST
        return self._page("sql.html", status, query=query, result=result, trouble=trouble)

    def nothing_here(self, said: str = "There is nothing at this address.") -> Response:
        """The page of an address that leads nowhere."""
        return self._page("sorry.html", HTTPStatus.NOT_FOUND, said=said)

    def sorry(self, said: str, status: HTTPStatus) -> Response:
        """The page of what cannot be done, in a sentence."""
        return self._page("sorry.html", status, said=said)

    def _page(self, template: str, status: HTTPStatus = HTTPStatus.OK, **shown: Any) -> Response:
        known = {"store": self._library.store_uri, "out_of_reach": self._library.trouble, "page_name": template[:-5]}
        return HTMLResponse(self._templates.get_template(template).render(known | shown), status)


_FILES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("longvlm.jobs.serve"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "shown": lambda text: visible(str(text), keep="\n"),
        "moment": spell_moment,
        "seconds": lambda seconds: f"{seconds:.3f}".rstrip("0").rstrip("."),
        "duration": spell_seconds,
        "bytes": spell_bytes,
        "counted": counted,
        "figure": lambda value, name: spell_figure(name, value),
        "name": lambda uri: PurePosixPath(uri).name or uri,
        "model": short_model,
        "shade": lambda weight: min(SHADES, max(1, round(weight * SHADES + 0.5))),
        "percent": lambda share: f"{share * 100:.0f} %",
        "when": lambda time: time.replace(tzinfo=UTC).strftime("%Y-%m-%d %H:%M") if isinstance(time, datetime) else "",
    }
    return made


def _blocks(segments: list[Row]) -> list[Row]:
    """The segments as the time bar has room for them: start_s, end_s, and the segment that stands for a block."""
    each = -(-len(segments) // MAX_BLOCKS) or 1
    groups = [segments[first : first + each] for first in range(0, len(segments), each)]
    return [
        {"start_s": some[0]["start_s"], "end_s": some[-1]["end_s"], "segment": some[len(some) // 2]["segment"]}
        for some in groups
    ]


def _marks(said: str) -> list[tuple[float, float]]:
    """Spans in seconds that an address asks to mark, such as `12-14.5,30-31`; what is no span is left out."""
    found = (_MARK.fullmatch(part) for part in said.split(",")[:_MAX_MARKS])
    return [(float(span[1]), float(span[2])) for span in found if span and float(span[1]) <= float(span[2])]


def _whole(said: str, most: int) -> int:
    return min(int(said), most) if said.isascii() and said.isdecimal() and len(said) < 6 else 0
