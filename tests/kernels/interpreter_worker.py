"""The worker of conftest.py: reads node ids from standard input, answers each with a JSON line [outcome, text].

It is a plain pytest run per test in one process, so imports and rewritten kernels are paid for once. Only the
conftest.py beside this file applies: the kernels need nothing of the trainer, and nor do their tests.
"""

import json
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class Recorder:
    """Remembers what became of the one test that is run: a failure wins over a skip, a skip over a pass."""

    def __init__(self) -> None:
        self.outcome, self.text = "failed", "the test was not found"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.text = report.longreprtext

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome, self.text = "failed", "\n".join([report.longreprtext, *(body for _, body in report.sections)])
        elif report.skipped:
            self.outcome, self.text = "skipped", str(report.longrepr[2] if report.longrepr else "")
        elif report.when == "setup":
            self.outcome, self.text = "passed", ""


def main() -> None:
    """Answers go to the real standard output; what pytest and the tests print there is thrown away."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        recorder = Recorder()
        pytest.main(["-q", "-p", "no:cacheprovider", f"--confcutdir={HERE}", line.strip()], plugins=[recorder])
        print(json.dumps([recorder.outcome, recorder.text]), file=answers, flush=True)


if __name__ == "__main__":
    main()
