import pytest

from longvlm.pipeline.visible import escaped_bytes, is_utf8, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [name].mp4", "plain [name].mp4"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\tb\nc\rd\x7f\x9b2J", r"a\tb\nc\rd\x7f\x9b2J"),
        ("zero\u200bwidth \u202eright", r"zero\u200bwidth \u202eright"),
        ("line\u2028 \ud800", r"line\u2028 \ud800"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\xe9"),
        ("Übung\u3000全角 \U0001f3ac C:\\a", "Übung\u3000全角 \U0001f3ac C:\\a"),
    ],
)
def test_what_a_terminal_would_obey_and_what_nobody_sees_is_written_out(text, shown):
    assert visible(text) == shown


def test_line_breaks_may_stay():
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_bytes_that_are_no_utf_8_are_told_and_escaped_alone():
    name = b"tab\t caf\xe9 \xe2\x80\x8b".decode("utf-8", "surrogateescape")
    assert not is_utf8(name)
    assert escaped_bytes(name) == "tab\t caf\\xe9 \u200b"
    assert is_utf8(escaped_bytes(name))
