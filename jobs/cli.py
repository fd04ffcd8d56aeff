"""The command line: commands read options, run one job each and print what came of it. Only this file exits.

It knows the rooms' commands, and no file in a room knows it.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

import gc
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from longvlm.jobs.answer.command import answer
from longvlm.jobs.cluster.logs import start_driver
from longvlm.jobs.cluster.resources import COLLECT_EVERY
from longvlm.jobs.cluster.trouble import trouble
from longvlm.jobs.commands import Command, first_paragraph, refuse_repeated
from longvlm.jobs.compare.command import compare
from longvlm.jobs.defaults import read_defaults
from longvlm.jobs.evaluate.command import evaluate
from longvlm.jobs.index.command import index
from longvlm.jobs.interrupts import is_interrupt, leave, pressed_until_heard
from longvlm.jobs.operate.command import doctor, nightly, submit
from longvlm.jobs.operate.upkeep_command import forget, maintain
from longvlm.jobs.options import STOPPED, StoppedError, say
from longvlm.jobs.own_output import LostOutputError, own_output
from longvlm.jobs.query.command import recipe, search, sql, status
from longvlm.jobs.query.export_command import export
from longvlm.jobs.serve.command import serve
from longvlm.jobs.train.command import train
from longvlm.schemas.errors import InputError, QueryError

COMMANDS = {  # in the order of `longvlm --help`
    "Watch and ask": "demo index answer search",
    "Look at what there is": "serve sql export status recipe",
    "Train and measure": "train evaluate compare",
    "Every night, and on clusters": "nightly maintain forget submit doctor",
}
WRONG_INPUT = 2  # exit code, beside STOPPED; 0 means that everything is accounted for


class Cli(click.Group):
    """Turns what ends a command early into one sentence on stderr and an exit code.

    2 is for wrong input, 1 for a job that stopped or met trouble of the machine's, 130 for Ctrl-C.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line."""
        gc.set_threshold(COLLECT_EVERY)
        with own_output(), pressed_until_heard():
            return super().main(*args, **options)

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, those of a kind together, each with all of its first paragraph."""
        for kind, names in COMMANDS.items():
            with formatter.section(kind):
                formatter.write_dl([(name, first_paragraph(self.commands[name])) for name in names.split()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that the arguments name, once they hold nothing twice that it takes once."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            refuse_repeated(ctx, command, rest)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            # DuckDB's own words for a query have lines, and below one of it a mark at the place
            _leave(str(error), WRONG_INPUT, keep="\n\t" if isinstance(error, QueryError) else "")
        except StoppedError as reason:
            _leave(str(reason), STOPPED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, LostOutputError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if is_interrupt(error):
                leave()
            if said := trouble(error):
                _leave(f"{said} What was finished is kept.", STOPPED)
            raise


def _leave(said: str, code: int, keep: str = "") -> NoReturn:
    say(f"longvlm: {said}", err=True, keep=keep)
    sys.exit(code)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="longvlm-index")
@click.pass_context
def main(context: click.Context) -> None:
    """Watch every video of a bucket once; ask anything of what was kept, as often as you like.

    The store, model and Ray address may be given once: what is on the command line holds, else LONGVLM_STORE,
    LONGVLM_MODEL and LONGVLM_RAY_ADDRESS, else store, model and ray_address in longvlm.toml of the working folder, else
    in that of your configuration folder.
    """
    start_driver()
    context.default_map = read_defaults(main)


@main.command(cls=Command, examples=("longvlm demo", "longvlm demo --folder demo --seed 7"))
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where to leave videos and store; default: a new temporary folder.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the videos and questions; default: drawn, and told.")
def demo(*, folder: Path | None, seed: int | None) -> None:
    """Make six small videos, index them, ask about them and print answers beside the truth: on a CPU, offline."""
    from longvlm.jobs.demo import run_demo

    run_demo(folder, seed)


LOOKING = (serve, sql, export, search, status, recipe)
for command in (index, answer, *LOOKING, compare, evaluate, train, maintain, forget, nightly, submit, doctor):
    main.add_command(command)
