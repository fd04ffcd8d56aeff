from jobs.report import bottleneck, print_answers, print_report, print_rows, print_status

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
    print_answers(
        [{"uri": "/a.mp4", "question_id": "q", "question": "[What]?", "status": "answered", "answer": "[/x]"}]
    )
    print_status({"recipes": [{"name": "long", "active": True}], "segments": 3})
    shown = capsys.readouterr().out
    for text in (
        "[red]no markup[/red]",
        "<4 bytes>",
        "0.123457",
        "1 rows",
        "[What]?",
        "[/x]",
        "name long, active True",
    ):
        assert text in shown
