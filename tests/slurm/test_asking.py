"""Questions to a Slurm whose controller is away, with a stand-in for its commands."""

import os
import subprocess
from pathlib import Path

import pytest
from project import ROOT

from megatron_eagle.cluster import slurm
from megatron_eagle.cluster.status import OVER, read_status
from megatron_eagle.training.run_events import append_event

REFUSED = "squeue: error: Unable to contact slurm controller (connect failure)"
LOST = "sbatch: error: Socket timed out on send/recv operation"


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that fail with what stands in ``away/says``, as many times as ``away/times`` says, and then answer."""
    folder = tmp_path / "away"
    folder.mkdir()
    script = (
        "#!/bin/bash\n"
        f'cd {folder}; echo "$0" >> asked; left=$(cat times); echo $((left - 1)) > times\n'
        '[ "$left" -le 0 ] || { cat says >&2; exit 1; }\n'
        "cat answer\n"
    )
    for name in ("squeue", "sbatch"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    return folder


def tell(away: Path, says: str, times: int, answer: str = "") -> None:
    (away / "says").write_text(says)
    (away / "times").write_text(str(times))
    (away / "answer").write_text(answer)


def asked(away: Path) -> int:
    return len((away / "asked").read_text().splitlines())


@pytest.mark.parametrize("says", [REFUSED, LOST])
def test_a_question_is_asked_again(away: Path, says: str) -> None:
    tell(away, says, 3, "7|RUNNING|None\n8|PENDING|Dependency\n")
    assert slurm.states(["7"]) == {"7": ("RUNNING", "None")} and asked(away) == 4


def test_after_its_time_nothing_is_known(away: Path) -> None:
    tell(away, REFUSED, 9)
    with pytest.raises(slurm.CannotAsk, match="connect failure"):
        slurm.states(["7"], patience=0.5)
    assert asked(away) == 1


def test_a_submission_is_given_again_only_if_it_cannot_have_arrived(away: Path) -> None:
    tell(away, REFUSED.replace("squeue", "sbatch"), 2, "9\n")
    assert slurm.submit(away / "script", after=None, held=False) == "9" and asked(away) == 3
    tell(away, LOST, 2, "9\n")
    with pytest.raises(slurm.CannotAsk, match="Socket timed out"):
        slurm.submit(away / "script", after=None, held=False)
    assert asked(away) == 4


def test_a_refusal_is_an_answer(away: Path) -> None:
    tell(away, "squeue: error: Invalid user", 1)
    with pytest.raises(slurm.UserError, match="Slurm refuses 'squeue"):
        slurm.states(["7"])
    assert asked(away) == 1


def test_status_says_what_the_files_say(away: Path, tmp_path: Path) -> None:
    tell(away, REFUSED, 99)
    for stage, job in (("a", "7"), ("b", "8"), ("c", "9")):
        append_event(tmp_path, "submitted", stage=stage, job=job, steps=10, processes=4)
    append_event(tmp_path, "started", stage="a", job="7", nodes="n1", step=0, log_offset=0)
    append_event(tmp_path, "ended", stage="a", job="7", step=9, outcome="complete", cause="", bad_nodes=[])
    append_event(tmp_path, "started", stage="b", job="8", nodes="n1", step=0, log_offset=0)
    rows = read_status(tmp_path, patience=0.0)
    assert [(row.state, row.why) for row in rows] == [
        ("complete", ""),
        ("unknown", "Slurm cannot be asked"),
        ("unknown", "Slurm cannot be asked"),
    ]
    assert "unknown" not in OVER, "watching goes on"


def test_a_script_whose_job_is_lost_asks_an_absent_controller_no_longer_than_it_waits(tmp_path: Path) -> None:
    """leave gives up after 300 s; ASK_SECONDS, an hour, is for questions that the run hangs on."""
    words = f"""
        SLURM_JOB_ID=7 RUN_FOLDER=. STAGE=a LOG_PREFIX=a
        source {ROOT}/slurm/common.bash
        scontrol() {{ echo asked >> {tmp_path}/asked; echo "{REFUSED}"; return 1; }}
        sleep() {{ SECONDS=$((SECONDS + 100)); }}
        leave
    """
    done = subprocess.run(["bash", "-c", words], timeout=60)
    assert done.returncode == 1 and len((tmp_path / "asked").read_text().splitlines()) <= 4
