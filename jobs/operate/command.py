"""The commands `nightly`, `submit` and `doctor`."""

from typing import Any

import click
from click.core import ParameterSource

from longvlm.jobs.cluster.activity import doing, is_shown
from longvlm.jobs.commands import Command
from longvlm.jobs.figures import counted
from longvlm.jobs.options import AS_JSON, MODEL, RAY, STORE, hint, pass_on, say, stop_if, tell, tell_notes


@click.command(
    cls=Command,
    examples=(
        "longvlm nightly s3://bucket/videos --store s3://bucket/index --questions standing.jsonl",
        "longvlm nightly videos --store index --questions standing.csv --max-hours 6 --quiet",
    ),
)
@click.argument("source")
@STORE
@MODEL
@click.option("--questions", metavar="FILE", help="Standing questions, asked of every video once: as for answer.")
@click.option(
    "--alerts",
    metavar="FILE",
    help="Named queries (SQL); those that return rows are alerts. Default: a few of its own.",
)
@click.option(
    "--webhook", metavar="URL", envvar="LONGVLM_WEBHOOK", help="Where alerts are posted; better in LONGVLM_WEBHOOK."
)
@click.option("--include", multiple=True, metavar="GLOB", help="As for index.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="As for index.")
@click.option("--allow-mass-delete", is_flag=True, help="Delete even more than a fifth of what is known of the source.")
@click.option("--max-hours", type=click.FloatRange(min=0, min_open=True), help="For watching and answering together.")
@click.option("--max-failed", type=click.FloatRange(0, 1), default=0.2, show_default=True, help="As for index.")
@click.option("--retention-hours", type=float, default=48, show_default=True, help="As for maintain.")
@RAY
@AS_JSON
def nightly(*, source: str, include: tuple[str, ...], exclude: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Index what changed in SOURCE and delete what is gone, ask the standing questions, maintain, alert.

    For a scheduler: while another nightly is at work on the same store, it says so and does nothing.
    """
    from longvlm.jobs.index.order import IndexOrder
    from longvlm.jobs.operate.nightly import NightlyOrder, run_nightly
    from longvlm.pipeline.source.corpus import Source
    from longvlm.pipeline.store.lease import LeaseHeldError

    own = {name: options.pop(name) for name in ("questions", "alerts", "webhook", "retention_hours")}
    index = IndexOrder(Source(source, include, exclude), show_progress=is_shown(), **options)
    try:
        report = run_nightly(NightlyOrder(index, **own))
    except LeaseHeldError as held:
        if as_json:
            tell({"skipped": str(held)})
        else:
            say(f"longvlm: nothing to do here: {held}.")
        return
    if as_json:
        tell(report.as_json())
    else:
        _print_night(report)
    tell_notes(report.notes)
    stop_if(report.stopped)


def _print_night(report: Any) -> None:
    """Print a table for each part of a night."""
    from longvlm.jobs.terminal import print_report

    for part, counts in report.parts.items():
        told = {name: value for name, value in counts.items() if type(value) is int or name == "failures"}
        prefix = f"{part}."
        stages = {name.removeprefix(prefix): found for name, found in report.stages.items() if name.startswith(prefix)}
        print_report(part, told, stages, counts.get("wall_s", 0.0))
    raised = report.parts.get("alerts", {}).get("raised", {})
    for name, num_rows in raised.items():
        say(f"alert: {name} ({counted(num_rows, 'row')})")
    say(f"run {report.run_id}")
    index = report.parts.get("index", {})
    hint(
        index.get("known_failed", 0),
        "known to fail and unchanged",
        "`longvlm index --retry-failed` tries them again",
    )
    if index.get("mostly_failed"):
        say(f"{index['mostly_failed']}.")


JOBS = ("index", "answer", "train", "maintain", "nightly")  # that can be submitted


@click.command(
    context_settings={"ignore_unknown_options": True},
    cls=Command,
    examples=(
        "longvlm submit --address http://HEAD:8265 index s3://bucket/videos --store s3://bucket/index",
        "longvlm submit --address http://HEAD:8265 --no-wait maintain --store s3://bucket/index",
    ),
)
@click.argument("job", type=click.Choice(JOBS))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option("--address", required=True, metavar="URL", help="The cluster's dashboard: http://HEAD:8265.")
@click.option("--working-dir", metavar="DIR", help="A folder to send along; relative paths in ARGS count from there.")
@click.option("--pip", multiple=True, metavar="REQ", help="A requirement that the cluster lacks; may be repeated.")
@click.option(
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="For the job's environment; may be repeated. Secrets are better kept in the cluster's own.",
)
@click.option("--no-wait", is_flag=True, help="Only send it off.")
def submit(*, job: str, args: tuple[str, ...], address: str, no_wait: bool, **options: Any) -> None:
    """Run a JOB (index, answer, train, maintain or nightly) with its ARGS on a Ray cluster, and follow it.

    Ends with the exit code of the job. Where the cluster wants a token, it is taken from RAY_AUTH_TOKEN.
    """
    from longvlm.jobs.options import STOPPED

    context = click.get_current_context()
    root = context.find_root()  # the command line, which knows every job
    assert isinstance(root.command, click.Group)
    _, command, rest = root.command.resolve_command(root, [job, *args])
    assert command is not None
    asked = command.make_context(job, rest, parent=root)  # a slip of the pen is told now
    args = (*_from_here(asked), *(() if is_shown() else ("--quiet",)), *args)

    from longvlm.jobs.operate.submit import JobSubmission, read_env, submit_job

    env = read_env(options.pop("env"))
    submitted = submit_job(JobSubmission((job, *args), address, env=env, **options))
    try:  # from here on the job runs whatever happens to this process
        say(f"longvlm: {submitted.job_id} is on its way; {submitted.follow_hint}", err=True)
        if no_wait:
            return
        doing(f"waiting for {submitted.job_id} to begin")
        exit_code, said = submitted.follow(pass_on)
    except KeyboardInterrupt:
        click.echo(err=True)
        say(f"longvlm: the job goes on; {submitted.follow_hint}.", err=True)
        context.exit(STOPPED)
    except ConnectionError as error:
        say(f"longvlm: {error}; the job may go on; {submitted.follow_hint}.", err=True)
        context.exit(STOPPED)
    if exit_code is None:
        stop_if(f"{submitted.job_id} ended as {said}")
    context.exit(exit_code or 0)


def _from_here(asked: click.Context) -> tuple[str, ...]:
    """What a job's options have from the environment or a file here, neither of which is there."""
    elsewhere = (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
    names = [name for name in ("store", "model") if asked.get_parameter_source(name) in elsewhere]
    return tuple(word for name in names for word in (f"--{name}", asked.params[name]))


@click.command(
    cls=Command,
    examples=(
        "longvlm doctor s3://bucket/videos --store s3://bucket/index --ray-address HEAD:6379",
        "longvlm doctor videos --store index --model tinyworld",
    ),
)
@click.argument("source")
@STORE
@MODEL
@RAY
@AS_JSON
def doctor(*, source: str, store: str, model: str | None, ray_address: str | None, as_json: bool) -> None:
    """Try from a worker of every node what a run over SOURCE needs, and say in words what is wrong.

    Nothing stays behind: what is written to try the store is removed again.
    """
    from longvlm.jobs.operate.doctor import DoctorOrder, print_findings, run_doctor
    from longvlm.jobs.options import STOPPED

    findings = run_doctor(DoctorOrder(source, store, model), ray_address)
    if as_json:
        for finding in findings:
            tell(vars(finding))
    else:
        print_findings(findings)
    if not all(finding.ok for finding in findings):
        click.get_current_context().exit(STOPPED)
