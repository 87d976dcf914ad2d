"""The README's table of what has been run: its rows name what there is, its numbers are those that were recorded."""

import json
import re
import runpy
from types import SimpleNamespace

import pytest
from project import ROOT

from megatron_eagle.gpu_day.part import part_names

TOOL = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "support.py")))
ROWS = "- {feature: a, shown: it, tests: [tests/a.py, 'tests/b.py::test_one'], parts: [kernels]}\n"


def report(node, outcome, when="call"):
    return SimpleNamespace(nodeid=node, outcome=outcome, when=when)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.yaml").write_text(ROWS)
    return tmp_path


def record(folder, *reports, device="cpu"):
    tests = [test for row in TOOL.rows(folder) for test in row.tests]
    one = TOOL.Recorder(tests, folder / f"3.12-0.19.2-{device}.json")
    for each in reports:
        one.pytest_runtest_logreport(each)
    one.pytest_sessionfinish()
    return json.loads(one.file.read_text())


def test_the_readme_has_the_table_of_what_was_recorded():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert TOOL.with_table(text, TOOL.table()) == text, "python tools/support.py table writes it"


def test_rows_name_tests_and_parts_that_there_are():
    rows = TOOL.rows()
    assert len({row.feature for row in rows}) == len(rows)
    for row in rows:
        assert row.tests and set(row.parts) <= set(part_names()), row.feature
        for test in row.tests:
            file, _, function = test.partition("::")
            assert (ROOT / file).exists(), test
            assert not function or re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE), test


def test_what_is_recorded_belongs_to_a_row():
    for file in TOOL.FOLDER.glob("*.json"):
        assert json.loads(file.read_text()).keys() <= set(TOOL.all_tests()), f"{file.name} has tests of no row"


def test_endings_are_counted_by_row(folder):
    ran = record(
        folder,
        report("tests/a.py::test_x", "passed", "setup"),
        report("tests/a.py::test_x", "passed"),
        report("tests/a.py::test_y[1]", "skipped", "setup"),
        report("tests/b.py::test_one[2]", "passed"),
        report("tests/b.py::test_one[2]", "failed", "teardown"),
        report("tests/b.py::test_one@worlds", "passed"),
        report("tests/b.py::test_one_more", "passed"),
        report("tests/a.pyx", "passed"),
    )
    assert {test: [each[name] for name in TOOL.ENDINGS] for test, each in ran.items()} == {
        "tests/a.py": [1, 1, 0],
        "tests/b.py::test_one": [1, 0, 1],
    }
    assert "| a | it | **1 FAILED**, 2, 1 skipped | not yet run |" in TOOL.table(folder, folder)


def test_a_file_that_cannot_be_read_has_failed(folder):
    tests = [test for row in TOOL.rows(folder) for test in row.tests]
    one = TOOL.Recorder(tests, folder / "3.12-0.19.2-cpu.json")
    for node, outcome in ("", "failed"), ("tests/b.py", "passed"), ("tests/a.py", "failed"):
        one.pytest_collectreport(report(node, outcome))
    one.pytest_sessionfinish()
    assert "| **1 FAILED**, others not run |" in TOOL.table(folder, folder)


def test_what_did_not_run_stays_on_file_and_what_never_ran_is_said(folder):
    record(folder, report("tests/a.py::test_x", "passed"))
    assert "| 1, others not run |" in TOOL.table(folder, folder)
    assert set(record(folder, report("tests/b.py::test_one", "passed"))) == {"tests/a.py", "tests/b.py::test_one"}
    (folder / "3.13-0.19.2-cpu.json").write_text("{}")
    assert TOOL.table(folder, folder).splitlines() == [
        "|  | shown on a CPU | Python 3.12, Megatron 0.19.2 | Python 3.13, Megatron 0.19.2 | GPU, NCCL |",
        "| --- | --- | --- | --- | --- |",
        "| a | it | 2 | – | not yet run |",
    ]


@pytest.mark.parametrize(
    ("then", "now", "kept"),
    [
        (["passed", "passed"], ["passed", "skipped"], [2, 0, 0]),  # a target of its own brings what the second needs
        (["passed", "passed"], ["skipped", "skipped"], [2, 0, 0]),
        (["passed", "passed"], ["failed", "skipped"], [0, 1, 1]),
        (["passed", "passed"], ["passed"], [1, 0, 0]),  # a test that is no more
        (["passed", "skipped"], ["passed", "passed"], [2, 0, 0]),
        (["failed", "passed"], ["skipped", "passed"], [1, 1, 0]),
        (["skipped", "skipped"], ["skipped", "skipped"], [0, 2, 0]),
    ],
)
def test_what_is_skipped_takes_nothing_from_what_has_passed(folder, then, now, kept):
    def of(outcomes):
        return [report(f"tests/a.py::test_{number}", outcome) for number, outcome in enumerate(outcomes)]

    file = folder / "3.12-0.19.2-cpu.json"
    before = record(folder, *of(then))["tests/a.py"] | {"date": "2026-01-01"}
    file.write_text(json.dumps({"tests/a.py": before}))
    after = record(folder, *of(now))["tests/a.py"]
    assert [after[name] for name in TOOL.ENDINGS] == kept
    assert (after["date"] == "2026-01-01") == (kept == [2, 0, 0] and then == ["passed", "passed"])


def test_a_gpu_has_its_tests_and_its_day(folder):
    record(folder, report("tests/a.py::test_x", "passed"), device="cuda")
    for name, ending in ("2026-12-01-nvidia-h100", "done"), ("2026-12-02-cpu-toy", "failed"):
        (folder / name).mkdir()
        parts = [{"part": "kernels", "ending": ending, "date": f"{name[:10]} 10:00", "result": {"wrong": []}}]
        (folder / name / "report.json").write_text(json.dumps({"parts": parts, "missing": []}))
    assert "| a | it | 1, others not run, `kernels` 2026-12-01 |" in TOOL.table(folder, folder)


def test_a_readme_without_the_marks_is_refused():
    with pytest.raises(SystemExit, match="0 and 0 times"):
        TOOL.with_table("text", "table")
