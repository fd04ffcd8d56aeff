"""The command `train`: conversations and stored tokens to a fine-tuned model."""

from typing import Any

import click

from longvlm.jobs.cluster.activity import is_shown
from longvlm.jobs.commands import Command
from longvlm.jobs.options import AS_JSON, MODEL_VARIABLE, RAY, STORE, hint, say, stop_if, tell, tell_notes

SHOWN_REFUSED = 5  # to a person; all are in refused.jsonl


@click.command(
    cls=Command,
    examples=(
        "longvlm train --store index --model tinyworld --data conversations.jsonl --to trained",
        "longvlm train --store index --model tinyworld --data labels.csv --recipe lora --to trained --ray-address none",
    ),
)
@STORE
@click.option(
    "--model",
    required=True,
    metavar="M",
    envvar=MODEL_VARIABLE,
    help="Folder or hub id of a model, or of a base LLaMA that a LongVLM is made of; or tinyworld.",
)
@click.option("--to", required=True, metavar="FOLDER", help="Where the trained model goes; workers must reach it.")
@click.option(
    "--data",
    metavar="FILE",
    help="Conversations (id, video, conversations) or rows (video_id, q, a): CSV, TSV, JSON, JSONL or parquet.",
)
@click.option("--sql", metavar="QUERY", help="Instruction rows by a query over the store instead, as for sql.")
@click.option(
    "--recipe", default="projector", show_default=True, metavar="NAME|FILE", help="projector, full, lora, or TOML."
)
@click.option("--workers", type=click.IntRange(min=1), help="How many train together; default: one for each GPU, or 1.")
@RAY
@AS_JSON
def train(*, recipe: str, as_json: bool, **options: Any) -> None:
    """Train a model on conversations about the videos of a store, from their tokens; no video is opened.

    The same command goes on where a run was interrupted. Answer with the result: `longvlm answer --model FOLDER`.
    """
    from longvlm.jobs.choose import choose_train_recipe
    from longvlm.jobs.terminal import print_report
    from longvlm.jobs.train.run import TrainOrder, run_train

    report = run_train(TrainOrder(recipe=choose_train_recipe(recipe), show_progress=is_shown(), **options))
    counts = report.as_json()
    if as_json:
        tell(counts)
    else:
        stopped = counts.pop("stopped")
        print_report(f"run {counts.pop('run_id')}" + (" (stopped)" if stopped else ""), counts, {}, report.wall_s)
        hint(
            report.plan.num_missing,
            "conversations about no indexed video",
            f"one of them names {report.plan.first_missing}",
        )
    for refused in report.refused[:SHOWN_REFUSED]:
        say("longvlm: left out {id} ({video}): {error}".format(**refused), err=True)
    if not as_json:
        hint(max(len(report.refused) - SHOWN_REFUSED, 0), "left out besides", "refused.jsonl in the folder lists all")
    tell_notes(report.notes)
    stop_if(report.stopped)
