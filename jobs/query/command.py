"""The commands `sql`, `search` and `status`, which only read a store, and `recipe`, which sets what its views show."""

from typing import Any

import click

from longvlm.jobs.commands import Command
from longvlm.jobs.figures import counted, spell_bytes
from longvlm.jobs.options import AS_JSON, MODEL, STORE, WHERE, say, tell, tell_notes


class _SqlCommand(Command):
    """The command `sql`, whose statements may begin with a comment: two dashes and a space, or another line below."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; a space keeps such statements from being taken for an option."""
        is_sql = (arg.startswith("--") and (arg[2:3].isspace() or "\n" in arg) for arg in args)
        return super().parse_args(ctx, [f" {arg}" if yes else arg for arg, yes in zip(args, is_sql, strict=True)])


@click.command(
    cls=_SqlCommand,
    examples=(
        'longvlm sql --store index "SELECT status, count(*) FROM videos GROUP BY status"',
        'longvlm sql --store index --attach plan=shifts.csv "SELECT * FROM videos JOIN plan USING (external_id)"',
    ),
)
@STORE
@click.argument("query", required=False)
@click.option("-f", "--file", metavar="FILE", help="Read the statements from FILE, instead of from QUERY.")
@click.option(
    "--attach",
    multiple=True,
    metavar="NAME=FILE",
    help="A parquet, CSV or JSON file as the view NAME, or a DuckDB file as the database NAME; repeatable.",
)
@click.option("--csv", "form", flag_value="csv", help="Print every row as CSV.")
@click.option("--markdown", "form", flag_value="markdown", help="Print every row as a table of Markdown.")
@click.option("--line", "form", flag_value="line", help="Print every value whole, in a line of its own.")
@click.option("--json", "form", flag_value="json", help="Print every row for machines: as a JSON object, one a line.")
def sql(*, store: str, query: str | None, file: str | None, attach: tuple[str, ...], form: str | None) -> None:
    """Run SELECTs over the views: videos, segments, tokens, answers, answers_wide, failures, recipes, runs.

    QUERY is one statement or several; without it they come from standard input. They can read the store and what is
    attached, and nothing else; they change nothing. What is shown is as wide as the terminal, with dots for the columns
    and rows in between.
    """
    from longvlm.jobs.interrupts import ended_by_ctrl_c
    from longvlm.jobs.query.results import print_results
    from longvlm.jobs.query.sql import read_script, sealed_store

    script = read_script(query, file)
    with ended_by_ctrl_c(), sealed_store(store, attach) as con:
        print_results(con, script, form or "box")


@click.command(
    cls=Command,
    examples=(
        'longvlm search --store index "a forklift near people"',
        'longvlm search --store index "an empty street" --where "duration_s > 60" --limit 3 --json',
        'longvlm search --store index "a forklift" --verify "Is anybody near the forklift?" --by yes',
    ),
)
@STORE
@click.argument("text")
@WHERE
@click.option("--limit", type=click.IntRange(min=1), default=10, show_default=True, help="How many hits to show.")
@click.option(
    "--verify",
    is_flag=False,
    flag_value="",
    metavar="[QUESTION]",
    help="Ask a model about what is stored of each hit, and show its yes; default question: is there TEXT?",
)
@MODEL
@click.option(
    "--by",
    type=click.Choice(["score", "yes"]),
    default="score",
    show_default=True,
    help="What comes first: the nearest, or what the model says yes to.",
)
@AS_JSON
def search(*, as_json: bool, **options: Any) -> None:
    """Find the moments that look most like TEXT says, to the second.

    A hit is a moment and those beside it that are about as near. --verify opens no video: it reads the tokens of the
    segment and its neighbours. It is written behind TEXT, since what follows it is taken for its question.
    """
    from longvlm.jobs.query.search import SearchOrder, find_moments
    from longvlm.jobs.terminal import print_rows

    found = find_moments(SearchOrder(**options))
    if as_json:
        for hit in found.hits:
            tell(hit, "moment")
        asked = {} if found.question is None else {"question": found.question}
        tell({"num_scanned": found.num_scanned, "bytes_scanned": found.bytes_scanned, **asked}, "summary")
    else:
        print_rows([{name: _short(value) for name, value in hit.items()} for hit in found.hits])
        say(f"scanned {counted(found.num_scanned, 'moment')}, {spell_bytes(found.bytes_scanned)}")
    tell_notes(found.notes)


def _short(value: Any) -> Any:
    """A number with as many digits as a person compares."""
    return round(value, 3) if isinstance(value, float) else value


@click.command(
    cls=Command,
    examples=(
        "longvlm status --store index",
        "longvlm status --store s3://bucket/index --runs 5",
    ),
)
@STORE
@click.option(
    "--runs",
    is_flag=False,
    flag_value=20,
    type=click.IntRange(min=1),
    metavar="[N]",
    help="The last N runs instead (20), a line each: when it ended (UTC), job, id, how long it took, its counts.",
)
@AS_JSON
def status(*, store: str, runs: int | None, as_json: bool) -> None:
    """What a store holds: videos by status, segments, bytes of tokens, recipes, the last run."""
    from longvlm.jobs.query.status import describe_store, list_runs
    from longvlm.jobs.terminal import print_runs, print_status

    if runs is not None:
        listed = list_runs(store, runs)
        if as_json:
            for run in listed:
                tell(run)
        else:
            print_runs(listed)
        return
    described = describe_store(store)
    if as_json:
        tell(described)
    else:
        print_status(described)


@click.group()
def recipe() -> None:
    """List the recipes of a store, or choose the one that its views show."""


@recipe.command(
    "list",
    cls=Command,
    examples=(
        "longvlm recipe list --store index",
        "longvlm recipe list --store s3://bucket/index --json",
    ),
)
@STORE
@AS_JSON
def recipe_list(*, store: str, as_json: bool) -> None:
    """The recipes that a store holds tokens of."""
    from longvlm.jobs.query.status import list_recipes
    from longvlm.jobs.terminal import print_recipes
    from longvlm.pipeline.store.ledger import Store

    recipes = list_recipes(Store.open(store))
    if as_json:
        for stored in recipes:
            tell(stored)
    else:
        print_recipes(recipes)


@recipe.command(
    "promote",
    cls=Command,
    examples=(
        "longvlm recipe promote --store index long",
        "longvlm recipe promote --store s3://bucket/index long-keyframe",
    ),
)
@STORE
@click.argument("name")
def recipe_promote(*, store: str, name: str) -> None:
    """Make the recipe NAME (or its fingerprint) the one that all views show; promote another to switch back."""
    from longvlm.jobs.runs import refresh_index
    from longvlm.pipeline.store.ledger import Store

    opened, notes = Store.open(store), list[str]()
    opened.promote(name)
    refresh_index(opened, notes)
    say(f"the views of {store} now show the recipe {name}")
    tell_notes(notes)
