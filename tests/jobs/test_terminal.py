import ast
from pathlib import Path

from rich.table import Table

from longvlm.jobs import terminal
from longvlm.jobs.options import hint, pass_on, say, tell_notes
from longvlm.jobs.terminal import (
    bottleneck,
    print_estimate,
    print_recipes,
    print_report,
    print_rows,
    print_runs,
    print_status,
)

STAGES = {
    "decode": {"done": 8, "workers": 4, "busy_s": 20.0, "cpu_s": 18.0},
    "encode": {"done": 8, "workers": 1, "busy_s": 9.0, "cpu_s": 7.5},
}


def test_the_bottleneck_is_the_stage_whose_workers_are_busiest():
    assert bottleneck(STAGES, wall_s=10.0) == "encode"
    assert bottleneck({}, wall_s=10.0) is None


def test_the_last_lines_name_counts_and_the_bottleneck(capsys):
    print_report("run 1", {"listed": 8, "indexed": 8, "failed": 0}, STAGES, 10.0)
    shown = capsys.readouterr().out
    assert "listed" in shown
    assert "failed" not in shown
    assert next(line for line in shown.splitlines() if "sets the pace" in line).split()[:4] == [
        "encode",
        "1",
        "8",
        "90",
    ]


def test_values_are_shown_as_they_are(capsys):
    print_rows([{"answer": "[red]no markup[/red]", "blob": b"1234", "nothing": None, "score": 0.123456789}])
    shown = capsys.readouterr().out
    for text in (
        "[red]no markup[/red]",
        "<4 bytes>",
        "0.123457",
        "1 row\n",
    ):
        assert text in shown


def test_a_dry_run_says_how_long_or_that_nobody_knows(capsys):
    counts = {"videos": 3, "prefill_tokens": 900, "seconds": 3725.0, "rates_of_run": "run-1"}
    print_estimate(dict(counts))
    shown = capsys.readouterr().out
    assert "about 1 h 2 min at the rates of run run-1" in shown
    assert "900" in shown
    print_estimate({**counts, "seconds": None, "rates_of_run": None})
    assert "no run yet" in capsys.readouterr().out


def test_runs_take_a_line_each(capsys):
    run = {"finished_at": "2026-11-25 03:00:00", "run_id": "r1", "wall_s": 130.4, "stopped": None}
    index = {"listed": 5, "indexed": 3, "failed": 2, "gone": 0, "failures": {"truncated": 2}, "wall_s": 130.4}
    nightly = {
        "index": {**index, "run_id": "r1"},
        "answer": {"asked": 6, "answered": 6, "prefill_tokens": 900},
        "maintain": {},
        "alerts": {"[many] failures": 2},
        "run_id": "r1",
    }
    print_runs(
        [
            {**run, "job": "nightly", "counts": nightly, "stopped": "disk full"},
            {**run, "job": "index", "counts": index | {"out_of_time": True}},
            {**run, "job": "answer", "counts": {}, "wall_s": None},
        ]
    )
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith(
        "2026-11-25 03:00:00  nightly   r1     2 min 10 s  stopped: disk full; "
        "index: listed 5, indexed 3, failed 2 (truncated 2); answer: asked 6, answered 6; maintain: nothing; "
        "alerts: [many] failures 2"
    )
    assert shown[1].endswith("2 min 10 s  listed 5, indexed 3, failed 2 (truncated 2)")
    assert len(shown) == 3
    print_runs([])
    assert "no runs yet" in capsys.readouterr().out


def test_a_report_has_counts_and_failures_in_tables_and_no_python(capsys):
    counts = {"listed": 12345, "failed": 3, "gone": 0, "failures": {"lost": 1, "truncated": 2}, "left_out": {}}
    print_report("run 1", {**counts, "video_seconds": 4321.0, "wall_s": 0.0364, "stopped": None}, {}, 1.0)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["listed", "12,345"] in lines
    assert ["video", "time", "1", "h", "12", "min"] in lines
    assert ["wall", "time", "0.04", "s"] in lines
    assert lines[-3:] == [["failures"], ["truncated", "2"], ["lost", "1"]]


def test_a_store_is_told_in_tables_and_its_last_run_in_a_line(capsys):
    last = {"finished_at": "2026-11-25 03:00:00", "job": "index", "run_id": "r1", "wall_s": 130.4, "stopped": None}
    recipe = {"name": "long", "recipe": "f00d", "active": True, "model": "/models/[m]"}
    status = {"videos": {"indexed": 1234}, "segments": 56789, "token_bytes": 1.25e9, "recipes": [recipe]}
    status["damaged_files"] = {}
    print_status({**status, "last_run": {**last, "counts": {"listed": 1234, "failures": {}}}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [["videos", "indexed", "1,234"], ["segments", "56,789"], ["tokens", "1.2", "GB"]]
    assert ["long", "f00d", "shown", "/models/[m]"] in lines
    assert lines[-2:] == [
        ["last", "run"],
        ["2026-11-25", "03:00:00", "index", "r1", "2", "min", "10", "s", "listed", "1,234"],
    ]
    print_status({**status, "last_run": None})
    assert "last run" not in capsys.readouterr().out


def test_names_of_files_do_not_command_the_terminal(capsys):
    evil, escaped = (
        "/videos/\x1b]0;title\x07\x1b[31m\r\u202e:smile:[b].mp4",
        r"/videos/\x1b]0;title\x07\x1b[31m\r\u202e:smile:[b].mp4",
    )
    console = terminal.terminal()
    table = Table(evil, box=None)
    table.add_row(evil.replace("[b]", ""))
    for show in (
        lambda: terminal.print_rows([{evil: evil, "text": "two\nlines"}]),
        lambda: print_recipes([{"name": evil, "recipe": evil, "active": True, "model": evil}]),
        lambda: print_report(evil, {"failures": {evil: 1}}, {}, 1.0),
        lambda: console.print(evil, markup=False),
        lambda: console.print(table),
        lambda: say(evil),
        lambda: say(evil, err=True),
        lambda: tell_notes([evil]),
        lambda: hint(1, evil, evil),
        lambda: pass_on(evil),
    ):
        show()
        shown = "".join(capsys.readouterr())
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(shown)
        assert escaped in shown or escaped.replace("[b]", "") in shown


def test_a_line_of_a_sentence_is_one_line(capsys):
    say("there is no store at /a\nlongvlm: all is well")
    assert capsys.readouterr().out == "there is no store at /a\\nlongvlm: all is well\n"


def test_nothing_but_json_goes_to_the_terminal_by_another_way():
    jobs = Path(terminal.__file__).parent
    calls = [
        (path.name, ast.unparse(call))
        for path in jobs.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("click.echo", "print", "sys.stdout.write")
    ]
    others = [call for call in calls if call[0] != "results.py"]  # whose texts are made visible as they are read
    assert sorted(others) == [
        ("command.py", "click.echo(err=True)"),
        ("options.py", "click.echo(machine_line(row if kind is None else {'kind': kind, **row}), file=sys.stdout)"),
        ("options.py", "click.echo(visible(text, keep), file=sys.stderr if err else sys.stdout, err=err)"),
        ("options.py", "click.echo(visible(text, keep='\\n'), file=sys.stdout, nl=False)"),
    ]
