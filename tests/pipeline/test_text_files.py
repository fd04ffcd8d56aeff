import re

import fsspec
import pytest

from longvlm.pipeline.text_files import UserFile, open_file, read_lines
from longvlm.schemas.errors import InputError


def test_sentences_name_a_file_and_its_rows():
    file = UserFile("s3://b/f.csv", "manifest")
    assert (str(file), file.row(0)) == ("the manifest s3://b/f.csv", "row 1 of the manifest s3://b/f.csv")


def test_an_address_with_a_secret_is_refused_before_any_sentence_tells_it():
    with pytest.raises(InputError, match="holds a password, a key or a signature") as caught:
        UserFile("https://host/f.csv?X-Amz-Signature=SECRET", "manifest")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("newline", "lines"), [(None, ["a\n", "é\n", "\u2028\n", "b"]), ("", ["a\r\n", "é\r", "\u2028\n", "b"])]
)
def test_lines_end_at_line_breaks_alone(tmp_path, encoding, newline, lines):
    (tmp_path / "f.txt").write_bytes("a\r\né\r\u2028\nb".encode(encoding))
    assert list(read_lines(UserFile(str(tmp_path / "f.txt"), "list"), newline)) == lines


@pytest.mark.parametrize(
    ("byte", "says"),
    [
        (b"\x84", "0x84, which Windows-1252 (Latin-1) has for '„'"),
        (b"\xff", "0xFF, which Windows-1252 (Latin-1) has for 'ÿ'"),
    ],
)
def test_the_first_bad_byte_is_told_with_its_line(tmp_path, byte, says):
    (tmp_path / "f.txt").write_bytes("é\n".encode() * 9000 + b"it" + byte + b"s\n")
    read = read_lines(UserFile(str(tmp_path / "f.txt"), "list"))
    assert next(read) == "é\n"
    sentence = f"line 9001 of the list {tmp_path}/f.txt is not UTF-8 text: it has the byte {says}; save it as UTF-8."
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}$"):
        list(read)


def test_a_connection_that_breaks_in_the_middle_is_a_sentence(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/f.txt", b"a\n" * 100_000)
    opened = memory.open("/f.txt", "rb")
    reads = iter([b"a\na\n"])

    def read(_size=-1):
        for content in reads:
            return content
        raise TimeoutError("slow")

    monkeypatch.setattr(opened, "read", read)
    monkeypatch.setattr(opened, "read1", read)
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: opened)
    with pytest.raises(
        InputError, match=r"the list memory:///f\.txt cannot be read: TimeoutError: slow; check the add"
    ):
        list(read_lines(UserFile("memory:///f.txt", "list")))


def test_a_file_is_closed_when_it_was_read(tmp_path):
    (tmp_path / "f.txt").write_text("a")
    with open_file(UserFile(str(tmp_path / "f.txt"), "list")) as opened:
        assert opened.read() == b"a"
    assert opened.closed
