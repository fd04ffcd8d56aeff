"""What merging costs on one's own videos: transformers' own path beside stored tokens at several budgets.

One process, with neither Ray nor a store: a sample of the videos is decoded, each once, and what an index would keep of
them stays in memory. All paths are asked the same questions, greedily and in one precision, the tower included, so that
stored rows differ by merging alone.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import torch

from longvlm.jobs.answer.options import check_vocabulary, fit_budget
from longvlm.jobs.choose import absolute, choose_index_recipe, misfit
from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.progress import shown_work
from longvlm.jobs.compare.report import ComparedQuestion, Comparison, Key, PathReport
from longvlm.jobs.compare.sample import Drawn, Watched, draw, watch_sample
from longvlm.pipeline.answering.questions import read_questions
from longvlm.pipeline.answering.typed import as_request
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.reference import Plain, PlainTokens, PlainWhole
from longvlm.pipeline.engine.requests import Answer, Group
from longvlm.pipeline.judging.agreement import read_right_answers
from longvlm.pipeline.models.contract import LanguageModel, ModelSpec, View
from longvlm.pipeline.models.families import can_answer, describe_model, load_model, load_whole
from longvlm.pipeline.models.prefix import VideoPrefix, prefix_of
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.pipeline.vision.budget import Budget, fit
from longvlm.pipeline.vision.tokens import VideoTokens
from longvlm.pipeline.vision.towers.families import load_tower
from longvlm.schemas.errors import InputError, TerminalError
from longvlm.schemas.recipe import AnswerRecipe, IndexRecipe, Precision, TokenDtype, channel_bytes
from longvlm.schemas.tables import QuestionRow

BUDGETS = (1024, 512, 128)  # where none are named: those of them that the model's context holds
# Of each channel of a stored token, beside them, and where it says where it lies.
_SIZE_AND_SPAN_BYTES, _POSITION_BYTES = 2 + 2 * 4, 3 * 8

T = TypeVar("T")


@dataclass(frozen=True)
class CompareOrder:
    """What to compare, and on what."""

    source: Source
    model: str
    questions: str  # a question file
    sample: int = 10  # videos
    budgets: tuple[int, ...] | None = None  # visual tokens; None: those of BUDGETS that fit
    recipe: str | None = None  # a name or a file; None: `long`
    precision: Precision = "float32"
    max_new_tokens: int = 256
    seed: int = 0
    show_progress: bool = False


@dataclass(frozen=True, eq=False)
class _Seen:
    """A video as stored, and the places of its questions."""

    tokens: VideoTokens
    segments: list[dict[str, Any]]  # start_s and first_frame of each
    whole: VideoTokens | None  # of the baseline's frames, nothing merged
    places: list[int]


def run_compare(order: CompareOrder) -> Comparison:
    """Ask the questions about a sample of the videos along every path.

    Raises:
        InputError: the source, model, questions, sample, budgets or recipe cannot be used, or none of the videos.
    """
    if order.sample < 1:
        raise InputError(f"a sample of {order.sample} videos has nothing to compare; use --sample 1 or more.")
    if not can_answer(absolute(order.model)):
        raise InputError(f"the model {order.model} is only a vision tower; name a model that answers.")
    questions = read_questions(order.questions)
    doing(f"listing {order.source.uri}")
    drawn, num_elsewhere = draw(list_source(order.source), questions, order.sample, order.seed)
    asked = _with_right_answers(order, questions, drawn)
    doing("reading the model")
    index_recipe, model = choose_index_recipe(None, order.model, order.recipe, None)
    index_recipe, spec = replace(index_recipe, precision=order.precision), describe_model(model)
    spec = replace(spec, sight=spec.sight.reading(index_recipe.tower))
    _check_fit(index_recipe, spec)
    held = (one for one in asked.values() if one["type"] in ("number", "json"))
    check_vocabulary(spec, ((one["type"], one["schema"], one["question"]) for one in held))
    budgets = _fit_budgets(order, spec)

    doing("loading the model")
    run = _CompareRun(order, spec, index_recipe, asked)
    run.comparison.num_elsewhere = num_elsewhere
    whole = load_whole(model, order.precision, run.device)
    if whole is None:
        language_model = load_model(model, order.precision, run.device)
        run.ask_over_tokens(language_model, drawn)
    else:
        run.ask_whole(PlainWhole(whole, run.recipe), drawn)
        del whole
        gc.collect()  # transformers' copy of the weights goes before the engine's comes
        language_model = load_model(model, order.precision, run.device)
        run.ask_engine(language_model, "unmerged", "stored, the same frames unmerged", _whole)
    said = "stored, all that the context holds" if run.overflows else "stored, in full"
    run.ask_engine(language_model, "full", said, run.in_full)
    for budget in budgets:
        run.ask_engine(language_model, f"budget-{budget}", f"stored, budget {budget}", partial(run.within, budget))
    return run.comparison


class _CompareRun:
    """What all paths of a run share, and the comparison that it fills in."""

    def __init__(
        self, order: CompareOrder, spec: ModelSpec, index_recipe: IndexRecipe, questions: dict[int, ComparedQuestion]
    ) -> None:
        self.order, self.spec, self.index_recipe = order, spec, index_recipe
        self.room = fit_budget(spec, None, order.max_new_tokens)
        self.recipe = AnswerRecipe(
            model=spec.name,
            weights=spec.weights,
            index_recipe=index_recipe.fingerprint,
            template=spec.templates[0],
            precision=order.precision,
            budget=self.room,
            focus="even",
            max_new_tokens=order.max_new_tokens,
        )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        about = {"recipe": index_recipe.name, "precision": order.precision, "seed": order.seed}
        self.comparison = Comparison(questions, about)
        self.seen: list[_Seen] = []

    # --- a video as stored ---

    def budget(self, max_tokens: int) -> Budget:
        """So many visual tokens; neighbouring segments are merged where they cannot hold all of them."""
        return self.spec.sight.budget(max_tokens, None, "even")

    def within(self, max_tokens: int, video: _Seen) -> VideoTokens:
        """Its tokens within a budget."""
        return fit(video.tokens, self.budget(max_tokens))

    def in_full(self, video: _Seen) -> VideoTokens:
        """Its tokens, or as many as the model's context holds."""
        return self.within(self.room, video)

    @property
    def overflows(self) -> bool:
        """Whether any video has more tokens than the model's context holds."""
        return not all(self.budget(self.room).holds(video.tokens) for video in self.seen)

    def prefix(self, tokens: VideoTokens, video: _Seen) -> VideoPrefix:
        """What the model's projector is given of them."""
        return prefix_of(tokens, video.segments, self.spec.sight)

    # --- the baseline ---

    def ask_whole(self, plain: PlainWhole, drawn: list[Drawn]) -> None:
        """The baseline: transformers' own model over the frames themselves."""
        most_pictures = plain.most_pictures(self.room, self.index_recipe.tower)
        if not most_pictures:
            raise InputError(
                f"not one frame fits the {self.spec.context} tokens of context that {self.spec.name} has beside a "
                f"question and {self.order.max_new_tokens} new tokens; lower --max-new-tokens."
            )

        def show(watched: Watched, video: _Seen) -> View:
            return plain.show(watched.frames, self.prefix(_whole(video), video))

        self._ask_plainly(plain, show, drawn, most_pictures)
        counts = sorted({sum(video.whole.num_frames) for video in self.seen if video.whole is not None})
        number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        self.comparison.baseline = (
            f"transformers' {plain.name} over {number} frames of a video, out of the recipe's as many as its context "
            "holds, evenly chosen; it looks at them again with every question."
        )

    def ask_over_tokens(self, model: LanguageModel, drawn: list[Drawn]) -> None:
        """The baseline where transformers does not know the whole: its generate, over what is stored in full."""
        plain = PlainTokens(model, self.recipe)

        def show(_: Watched, video: _Seen) -> View:
            return plain.show(self.prefix(self.in_full(video), video))

        self._ask_plainly(plain, show, drawn, 0)
        self.comparison.baseline = (
            "transformers does not know this model with its tower, so this is its language model over all stored "
            "tokens that its context holds, one question at a time by transformers' generate."
        )

    def _ask_plainly(
        self, plain: Plain, show: Callable[[Watched, _Seen], View], drawn: list[Drawn], most_pictures: int
    ) -> None:
        """Watch every video once and ask about it at once: no frame is kept any longer. Broken videos are skipped."""
        given: dict[Key, Answer] = {}
        tower = load_tower(self.index_recipe.tower.name, self.order.precision, self.device)
        seen = watch_sample((video for video, _ in drawn), self.index_recipe, tower, most_pictures)
        for (video, places), watched in zip(self._shown(drawn, "watching", len(drawn)), seen, strict=True):
            if isinstance(watched, TerminalError):
                skipped = {"video": video["uri"], "error_code": watched.code.value, "error": watched.message}
                self.comparison.skipped.append(skipped)
                continue
            number = len(self.seen)
            self.seen.append(_Seen(watched.tokens, watched.segments, watched.whole, places))
            self.comparison.videos.append(video["uri"])
            view = show(watched, self.seen[-1])
            for place in places:
                request = as_request((number, place), self.comparison.questions[place])
                given[number, place] = plain.answer(view, request)
        if not self.seen:
            first = self.comparison.skipped[0]
            raise InputError(
                f"not one video of the sample can be watched: {first['video']} has {first['error_code']} "
                f"({first['error'].rstrip('.')}); name others, or draw again with another --seed."
            )
        seconds = sum(answer.latency_ms for answer in given.values()) / 1e3
        said = "transformers, over frames" if most_pictures else "transformers' generate, over tokens"
        self.comparison.paths.append(PathReport("baseline", said, given, seconds, []))

    # --- stored tokens ---

    def ask_engine(self, model: LanguageModel, name: str, said: str, see: Callable[[_Seen], VideoTokens]) -> None:
        """One path over stored tokens; `see` says what of a video's."""
        given: dict[Key, Answer] = {}
        stored_bytes: list[int] = []

        def groups() -> Iterator[Group]:
            for number, video in enumerate(self.seen):
                tokens = see(video)
                stored_bytes.append(bytes_of(tokens, self.index_recipe.dtype))
                questions = ((place, self.comparison.questions[place]) for place in video.places)
                requests = [as_request((number, place), question) for place, question in questions]
                yield Group(self.prefix(tokens, video), requests)

        engine, started_s = Engine(model, self.recipe), time.perf_counter()
        num_questions = sum(len(video.places) for video in self.seen)
        for answer in self._shown(engine.answer(groups()), said, num_questions):
            given[answer.key] = replace(answer, attention=None)  # type: ignore[index] # keys are as made above
        seconds = time.perf_counter() - started_s
        in_order = dict(sorted(given.items()))
        self.comparison.paths.append(PathReport(name, said, in_order, seconds, stored_bytes))

    def _shown(self, work: Iterable[T], what: str, total: int) -> Iterable[T]:
        """Some work with a bar on stderr."""
        return shown_work(work, what, total, show=self.order.show_progress)


