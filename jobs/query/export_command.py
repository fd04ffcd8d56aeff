"""The command `export`, which copies a store's tables into one DuckDB file."""

import click

from longvlm.jobs.commands import Command
from longvlm.jobs.figures import spell_bytes
from longvlm.jobs.options import AS_JSON, STORE, say, tell


@click.command(
    cls=Command,
    examples=(
        "longvlm export --store s3://bucket/index --to index.duckdb",
        "longvlm export --store index --to index.duckdb --segments --force",
    ),
)
@STORE
@click.option("--to", "target", required=True, metavar="FILE", help="The DuckDB file to write, ending in .duckdb.")
@click.option("--segments", is_flag=True, help="Take the segments along, with thumbnails and search embeddings.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@AS_JSON
def export(*, store: str, target: str, segments: bool, force: bool, as_json: bool) -> None:
    """Write videos, answers, answers_wide, failures, runs and recipes into one DuckDB file that needs nothing else.

    It holds what the views show now. DuckDB 1.0 and later opens it.
    """
    from longvlm.jobs.query.export import export_store
    from longvlm.jobs.terminal import print_rows

    report = export_store(store, target, segments=segments, force=force)
    if as_json:
        tell(report.as_json())
    else:
        print_rows([{"table": name, "rows": count} for name, count in report.rows.items()])
        say(f"{report.path}: {spell_bytes(report.size_bytes)}")
