"""Parts of a day that end in every way there is; found by ``fake_part`` instead of the real ones."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_eagle.gpu_day.part import Chart, Part, PartResult, Setting, Table

RESULT = PartResult(
    tables=(Table("What was found", ("name", "value"), (("a", "1"), ("b", "2"))),),
    values={"a": 1, "nested": {"b": [1, 2]}},
    charts=(Chart("speeds", "tokens/s", {"ours": 2.0, "theirs": 1.0}),),
    skipped=("peak memory: needs a CUDA device",),
    aims=(("twice as fast", "2.00 x", True),),
)


def good(setting: Setting) -> PartResult:
    print("printed by the good one", flush=True)
    return RESULT


def failing(setting: Setting) -> PartResult:
    raise ValueError("3 is not 4")


def killed_once(setting: Setting) -> PartResult:
    """Dies as if the machine had killed it, and comes to its end when it is run again."""
    mark = setting.folder / "was-here"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return RESULT


def hanging(setting: Setting) -> PartResult:
    """Also starts a process that would outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (setting.folder / "child").write_text(str(child.pid))
    time.sleep(600)
    return RESULT


def fake_part(name: str) -> Part:
    return {"good": good, "failing": failing, "killed": killed_once, "hanging": hanging}[name]


def is_alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