def read_budgets(text: str) -> tuple[int, ...]:
    """The numbers of a list such as 1024,512; InputError if it holds anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"the budgets {text!r} are not numbers of visual tokens; write them as 1024,512,128.")
    return tuple(map(int, parts))


def bytes_of(tokens: VideoTokens, dtype: TokenDtype) -> int:
    """What a store's blobs take for a video: tokens, CLS in float16, a size and a span for each token, its place."""
    num_cls = len(tokens.counts) * tokens.num_global_tokens
    beside = _SIZE_AND_SPAN_BYTES + (_POSITION_BYTES if tokens.positions is not None else 0)
    of_token = channel_bytes(tokens.dim, dtype) + beside
    return of_token * len(tokens.local) + channel_bytes(tokens.dim, "float16") * num_cls


def _whole(video: _Seen) -> VideoTokens:
    assert video.whole is not None, "a baseline of frames has seen them"
    return video.whole


def _with_right_answers(order: CompareOrder, questions: pa.Table, drawn: list[Drawn]) -> dict[int, ComparedQuestion]:
    """The questions about the sample, by their place in the file."""
    places = sorted({place for _, places in drawn for place in places})
    rows: list[QuestionRow] = questions.take(pa.array(places, pa.int64())).to_pylist()
    asked = dict(zip(places, rows, strict=True))
    right = read_right_answers(order.questions, asked)
    return {place: {**question, "right": right[place]} for place, question in asked.items()}


def _check_fit(recipe: IndexRecipe, spec: ModelSpec) -> None:
    """InputError unless the model can read what the recipe keeps: a recipe file may say otherwise."""
    if misfit(spec.sight, recipe, spec.mm_hidden_size) is not None:
        raise InputError(
            f"the model {spec.name} reads tokens {spec.mm_hidden_size} wide of hidden state {spec.sight.feature_layer} "
            f"and {spec.sight.num_global_tokens} global ones, but the recipe {recipe.name} keeps tokens "
            f"{recipe.tower.dim} wide of hidden state {recipe.feature_layer} and {recipe.num_global_layers} global "
            "ones; leave feature_layer and num_global_layers out of the recipe, and let the model's tower be its own."
        )


def _fit_budgets(order: CompareOrder, spec: ModelSpec) -> tuple[int, ...]:
    """The budgets, each once, the largest first; InputError if the model's context does not hold one that is named."""
    room = fit_budget(spec, None, order.max_new_tokens)
    named = [fit_budget(spec, budget, order.max_new_tokens) for budget in order.budgets or ()]
    found = named or [budget for budget in BUDGETS if spec.sight.num_global_tokens < budget < room]
    return tuple(sorted(set(found), reverse=True))
