"""The demo from end to end, with few samples and two steps a stage: everything happens and everything is written."""

import json
import shlex
from pathlib import Path

import pytest
from short_demo import FEW, short_recipe

from megatron_eagle.cli import main
from megatron_eagle.demo import run as demo


@pytest.mark.slow
def test_the_demo_writes_its_summary_and_report(tmp_path: Path, capfd) -> None:
    arguments = (short_recipe(tmp_path), (), tmp_path / "runs", 2, 12.0, FEW)
    demo.run_demo(*arguments)
    folder = tmp_path / "runs" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["stage1", "stage1.5", "stage2"]
    assert all(
        set(s) == {"name", "steps", "loss_first", "loss_last", "trainable_parameters"} for s in summary["stages"]
    )
    assert summary["stages"][0]["trainable_parameters"] < summary["stages"][1]["trainable_parameters"]
    assert summary["layout"] == {"tp": 1, "pp": 2, "cp": 1, "dp": 1, "world": 2}
    assert set(summary["accuracy"]) == {"overall", "per_task", "blank_images"}
    assert set(summary["seconds"]) == {"setup", "train", "evaluate"} and summary["seconds"]["setup"] > 12.0
    assert 0.1 < summary["peak_rss_gb"] < 6.0
    page = (folder / "report.html").read_text()
    assert "<img" in page and "http" not in page.replace("http://www.w3.org", "")

    said = capfd.readouterr().out.splitlines()[-1]
    command = shlex.split(said.removeprefix("demo: megatron-eagle "))
    with pytest.raises(SystemExit) as ended:
        main([*command, "--max-new-tokens", "3", "--device", "cpu"])
    assert ended.value.code == 0 and command[:2] == ["ask", str(folder / "export")]

    before = (folder / "metrics.jsonl").read_bytes()
    demo.run_demo(*arguments)
    assert (folder / "metrics.jsonl").read_bytes() == before, "a finished demo trains nothing again"
    assert "stage2 is complete" in capfd.readouterr().out
