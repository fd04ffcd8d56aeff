"""Correctness on the device: the project's own tests, in float32 against the CPU, without TF32, and in bfloat16."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.section import Run, check

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    "tests/pipeline/vision",
    "tests/pipeline/models",
    "tests/pipeline/engine",
    "tests/pipeline/training",
    "tests/pipeline/test_transfer.py",
)
# A rehearsal reads all of them, so that none needs what a bare checkout lacks, and runs quick ones of each kind.
FEW = (
    "tests/pipeline/vision/test_precision.py",
    "tests/pipeline/engine/test_precision.py",
    "tests/pipeline/models/test_row_layout.py",
    "tests/pipeline/test_transfer.py",
)
MARK, ERROR = "device", "max_error"  # of such a test, and the property in which it leaves its largest difference


class OutcomeCounter:
    """A plugin of pytest that counts."""

    def __init__(self, run: Run) -> None:
        self.run, self.noted_s = run, time.monotonic()
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.errors: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Of a rehearsal leave out what takes long."""
        if self.run.is_tiny:
            few = {ROOT / path for path in FEW}
            items[:] = [item for item in items if item.path in few]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read has failed."""
        if report.failed:
            self._fail(report.nodeid, _reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test is over."""
        if report.failed:
            self._fail(report.nodeid, _reason(report))
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        largest = max((float(str(value)) for name, value in report.user_properties if name == ERROR), default=None)
        if largest is not None:
            self.errors[report.nodeid] = largest
        if time.monotonic() > self.noted_s + 1:
            self.noted_s = time.monotonic()
            self.note()

    def _fail(self, test: str, reason: str) -> None:
        self.counts["failed"] += test not in self.failed
        self.failed.setdefault(test, reason)

    def note(self) -> None:
        """So far."""
        largest = sorted(self.errors.items(), key=lambda item: item[1], reverse=True)
        found: dict[str, Any] = {**self.counts, "max_error": largest[0][1] if largest else None}
        self.run.note(**found, largest=dict(largest[:10]), failures=self.failed)


def run(run: Run) -> None:
    """Run them in this process, whose libraries are there already."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tally = OutcomeCounter(run)
    paths = [str(ROOT / path) for path in FOLDERS]
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    options += ["--continue-on-collection-errors", "--device", run.device.type, "-m", MARK]
    code = pytest.main([*options, *paths], plugins=[tally])
    tally.note()
    for test, reason in tally.failed.items():
        run.say(f"{test}: {reason}")
    largest = max(tally.errors.values(), default=None)
    run.say(", ".join(f"{count} {name}" for name, count in tally.counts.items()) + f"; largest difference {largest}")
    check(not tally.failed, f"{len(tally.failed)} of the tests failed, {next(iter(tally.failed), '')} for one.")
    check(code == pytest.ExitCode.OK, f"pytest ended with exit code {int(code)}; the log says why.")
    check(tally.counts["passed"] > 0, "no test was run.")
    check(largest is not None, f"no test told how far the device is from the CPU ({ERROR}).")


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """In a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line.removeprefix("E").strip() for line in text.strip().splitlines()]
    return lines[0 if crash is not None else -1] if lines else ""
