"""What every command has: help in groups with examples, `--quiet`, and a line that says what is being done."""

import os
from inspect import cleandoc
from typing import Any

import click

from longvlm.jobs.cluster import activity
from longvlm.schemas.errors import InputError

WHAT, VIDEOS, MODEL, CLUSTER, OUTPUT = "What", "Which videos", "Model and memory", "Cluster", "Output"
GROUPS: dict[str, str] = {  # group -> its options, of one command alone or of all; all others say what is to be done
    WHAT: "sql.file",
    VIDEOS: "where limit include exclude retry_failed restale prune allow_mass_delete sample seed videos uris file",
    MODEL: "model asked_model recipe decode budget budgets tokens_per_segment focus template precision max_new_tokens "
    "temperature top_p kv_gb answer.seed",
    CLUSTER: "ray_address workers max_hours max_failed gpu_price cpu_price address working_dir pip env no_wait",
    OUTPUT: "as_json form quiet dry_run evidence report out yes by search.limit",
}
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


def first_paragraph(command: click.Command) -> str:
    """What a command does, in short."""
    return " ".join(cleandoc(command.help or "").partition("\n\n")[0].split())


def refuse_repeated(above: click.Context, command: click.Command, args: list[str]) -> None:
    """Raise InputError for an option that holds one value and stands twice: click would keep the last, unsaid.

    Args:
        above: the context of the group that the command is of.
        command: any; a group too.
        args: the command's own, before they are parsed. What else is wrong with them is for that to say.
    """
    settings = {**command.context_settings, "ignore_unknown_options": True}
    context = command.context_class(command, parent=above, **settings)
    if isinstance(command, click.Group):
        if args and args[0] in command.commands:
            refuse_repeated(context, command.commands[args[0]], args[1:])
        return
    try:
        _, _, found = command.make_parser(context).parse_args(list(args))
    except click.UsageError:
        return
    given = [option for option in found if isinstance(option, click.Option) and not option.multiple]
    first: dict[str | None, click.Option] = {}  # by what they set, which options that exclude each other share
    for option in given:
        before = first.setdefault(option.name, option)
        if before is not option:
            raise InputError(f"{before.opts[-1]} and {option.opts[-1]} exclude each other; leave one of them out.")
        if given.count(option) > 1 and not option.is_flag:
            raise InputError(f"{option.opts[-1]} is given more than once, and holds one value; leave one of them out.")


class Command(click.Command):
    """A command of the command line.

    Args:
        examples: command lines that can be pasted.
    """

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = examples
        self.params.append(
            click.Option(
                ["--quiet"], is_flag=True, help="Only results, notes and errors: nothing of what is being done."
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and show what it does where a person looks."""
        is_quiet = ctx.params.pop("quiet")
        for_machines = ctx.params.get("as_json") or ctx.params.get("form") or os.environ.get("LONGVLM_LOG")
        with activity.shown(show=not (is_quiet or for_machines)):
            activity.doing("loading libraries")
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        records: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and record[1]:  # of an argument the text above tells
                records[self._group_of(param)].append(record)
        for group, found in records.items():
            if found:
                with formatter.section(group):
                    formatter.write_dl(found)

    def _group_of(self, param: click.Parameter) -> str:
        if "--help" in param.opts:
            return OUTPUT
        return _GROUP_OF.get(f"{self.name}.{param.name}") or _GROUP_OF.get(param.name or "", WHAT)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each on one line, however long."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"  {example}\n")
