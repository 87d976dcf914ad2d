"""The README's table "What has been run, and where": rows from docs/support/rows.yaml, numbers from what ran.

python tools/support.py tests    the rows' tests, for pytest --record-support
python tools/support.py table    write the table into README.md

A test session with --record-support leaves the counts of each of the rows' tests that it ran in
docs/support/<Python>-<megatron-core>-<device>.json, dated; those it did not run stay as they were, and so do those of
which it skipped some that had passed there, with their date.
"""

import argparse
import importlib.metadata
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "support"
BEGIN, END = "<!-- begin: tools/support.py table -->", "<!-- end -->"
NOT_RUN, NOT_ON_A_GPU = "–", "not yet run"
ENDINGS = ("passed", "skipped", "failed")


@dataclass(frozen=True)
class Row:
    """A feature. tests: what is counted; parts: of gpu-day. gpu: the GPU's cell until one of them has run there."""

    feature: str
    shown: str
    tests: tuple[str, ...]
    parts: tuple[str, ...] = ()
    gpu: str = NOT_ON_A_GPU

    @staticmethod
    def of(raw: dict[str, Any]) -> "Row":
        return Row(**raw | {"tests": tuple(raw["tests"]), "parts": tuple(raw.get("parts", ()))})


def rows(folder: Path = FOLDER) -> list[Row]:
    """In the order of the table; TypeError for a key that no row has."""
    return [Row.of(raw) for raw in yaml.safe_load((folder / "rows.yaml").read_text(encoding="utf-8"))]


def covers(test: str, node: str) -> bool:
    """Whether ``test`` of a row - a folder, a file or a function - holds pytest's ``node`` (xdist adds ``@group``)."""
    return node.startswith(test) and node[len(test) :][:1] in ("", "/", ":", "[", "@")


class Recorder:
    """A plugin of pytest: how each of the rows' tests ended, written down when the session ends."""

    def __init__(self, tests: list[str], file: Path) -> None:
        self.file, self.tests = file, tests
        self.endings: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for set-up, call and tear-down of each test: the worst of them counts."""
        if report.when == "call" or report.outcome != "passed":
            self.endings[report.nodeid] = max(self.endings.get(report.nodeid, ""), report.outcome, key=_badness)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that is skipped as a whole, or cannot be read, has no tests to report."""
        if report.outcome != "passed" and report.nodeid:
            self.endings[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        """Add what ran to what is on file."""
        ran = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        for test in self.tests:
            found = Counter(ending for node, ending in self.endings.items() if covers(test, node))
            if found and not _says_less(found, ran.get(test, {})):
                ran[test] = {"date": f"{datetime.now(UTC):%Y-%m-%d}"} | {name: found[name] for name in ENDINGS}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = (f"{json.dumps(test)}: {json.dumps(ran[test])}" for test in sorted(ran))  # a line a test, to be merged
        self.file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _says_less(found: Counter[str], before: dict[str, Any]) -> bool:
    """Whether tests that passed ``before`` were skipped now: ``make test`` lacks what ``make test-te`` brings."""
    passed, skipped = before.get("passed", 0), before.get("skipped", 0)
    return not found["failed"] and not before.get("failed") and found["skipped"] > skipped and found["passed"] < passed


def _badness(ending: str) -> int:
    return ("", *ENDINGS).index(ending)


def recorder() -> Recorder:
    """For this Python, megatron-core and device."""
    import torch

    python, megatron = f"{sys.version_info[0]}.{sys.version_info[1]}", importlib.metadata.version("megatron-core")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Recorder(all_tests(), FOLDER / f"{python}-{megatron.partition('+')[0]}-{device}.json")


def all_tests() -> list[str]:
    """What the rows name, each once."""
    return list(dict.fromkeys(test for row in rows() for test in row.tests))


def table(folder: Path = FOLDER, reports: Path = ROOT / "benchmarks" / "gpu") -> str:
    """Markdown: one column a stack on a CPU, and the GPU's."""
    files = sorted(folder.glob("*.json"))
    ran = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    on_cpu = [name for name in ran if name.endswith("-cpu")]
    on_gpu = [ran[name] for name in ran if name.endswith("-cuda")]
    parts = parts_done(reports)
    header = ["", "shown on a CPU", *(_title(name) for name in on_cpu), "GPU, NCCL"]
    lines = [header, ["---"] * len(header)]
    for row in rows(folder):
        cells = [cell(row, ran[name]) for name in on_cpu]
        gpu = [found for one in on_gpu if (found := cell(row, one)) != NOT_RUN]
        gpu += [f"`{name}` {parts[name]}" for name in row.parts if name in parts]
        lines.append([row.feature, row.shown, *cells, ", ".join(gpu) or row.gpu])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(name: str) -> str:
    python, megatron, _ = name.rsplit("-", 2)
    return f"Python {python}, Megatron {megatron}"


def cell(row: Row, ran: dict[str, dict[str, Any]]) -> str:
    """How many of the row's tests passed there; what failed is never left out."""
    found: Counter[str] = Counter()
    for test in row.tests:
        found.update({name: count for name, count in ran.get(test, {}).items() if name in ENDINGS})
    said = [f"**{found['failed']} FAILED**"] if found["failed"] else []
    said += [f"{found['passed']}"] if found["passed"] else []
    said += [f"{found['skipped']} skipped"] if found["skipped"] else []
    said += ["others not run"] if said and not set(row.tests) <= ran.keys() else []
    return ", ".join(said) or NOT_RUN


def parts_done(reports: Path) -> dict[str, str]:
    """part -> its date, of gpu-day's reports from GPUs; the newest, with the word WRONG if it found something so."""
    found = {}
    for file in sorted(reports.glob("*/report.json")):
        if not file.parent.name.endswith(("-toy", "-cpu")):
            for part in json.loads(file.read_text(encoding="utf-8"))["parts"]:
                wrong = part["ending"] != "done" or part["result"]["wrong"]
                found[part["part"]] = part["date"].partition(" ")[0] + (" WRONG" if wrong else "")
    return found


def with_table(text: str, made: str) -> str:
    """``text`` with ``made`` between the two marks; SystemExit if they are not there once each."""
    counts = [text.count(mark) for mark in (BEGIN, END)]
    if counts != [1, 1]:
        sys.exit(f"README.md has '{BEGIN}' and '{END}' {counts[0]} and {counts[1]} times, each is wanted once")
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{made}\n{END}", text, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    """Prints the tests, or writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("tests", "table"))
    if parser.parse_args(arguments).what == "tests":
        print("\n".join(all_tests()))
    else:
        page = ROOT / "README.md"
        page.write_text(with_table(page.read_text(encoding="utf-8"), table()), encoding="utf-8")


if __name__ == "__main__":
    main()
