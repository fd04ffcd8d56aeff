"""The pages: what each address shows, out of the pinned store, by templates that escape all they are given."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlencode

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.figures import counted, spell_bytes, spell_figure, spell_moment, spell_seconds
from longvlm.jobs.serve import own_sql, questions, runs
from longvlm.jobs.serve.asking import KINDS, MAX_QUESTION, Asker, QuestionForm
from longvlm.jobs.serve.moments import MomentSearch
from longvlm.jobs.serve.pinned import PinnedStore, Row, ShownStore
from longvlm.jobs.serve.verdicts import KEY, HumanVerdicts, add_verdicts
from longvlm.jobs.serve.videos import (
    LibraryOrder,
    answers_of,
    find_video,
    find_videos,
    library_page,
    segments_of,
    short_model,
)
from longvlm.pipeline.visible import visible
from longvlm.schemas.errors import InputError

MAX_BLOCKS = 600  # of the time bar: of a longer video several segments share one
_MARK = re.compile(r"(\d{1,7}(?:\.\d{1,3})?)-(\d{1,7}(?:\.\d{1,3})?)", re.ASCII)
_MAX_MARKS = 50
SHADES = 5  # of evidence, a class each
_BACK = re.compile(r"/(?:video/[0-9a-f-]{36}|questions|ask)(?:\?[!-~]*)?(?:#[!-~]*)?", re.ASCII)  # after a verdict
_FILES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}


class Pages:
    """The pages over a store.

    Args:
        store: that is shown.
        person: who may judge answers; None: nobody.
        asker: what answers questions; None: nothing.
    """

    def __init__(self, store: ShownStore, person: HumanVerdicts | None = None, asker: Asker | None = None) -> None:
        self._store, self._person, self._asker = store, person, asker
        self.form_token = secrets.token_urlsafe(32)  # that forms which change something have to bring
        self._search = MomentSearch()
        self._templates = _environment()

    def library(self, request: Request) -> Response:
        """Videos as cards, filtered, and what others failed of."""
        asked = request.query_params
        order = _library_order(asked)
        pinned, page, trouble = self._store.pinned(), None, None
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
            trouble,
            order=order,
            page=page,
            following=following,
            num_by_status=pinned.num_by_status,
            reasons=pinned.failure_reasons,
        )

    def video(self, request: Request) -> Response:
        """One video: player, time bar, answers; and an answer to a question that the address asks."""
        pinned, asked = self._store.pinned(), request.query_params
        video = find_video(pinned, str(request.path_params["write_id"]))
        if video is None:
            return self.nothing_here("There is no video at this address any more: it may have been indexed anew.")
        first, unkept, trouble, form = asked.get("question", ""), None, None, _question_form(asked)
        if self._asker is not None and form.question:
            try:
                now = self._asker.ask(pinned, [video], form, keep=False)
                first, unkept = now.question_hash, None if now.num_reused else next(iter(now.answers), None)
            except InputError as error:
                trouble = str(error)
        segments = segments_of(pinned, video["write_id"])
        answers = answers_of(pinned, video["write_id"], first, unkept)
        add_verdicts(pinned, answers.answers, self._person)
        return self._page(
            "video.html",
            trouble,
            video=video,
            segments=segments,
            blocks=_blocks(segments),
            duration_s=max([video["duration_s"] or 0.0, *(segment["end_s"] for segment in segments), 0.001]),
            asked=answers,
            form=form,
            marks=_marks(asked.get("marks", "")),
        )

    def ask(self, request: Request) -> Response:
        """A question to some videos, and their answers."""
        if self._asker is None:
            return self.nothing_here("No model is loaded here: start `longvlm serve` with --model.")
        pinned, asked, trouble = self._store.pinned(), request.query_params, None
        form, videos, now = _question_form(asked), list[Row](), None
        try:
            videos = self._selected(pinned, asked)
            if form.question:
                now = self._asker.ask(pinned, videos, form, keep=False)
        except InputError as error:
            trouble = str(error)
        answers = now.answers if now else []
        add_verdicts(pinned, answers, self._person)
        by_write = {video["write_id"]: video for video in videos}
        return self._page(
            "ask.html",
            trouble,
            form=form,
            selection=_selection(asked),
            videos=videos,
            now=now,
            answers=[{**by_write[row["write_id"]], **row} for row in answers],
        )

    def keep_answer(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Answer a posted question to one video or some, keep the answers, and lead to them."""
        if self._asker is None:
            return self.nothing_here()
        pinned, write_id = self._store.pinned(), request.path_params.get("write_id")
        videos = self._selected(pinned, fields) if write_id is None else find_videos(pinned, [str(write_id)])
        now = self._asker.ask(pinned, videos, _question_form(fields), keep=True)
        self._store.renewed()
        where = "/questions" if write_id is None else f"/video/{write_id}"
        return RedirectResponse(f"{where}?question={now.question_hash}#answers", HTTPStatus.SEE_OTHER)

    def judge(self, _: Request, fields: Mapping[str, str]) -> Response:
        """Note a person's verdict, and lead back to where it was given."""
        if self._person is None or fields.get("is_right") not in ("yes", "no") or not fields.keys() >= set(KEY):
            raise InputError("a verdict is a yes or a no on an answer; load the page again.")
        self._person.add(self._store.pinned(), fields, is_right=fields["is_right"] == "yes")
        back = fields.get("back", "")
        return RedirectResponse(back if _BACK.fullmatch(back) else "/questions", HTTPStatus.SEE_OTHER)

    def _selected(self, pinned: PinnedStore, asked: Mapping[str, str]) -> list[Row]:
        """The videos that a question is for: the first of a page of the library, or those that a search finds."""
        if text := asked.get("search", "").strip():
            hits = self._search.find(pinned, text, asked.get("where", "").strip())
            videos = find_videos(pinned, list(dict.fromkeys(hit.write_id for hit in hits)))
        else:
            videos = library_page(
                pinned, replace(_library_order(asked), status="indexed", error_code="", after="")
            ).videos
        return videos[: SERVE.ask_videos]

    def search(self, request: Request) -> Response:
        """Moments that look like a text, and whether a model says so too."""
        asked = {name: request.query_params.get(name, "").strip() for name in ("q", "where", "verify", "ask", "by")}
        hits, notes, trouble = None, list[str](), None
        try:
            if asked["q"]:
                pinned = self._store.pinned()
                found = self._search.find(pinned, asked["q"], asked["where"])
                hits = [{**asdict(hit), "yes": None} for hit in found]
                if self._asker is not None and asked["verify"] and found:
                    yes, notes = self._asker.verify(pinned, found, asked["ask"] or f"Is there {asked['q']}?")
                    hits = [{**hit, "yes": share} for hit, share in zip(hits, yes, strict=True)]
                    if asked["by"] == "yes":
                        hits.sort(key=lambda hit: -1.0 if hit["yes"] is None else hit["yes"], reverse=True)
        except InputError as error:
            trouble = str(error)
        return self._page("search.html", trouble, text=asked["q"], asked=asked, hits=hits, notes=notes)

    def questions(self, request: Request) -> Response:
        """All questions, or one over all videos."""
        pinned, asked = self._store.pinned(), request.query_params
        found = next((row for row in pinned.questions if row["question_hash"] == asked.get("question")), None)
        if found is None:
            return self._page("questions.html", questions=pinned.questions, question=None)
        sort = asked.get("sort", "confidence")
        sort = sort if sort in questions.SORTS else "confidence"
        value, page = asked.get("value", ""), _whole(asked.get("page", "0"), questions.MAX_PAGE)
        answers = questions.answers_to(pinned, found["question_hash"], sort, value, page)
        add_verdicts(pinned, answers, self._person)

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
            page=page,
            here=here,
        )

    def runs(self, _: Request) -> Response:
        """The last runs, how those of each job went, and what failed by code."""
        pinned = self._store.pinned()
        failures: dict[str, list[Row]] = {}
        for row in runs.failures_of_runs(pinned):
            failures.setdefault(row["run_id"], []).append(row)
        return self._page(
            "runs.html",
            runs=runs.last_runs(pinned),
            trends=runs.trends_of_runs(pinned),
            failures=failures,
            reasons=pinned.failure_reasons,
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
                    found = own_sql.run_as(self._store.pinned(), query, form)
                    return Response(found, headers=headers, media_type=_FILES[form])
                result = own_sql.run_own(self._store.pinned(), query)
            except InputError as error:
                trouble = str(error)
        return self._page("sql.html", trouble, query=query, result=result)

    def nothing_here(self, said: str = "There is nothing at this address.") -> Response:
        """The page of an address that leads nowhere."""
        return self.sorry(said, HTTPStatus.NOT_FOUND)

    def sorry(self, said: str, status: HTTPStatus) -> Response:
        """The page of what cannot be done, in a sentence."""
        return self._page("sorry.html", said, status, said=said)

    def _page(
        self, template: str, trouble: str | None = None, status: HTTPStatus = HTTPStatus.BAD_REQUEST, **shown: Any
    ) -> Response:
        """A page; `status` is that of one with trouble."""
        known = {
            "store": self._store.store_uri,
            "out_of_reach": self._store.trouble,
            "page_name": template[:-5],
            "trouble": trouble,
            "person": self._person.name if self._person else None,
            "asker": self._asker,
            "form_token": self.form_token,
        }
        html = self._templates.get_template(template).render(known | shown)
        return HTMLResponse(html, HTTPStatus.OK if trouble is None else status)


def _library_order(asked: Mapping[str, str]) -> LibraryOrder:
    return LibraryOrder(
        words=asked.get("q", ""),
        where=asked.get("where", ""),
        status=asked.get("status", ""),
        error_code=asked.get("reason", ""),
        after=asked.get("after", ""),
    )


def _question_form(asked: Mapping[str, str]) -> QuestionForm:
    return QuestionForm(asked.get("ask", "").strip(), asked.get("kind", "text"), asked.get("choices", ""))


def _selection(asked: Mapping[str, str]) -> dict[str, str]:
    """What of an address says which videos a question is for."""
    return {name: asked.get(name, "") for name in ("q", "where", "search")}


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("longvlm.jobs.serve"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"KINDS": KINDS, "MAX_QUESTION": MAX_QUESTION, "ASK_VIDEOS": SERVE.ask_videos}
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
