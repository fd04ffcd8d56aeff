"""The report of an evaluation for people: a table, and on request Markdown with plots."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from longvlm.jobs.evaluate.run import EvaluateReport
from longvlm.jobs.terminal import NO_MATPLOTLIB, print_rows, terminal
from longvlm.pipeline.judging.score import metrics_by_kind
from longvlm.schemas.sql_text import quoted

REPORT, PLOT = "report.md", "report.png"
_MEASURES = ("score", "score_missing_as_zero", "accuracy", "accuracy_missing_as_wrong", "precision", "recall")
_MOST_BARS = 20
_MOST_CLASSES = 30  # of a confusion in the report; the rest is in the table of verdicts


def comparison_query(report: EvaluateReport) -> str:
    """The SQL query that shows this evaluation beside others of the same benchmark."""
    benchmark = quoted(report.benchmark.name)
    return f"SELECT model, answer_recipe, judge, num_judged, score, accuracy FROM scores WHERE benchmark = {benchmark}"


def differences_query(report: EvaluateReport) -> str:
    """The SQL query that shows question by question where another evaluation came to another verdict."""
    return (
        "SELECT a.uri, a.question, a.reference, a.prediction, a.score, a.is_right, "
        "b.model AS other, b.prediction AS other_prediction, b.score AS other_score, b.is_right AS other_is_right\n"
        "FROM verdicts a JOIN verdicts b USING (benchmark, dimension, write_id, question_id, question, reference)\n"
        f"WHERE benchmark = {quoted(report.benchmark.name)} AND a.answer_recipe = {quoted(report.answer_recipe)} "
        f"AND a.judge = {quoted(report.judge)}\n"
        "    AND (b.answer_recipe, b.judge) <> (a.answer_recipe, a.judge)\n"
        "    AND (a.score, a.is_right) IS DISTINCT FROM (b.score, b.is_right)"
    )


def print_evaluation(report: EvaluateReport, saved: Path | None) -> None:
    """Print the metrics, what is missing, and how to go on."""
    told = report.summary()
    console = terminal()
    console.print(f"{told['benchmark']} ({told['dimension']})", style="bold", markup=False, highlight=False)
    for name in ("model", "judge"):
        console.print(f"{name}: {told[name]}", markup=False, highlight=False)
    print_rows(_rows(report))
    lines = [_missing(told)]
    if told["as_reference"]:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in told["as_reference"].items())
        lines.append(f"In the reference's arithmetic (whole scores, what has no reply left out): {shown}.")
    if told["calibration_error"] is not None:
        lines.append(_calibration(told))
    lines.append(f"{told['verdicts_new']} verdicts are new, {told['verdicts_reused']} were known.")
    lines.append(f'Beside other models, settings and judges: longvlm sql --store S "{comparison_query(report)}"')
    if saved is not None:
        lines.append(f"report: {saved}")
    console.print("\n".join(lines), markup=False, highlight=False)


def save_report(report: EvaluateReport, folder: Path) -> Path:
    """Write report.md, and report.png where matplotlib is installed; returns the former."""
    plot = _save_plot(report, folder / PLOT)
    path = folder / REPORT
    path.write_text("\n".join(_markdown(report, plot)) + "\n", encoding="utf-8")
    return path


def _markdown(report: EvaluateReport, plot: Path | None) -> Iterable[str]:
    told = report.summary()
    yield f"# {_cell(told['benchmark'])}\n"
    for name in ("dimension", "model", "answer_recipe", "judge", "run_id"):
        yield f"* {name.replace('_', ' ')}: {_cell(told[name])}"
    if report.stopped:
        yield f"* stopped: {_cell(report.stopped)}"
    yield "\n## Figures\n"
    yield from _table(_rows(report))
    yield f"\n{_missing(told)}"
    if told["calibration_error"] is not None:
        yield f"\n{_calibration(told)}"
    if told["as_reference"]:
        yield f"\nIn the reference's arithmetic: {_cell(told['as_reference'])}."
    yield f"\n![figures]({plot.name})" if plot else f"\n{NO_MATPLOTLIB[0].upper()}{NO_MATPLOTLIB[1:]}"
    if report.is_labels:
        for question in report.by_question():
            yield from _question_section(question)
    yield "\n## Beside others\n\n```sql"
    yield f"{comparison_query(report)};\n\n{differences_query(report)};\n```"


def _question_section(question: dict[str, Any]) -> Iterable[str]:
    yield f"\n## {_cell(question['question'])}\n"
    yield from _table([{"class": name, **figures} for name, figures in question["classes"].items()][:_MOST_CLASSES])
    pairs = [
        {"right answer": right, "given": given, "count": count}
        for right, row in question["confusion"].items()
        for given, count in row.items()
    ]
    yield "\nConfusion, the most frequent first:\n"
    yield from _table(sorted(pairs, key=lambda row: -row["count"])[:_MOST_CLASSES])


def _rows(report: EvaluateReport) -> list[dict[str, Any]]:
    """A row for all, then one a question of labels, or else one a kind of question."""
    if report.is_labels:
        groups = {found["question"]: found for found in report.by_question()}
    else:
        groups = metrics_by_kind(report.results)
    everything = {"all": report.summary() | (report.means() if report.is_labels else {}), **groups}
    known = [name for name in _MEASURES if any(found.get(name) is not None for found in everything.values())]
    return [
        {
            "": name,
            "questions": found["num_questions"],
            "missing": found["num_missing"],
            **{measure.replace("_", " "): _rounded(found.get(measure)) for measure in known},
        }
        for name, found in everything.items()
    ]


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _missing(told: dict[str, Any]) -> str:
    """Whether the averages are of all there is to average."""
    if not told["num_missing"]:
        return f"The averages are over all {told['num_questions']} questions; none is missing."
    why = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in told["missing"].items())
    return (
        f"The averages are over the {told['num_judged']} questions that were judged; {told['num_missing']} of "
        f"{told['num_questions']} ({100 * told['missing_share']:.1f} %) are missing: {why}."
    )


def _calibration(told: dict[str, Any]) -> str:
    return (
        f"Confidences are {100 * told['calibration_error']:.1f} points from the share that is right, on the average "
        "(expected calibration error)."
    )


def _table(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Rows in Markdown."""
    for row in rows[:1]:
        yield f"| {' | '.join(row)} |"
        yield f"|{'---|' * len(row)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row.values()))} |"


