"""The first hour as docs/first-hour.md tells it: its blocks are run as printed, and what they print stands there.

`LONGVLM_WRITE_DOCS=1 pytest tests/test_first_hour.py` writes what is printed into the document.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from longvlm.jobs.cli import main
from support import ROOT

DOCUMENT = ROOT / "docs" / "first-hour.md"
_RUN = re.compile(r"^```sh\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
_LOCAL_S3 = "http://127.0.0.1:5000"


class Session:
    """A shell in a folder of its own; `longvlm` runs in this process, which starts it once and not a dozen times."""

    def __init__(self, monkeypatch, endpoint):
        self.monkeypatch, self.endpoint = monkeypatch, endpoint

    def run(self, block):
        """What a block prints on standard output."""
        if block.startswith("longvlm "):
            return "".join(map(self._longvlm, block.splitlines()))
        for name, value in re.findall(r"^export (\w+)=(.*)$", block, re.MULTILINE):
            self.monkeypatch.setenv(name, value.replace(_LOCAL_S3, self.endpoint))
        script = re.sub(r"^export .*\n", "", block, flags=re.MULTILINE)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["/bin/sh", "-ec", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _longvlm(self, line):
        done = CliRunner().invoke(main, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}"
        return done.stdout


def shape(text):
    """A document without what differs from run to run: figures, and the widths of tables that hold them."""
    text = text.replace("<- sets the pace", "")
    text = re.sub(r"\d{8}T\d{6}-[0-9a-f]{6}", "RUN", text)
    text = re.sub(r"/\S*/(?=clips|mine|index|tinyworld)", "", text)
    text = re.sub(r"(?:\d[\d.,:]*(?: (?:h|min|s|ms|%|[kMGT]?B|bytes?))?[ ]?)+", "# ", text)
    lines = [re.sub(r"[ ─]+", " ", line).strip() for line in text.splitlines()]
    return [line for line in lines if line != "read time #"]  # which is told where there was any


@pytest.mark.skipif(sys.platform == "win32", reason="its blocks are for sh")
def test_the_first_hour_goes_as_it_is_told(tmp_path, monkeypatch, s3_endpoint, empty_s3):
    empty_s3()
    monkeypatch.chdir(tmp_path)
    for name, value in {"RAY_ADDRESS": "none", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    session = Session(monkeypatch, s3_endpoint)

    def written(match):
        printed = session.run(match[1]).replace(f"{tmp_path}/", "~/").replace(f"{ROOT}/", "~/longvlm-index/")
        lines = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
        return f"```sh\n{match[1]}```\n" + (f"\n```text\n{lines}```\n" if lines else "")

    told = DOCUMENT.read_text()
    try:
        ran = _RUN.sub(written, told)
    finally:
        empty_s3()
    if os.environ.get("LONGVLM_WRITE_DOCS"):
        DOCUMENT.write_text(ran)
    assert shape(DOCUMENT.read_text()) == shape(ran)
