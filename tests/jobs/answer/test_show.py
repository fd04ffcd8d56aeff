from longvlm.jobs.answer.show import print_answers


def answered(**columns):
    row = {"uri": "/a.mp4", "question": "[What]?", "type": "text", "status": "answered", "answer": "[/x]"}
    return {**row, "confidence": None, "evidence": None, "error_code": None, "error": None, **columns}


def test_an_answer_says_how_sure_it_is_what_it_leans_on_and_why_it_is_none(capsys):
    evidence = [{"start_s": 12.0, "end_s": 18.0, "weight": 0.41}]
    rows = [
        answered(type="bool", answer="Yes", confidence=0.87, evidence=evidence),
        answered(type="number", answer="a few", status="unparsed"),
        answered(status="failed", error_code="bad_tokens", error="the tokens are NaN."),
    ]
    print_answers(rows)
    assert "0:12-0:18" not in capsys.readouterr().out
    print_answers(iter(rows), evidence=True)
    shown = capsys.readouterr().out
    for text in (
        "  Yes (87 %)\n",
        "  0:12-0:18 (41 %)\n",
        "  no number to be read from: a few\n",
        "  failed (bad_tokens): the tokens are NaN.\n",
    ):
        assert text in shown


def test_answers_about_several_videos_stand_by_question_and_paths_are_short(capsys):
    videos = ("s3://b/cam/1/a.mp4", "s3://b/cam/10/a.mp4")
    print_answers(answered(uri=uri, question=asked, answer=asked[0]) for uri in videos for asked in ("What?", "Why?"))
    assert capsys.readouterr().out.splitlines() == [
        "videos in s3://b/cam",
        "What?",
        "  1/a.mp4   W",
        "  10/a.mp4  W",
        "Why?",
        "  1/a.mp4   W",
        "  10/a.mp4  W",
    ]


def test_answers_about_one_video_stand_by_video(capsys):
    print_answers([answered(question="What?"), answered(question="Why?", answer="so")])
    assert capsys.readouterr().out.splitlines() == ["/a.mp4", "  What?  [/x]", "  Why?  so"]


def test_names_and_answers_do_not_command_the_terminal(capsys):
    evil = "/v/\x1b[31m.mp4"
    print_answers([answered(uri=evil, question=evil, answer=evil), answered(status="failed", error=evil)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"\x1b[31m.mp4" in shown