def _cell(value: Any) -> str:
    """A value that stays in its cell, and no markup of its own."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\`*_[]<>|" else char for char in text)


def _save_plot(report: EvaluateReport, path: Path) -> Path | None:
    """Bars of the figures by kind or question, the share that is missing as wrong or zero behind them.

    Where these are too many to be told apart, how many of them have which figure.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure, floor = ("accuracy", "accuracy missing as wrong")
    if report.summary()["accuracy"] is None:
        measure, floor = ("score", "score missing as zero")
    rows = _rows(report)
    values = {name: [float(row[name] or 0) for row in rows] for name in (measure, floor)}
    span = (0, 5 if measure == "score" else 1)
    is_crowded = len(rows) > _MOST_BARS + 1
    figure = Figure(figsize=(8, 4 if is_crowded else 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot(title=report.benchmark.name, xlim=span, xlabel=measure)
    if is_crowded:
        known = [value for row, value in zip(rows[1:], values[measure][1:], strict=True) if row[measure]]
        axes.hist(known, bins=20, range=span, color="skyblue", label="questions" if report.is_labels else "kinds")
        axes.axvline(values[measure][0], color="black", linestyle="--", label="all")
        axes.set_ylabel("number")
    else:
        for name, color in ((measure, "lightgrey"), (floor, "skyblue")):
            axes.barh(range(len(rows)), values[name], color=color, label=name)
        for place, row in enumerate(rows):
            axes.text(0.01 * span[1], place, shorten(row[""], 60, placeholder=" ..."), va="center", fontsize=8)
        axes.set_yticks([])
        axes.invert_yaxis()
    figure.legend(loc="outside right upper")
    FigureCanvasAgg(figure).print_png(path)
    return path
