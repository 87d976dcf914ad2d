"""A part that fails, dies or hangs takes no other with it, and a day goes on with what is missing."""

import json
from dataclasses import asdict

import pytest
from fake_parts import RESULT, fake_part, is_alive

from megatron_eagle.errors import UserError
from megatron_eagle.gpu_day.day import Outcome, choose_folder, outcome_file, read_outcome, run_day
from megatron_eagle.gpu_day.machine import Machine, this_machine
from megatron_eagle.gpu_day.part import PartResult, Table, part_names, part_of
from megatron_eagle.gpu_day.report import as_text, troubles, write_report

MACHINE = Machine(
    "NVIDIA H100 80GB HBM3", 1, 85 * 10**9, "590.1", "13.0", "3.12.3", "a CPU", {"torch": "2"}, "abc-dirty"
)


def outcome(part="good", **changes):
    whole = {
        "ending": "done",
        "seconds": 61.2,
        "date": "2026-11-26 10:00",
        "machine": asdict(MACHINE),
        "result": RESULT,
    }
    return Outcome(part, **(whole | changes))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_parts_end_in_every_way_and_the_day_goes_on(tmp_path):
    lines = []
    settings = {"toy": True, "say": lines.append, "find": fake_part}
    folder = run_day(tmp_path, ("failing", "killed", "good"), **settings)
    failing, killed, good = (read_outcome(folder, name) for name in ("failing", "killed", "good"))
    assert (failing.ending, killed.ending, good.ending) == ("failed", "failed", "done")
    assert "ValueError: 3 is not 4" in failing.error and "exit code -9" in killed.error
    assert good.result == RESULT and "good one" in (folder / "parts" / "good.log").read_text()
    assert any("failing: failed" in line and "3 is not 4" in line for line in lines)
    assert "runs/" in (folder / ".gitignore").read_text() and folder.name.endswith("-cpu-toy")

    assert run_day(tmp_path, ("killed",), **settings) == folder, "the day that lacks parts is continued"
    assert read_outcome(folder, "killed").ending == "done"

    run_day(tmp_path, ("hanging",), minutes=0.4, **settings)
    assert read_outcome(folder, "hanging").ending == "out of time"
    assert not is_alive(int((folder / "child").read_text())), "what a part starts is ended with it"


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_eagle.gpu_day.day.part_names", lambda: ("good", "failing"))
    monkeypatch.setattr("megatron_eagle.gpu_day.day.known_parts", lambda names: names or ("good", "failing"))
    ran = []

    def instead(part, find, setting, seconds, machine):
        ran.append(part)
        return outcome(part)

    monkeypatch.setattr("megatron_eagle.gpu_day.day._run_apart", instead)
    folder = run_day(tmp_path, toy=True, say=ran.append)
    outcome("failing", ending="out of time", result=None).write(folder)
    ran.clear()
    run_day(tmp_path, toy=True, say=lambda line: None)
    assert ran == ["failing"], "only what did not come to its end"
    ran.clear()
    run_day(tmp_path, ("good",), toy=True, say=lambda line: None)
    assert ran == ["good"], "what is asked for is run anew"


def test_without_a_gpu_only_toys_are_run(tmp_path):
    if this_machine().gpus:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="no GPU here; --toy"):
        run_day(tmp_path)
    with pytest.raises(UserError, match="no part 'kernel'; there are calibrate, checkpoint"):
        run_day(tmp_path, ("kernel",), toy=True)


def test_a_result_is_read_back_and_anything_else_refused(tmp_path):
    outcome().write(tmp_path)
    assert read_outcome(tmp_path, "good") == outcome() and read_outcome(tmp_path, "other") is None
    outcome_file(tmp_path, "good").write_text('{"part": "good"}')
    with pytest.raises(UserError, match=r"good\.json is no result of gpu-day"):
        read_outcome(tmp_path, "good")
    with pytest.raises(ValueError, match="2 columns, a row has 1"):
        Table("t", ("a", "b"), (("1",),))


def test_the_newest_day_of_this_device_is_continued(tmp_path):
    (tmp_path / "2026-01-02-nvidia-h100-80gb-hbm3").mkdir()
    (tmp_path / "2026-01-03-cpu").mkdir()
    (tmp_path / "2026-01-04-nvidia-h100-80gb-hbm3-toy").mkdir()
    assert choose_folder(tmp_path, MACHINE.slug, ("good",)).name == "2026-01-02-nvidia-h100-80gb-hbm3"
    outcome().write(tmp_path / "2026-01-02-nvidia-h100-80gb-hbm3")
    assert choose_folder(tmp_path, MACHINE.slug, ("good",)).name > "2026-01-02-nvidia-h100-80gb-hbm3"


def test_the_report_has_everything(tmp_path):
    outcome("good").write(tmp_path)
    outcome("bad", result=PartResult(wrong=("losses differ: 1 and 2",))).write(tmp_path)
    outcome("late", ending="out of time", result=None, error="no result after 540 s\nlast words").write(tmp_path)
    parts = ("good", "bad", "late", "never")
    text = write_report(tmp_path, parts).read_text()
    for said in (
        "NVIDIA H100 80GB HBM3: 1 GPU(s), 79 GiB each, driver 590.1",
        "Not run yet: never.",
        "| twice as fast | 2.00 x | yes |",
        "- skipped: peak memory: needs a CUDA device",
        "- WRONG: losses differ: 1 and 2",
        "no result after 540 s\nlast words",
        "commit abc-dirty",
        "![the charts of all parts](report.png)",
    ):
        assert said in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    raw = json.loads((tmp_path / "report.json").read_text())
    assert raw["missing"] == ["never"] and [one["part"] for one in raw["parts"]] == ["good", "bad", "late"]
    assert troubles(tmp_path, parts) == [
        "bad: losses differ: 1 and 2",
        f"late out of time, see {tmp_path / 'parts' / 'late.json'}",
    ]
    assert "report.png" not in as_text("x", [outcome(result=PartResult())], (), picture=False)


def test_every_part_has_a_function_and_a_line_in_the_docs():
    from project import ROOT

    page = (ROOT / "docs" / "gpu_day.md").read_text(encoding="utf-8")
    for name in part_names():
        assert callable(part_of(name)) and f"| `{name}` |" in page
