"""A curation on a Ray cluster of two nodes, one of them killed with a block in hand: the same bytes (make test-ray)."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from planted import write_planted
from project import ROOT

from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.operator import Resources
from megatron_eagle.curation.operators import repetition
from megatron_eagle.curation.plan import Plan, load_plan
from megatron_eagle.errors import UserError

RULES = ("turn_order", "empty", "repetition", "image_hashes", "duplicates", "lint")


@pytest.fixture(scope="module")
def nodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """A cluster of two nodes with a CPU each, to which this process is connected."""
    folder = request.config.getoption("--ray-packages")
    paths = [str(ROOT), str(ROOT / "kernels"), *([folder] if folder else [])]
    sys.path.extend(paths[2:])
    pytest.importorskip("ray", reason="make test-ray runs this: Ray is not installed")
    # Nodes and their processes are started by this one; Ray keeps its token for them in the home folder.
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(paths))
        patched.setenv("HOME", str(home))
        import ray
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            second = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield [cluster, second]
        finally:
            ray.shutdown()
            cluster.shutdown()


def made(tmp_path: Path) -> Plan:
    write_planted(tmp_path / "planted", 240, seed=5)
    plan = {
        "name": "test",
        "block": 5,
        "sources": [{"name": "all", "path": str(tmp_path / "planted" / "samples.jsonl")}],
        "operators": [{"use": name} for name in RULES],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    return load_plan(tmp_path / "plan.yaml")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def busy(raylet: psutil.Process) -> list[psutil.Process]:
    """Processes of a node that work on a block."""
    return [one for one in raylet.children(recursive=True) if _title(one) == "ray::BlockWorker.run"]


def _title(process: psutil.Process) -> str:
    try:
        return next(iter(process.cmdline()), "")
    except psutil.Error:  # it has ended
        return ""


def test_a_plan_that_wants_what_no_machine_has_is_refused(nodes: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(repetition.Operator, "resources", Resources(cpus=1, gpus=1))
    with pytest.raises(UserError, match="takes up 1 CPUs and 1 GPUs, which no machine of the Ray cluster has"):
        curate(made(tmp_path), tmp_path / "out", workers=2, engine="ray")


def test_a_node_that_is_killed_in_mid_run_changes_no_byte(nodes: Any, tmp_path: Path) -> None:
    plan = made(tmp_path)
    curate(plan, tmp_path / "alone")
    cluster, second = nodes
    (raylet,) = second.all_processes["raylet"]
    killed: list[int] = []

    def kill() -> None:
        state = tmp_path / ".out.partial" / ".state"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            time.sleep(0.005)
            if len(list(state.glob("segment-0-*"))) < 3:
                continue
            working = busy(psutil.Process(raylet.process.pid))
            if working:
                working[0].suspend()  # so that it has the block in hand when its node goes
                cluster.remove_node(second, allow_graceful=False)
                working[0].kill()
                killed.append(working[0].pid)

    killer = threading.Thread(target=kill)
    killer.start()
    curate(plan, tmp_path / "out", workers=2, engine="ray")
    killer.join()
    assert killed, "the second node was never seen at work"
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
