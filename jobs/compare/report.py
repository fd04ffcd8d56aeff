"""What came of a comparison: each path's answers held to the baseline's and to the right ones; figures and a plot."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from longvlm.jobs.terminal import NO_MATPLOTLIB, print_rows, terminal
from longvlm.pipeline.answering.typed import read_value, typed_value
from longvlm.pipeline.engine.requests import Answer
from longvlm.pipeline.judging.agreement import is_right, is_same_answer
from longvlm.schemas.tables import QuestionRow

PLOT = "compare.png"

Key = tuple[int, int]  # of a video in the sample, and of a question in its file


class ComparedQuestion(QuestionRow):
    """A question of the file, and the right answer where the file has one."""

    right: str | None


@dataclass(frozen=True, eq=False)
class PathReport:
    """One way of answering, and what came of it."""

    name: str  # baseline, unmerged, full, budget-512
    said: str  # to a person
    answers: dict[Key, Answer]
    seconds: float  # for all questions: prefill and decoding, and what the path needs before them
    stored_bytes: list[int]  # of each video; empty where nothing is stored


@dataclass(eq=False)
class Comparison:
    """What was asked about what, and the paths, the baseline first."""

    questions: dict[int, ComparedQuestion]  # by place
    about: dict[str, Any]  # what the figures depend on: recipe, precision, seed
    num_elsewhere: int = 0  # questions of the file about videos that the source lacks
    baseline: str = ""  # in words: which model looked at what
    videos: list[str] = field(default_factory=list)  # uris of those that could be watched
    skipped: list[dict[str, str]] = field(default_factory=list)  # video, error_code and error of the others
    paths: list[PathReport] = field(default_factory=list)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every answer of every path, with what it is held to."""
        for path in self.paths:
            for key, answer in path.answers.items():
                question = self.questions[key[1]]
                value = None if answer.text is None else read_value(question, answer.text)
                yield {
                    "path": path.name,
                    "video": self.videos[key[0]],
                    **{name: question[name] for name in ("question_id", "question", "type")},
                    "answer": answer.text,
                    "value": typed_value(question["type"], value),
                    "confidence": answer.confidence,
                    "error": None if answer.error is None else str(answer.error),
                    "agrees": self._agrees(path, key),
                    "right_answer": question["right"],
                    "is_right": self._is_right(path, key),
                    "num_visual_tokens": answer.num_visual_tokens,
                    "stored_bytes": path.stored_bytes[key[0]] if path.stored_bytes else None,  # of the video
                }

    def figures(self) -> list[dict[str, Any]]:
        """What each path takes, and what its answers are worth.

        Agreement is the share of the baseline's answers that the path gives as well, accuracy that of the right answers
        that are known; each None where there are none.
        """
        found = []
        for path in self.paths:
            agrees, right = (
                [verdict for key in path.answers if (verdict := judge(path, key)) is not None]
                for judge in (self._agrees, self._is_right)
            )
            figures = {
                "path": path.name,
                "visual_tokens": fmean(answer.num_visual_tokens for answer in path.answers.values()),
                "agreement": fmean(agrees) if agrees else None,
                "accuracy": fmean(right) if right else None,
                "seconds_per_question": path.seconds / len(path.answers),
                "stored_bytes_per_video": fmean(path.stored_bytes) if path.stored_bytes else None,
                "questions": len(path.answers),
                "failed": sum(answer.text is None for answer in path.answers.values()),
            }
            found.append(figures)
        return found

    def summary(self) -> dict[str, Any]:
        """What the figures are about."""
        return {
            "baseline": self.baseline,
            **self.about,
            "videos": self.videos,
            "skipped": self.skipped,
            "questions_about_other_videos": self.num_elsewhere,
        }

    def _agrees(self, path: PathReport, key: Key) -> bool | None:
        """None where the baseline has no answer."""
        given, wanted = path.answers[key].text, self.paths[0].answers[key].text
        return None if wanted is None else given is not None and is_same_answer(self.questions[key[1]], given, wanted)

    def _is_right(self, path: PathReport, key: Key) -> bool | None:
        """None where the right answer is not known."""
        given, question = path.answers[key].text, self.questions[key[1]]
        return None if question["right"] is None else given is not None and is_right(question, given, question["right"])


def print_comparison(comparison: Comparison, plot: Path | None) -> None:
    """The table that a person sees, what its baseline is, and where the plot lies."""
    figures = comparison.figures()
    shown = [
        {
            "path": path.said,
            "visual tokens": f"{row['visual_tokens']:.0f}",
            "agreement": _percent(row["agreement"]),
            "accuracy": _percent(row["accuracy"]),
            "s/question": f"{row['seconds_per_question']:.3g}",
            "stored bytes/video": _count(row["stored_bytes_per_video"]),
            "failed": row["failed"],
        }
        for path, row in zip(comparison.paths, figures, strict=True)
    ]
    empty = {name for name in ("accuracy", "failed") if not any(row[name] for row in shown)}
    print_rows([{name: value for name, value in row.items() if name not in empty} for row in shown])
    told = ", ".join(f"{name} {value}" for name, value in comparison.about.items())
    num_asked, num_elsewhere = len(comparison.paths[0].answers), comparison.num_elsewhere
    lines = [
        f"baseline: {comparison.baseline}",
        f"{num_asked} questions about {len(comparison.videos)} videos; {told}",
        *([f"{num_elsewhere} questions name videos that the source lacks"] if num_elsewhere else []),
        f"plot: {plot}" if plot else NO_MATPLOTLIB,
    ]
    terminal().print("\n".join(lines), markup=False, highlight=False)


def save_plot(figures: list[dict[str, Any]], folder: Path) -> Path | None:
    """Agreement and accuracy over visual tokens as a PNG; None where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    baseline, *stored = figures
    stored.sort(key=lambda row: row["visual_tokens"])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for measure in ("agreement", "accuracy"):
        if known := [row for row in stored if row[measure] is not None]:
            axes.plot([row["visual_tokens"] for row in known], [row[measure] for row in known], "o-", label=measure)
    if baseline["accuracy"] is not None:
        axes.axhline(baseline["accuracy"], linestyle="--", color="grey", label="accuracy of the baseline")
    axes.set(xscale="log", xlabel="visual tokens (mean)", ylabel="share of questions", ylim=(-0.03, 1.03))
    names: dict[float, list[str]] = {}  # budgets that nothing had to be merged for share a place
    for row in stored:
        names.setdefault(row["visual_tokens"], []).append(row["path"])
    for place, (tokens, of) in enumerate(names.items()):  # upright and at changing heights: neighbours may be close
        height = (0.0, 0.2, 0.4)[place % 3]
        axes.text(
            tokens, height, f"{', '.join(of)} ", rotation=90, va="bottom", ha="right", fontsize=8, color="dimgrey"
        )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.1)
    if axes.lines:
        figure.legend(loc="outside right upper")
    path = folder / PLOT
    FigureCanvasAgg(figure).print_png(path)
    return path


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def _count(number: float | None) -> str | None:
    return None if number is None else f"{number:,.0f}"
