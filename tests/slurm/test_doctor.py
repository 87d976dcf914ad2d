"""The pre-flight: what it finds wrong with made-up nodes, and a real one of two processes."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from chain import command

from megatron_eagle.cluster.doctor import Facts, Wants, diagnose

WANTS = Wants(Path("/shared"), min_free_gb=10, timeout=5)


def well(rank: int) -> Facts:
    return Facts(
        rank=rank,
        node=f"n{1 + rank // 2}",
        versions={"torch": "2.13.0", "numpy": "2.4.6"},
        device="H100",
        gpus=2,
        free_gb=50,
        seen=[0, 1, 2, 3, 4, 5],
        clock=1000.0 + rank / 10,
    )


def test_healthy_nodes_are_ok() -> None:
    diagnosis = diagnose([well(rank) for rank in range(6)], 6, WANTS)
    assert diagnosis.bad == {} and diagnosis.lines == ["n1: ok", "n2: ok", "n3: ok"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "2.12.0", "numpy": "2.4.6"}}, "torch is 2.12.0, elsewhere 2.13.0"),
        ({"versions": {"numpy": "2.4.6"}}, "torch is missing, elsewhere 2.13.0"),
        ({"gpus": 1}, "devices on the node is 1 x H100, elsewhere 2 x H100"),
        ({"free_gb": 1.25}, "1.2 GB free in /shared, 10 are wanted"),
        ({"clock": 940.0}, "its clock is off by -60 s"),
        ({"seen": [2, 3]}, "does not see what ranks 0, 1, 4, 5 wrote"),
        ({"error": "cannot write to /shared: Read-only file system"}, "Read-only file system"),
    ],
)
def test_the_bad_node_is_named(change: dict, words: str) -> None:
    facts = [replace(well(rank), **change) if rank in (2, 3) else well(rank) for rank in range(6)]
    diagnosis = diagnose(facts, 6, WANTS)
    assert list(diagnosis.bad) == ["n2"], diagnosis
    assert words in diagnosis.bad["n2"]


def test_who_does_not_answer_is_missed() -> None:
    there = [well(rank) for rank in range(4)]
    assert diagnose(there, 6, WANTS).bad == {"?": "ranks 4, 5 of 6 did not answer within 5 s"}
    known = replace(WANTS, nodes=("n1", "n2", "n3"))
    assert diagnose(there, 6, known).bad == {"n3": "ranks 4, 5 of 6 did not answer within 5 s"}


def test_two_nodes_against_each_other() -> None:
    """Then process 0 is right: its node runs the batch script, and has written the log."""
    facts = [replace(well(rank), seen=[0, 1] if rank < 2 else [2, 3]) for rank in range(4)]
    facts = [replace(fact, versions={"torch": "2.13.0" if fact.rank < 2 else "2.12.0"}) for fact in facts]
    (node, said), *others = diagnose(facts, 4, WANTS).bad.items()
    assert node == "n2" and others == [] and "torch is 2.12.0" in said and "what ranks 0, 1 wrote" in said


@pytest.mark.slow
def test_two_processes_of_this_machine(tmp_path: Path) -> None:
    done = command("doctor", "--folder", str(tmp_path / "runs"), "--min-free-gb", "0", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert "all-reduce of 1 MiB over 2 processes" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == [], "its marks are gone"


def test_too_little_space_fails(tmp_path: Path) -> None:
    done = command("doctor", "--folder", str(tmp_path), "--min-free-gb", "1e9", "--processes", "1")
    assert done.returncode == 4
    assert "megatron-eagle: bad node" in done.stderr and "1e+09 are wanted" in done.stderr


def test_a_process_0_that_is_not_there_is_named() -> None:
    """By all others: nobody is left to collect what they know."""
    alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = command("doctor", "--timeout", "1", "--nodes", "n1,n2", environment={**os.environ, **alone})
    assert done.returncode == 4
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("megatron-eagle: ")]
    assert line == "megatron-eagle: bad node n1: process 0 cannot be reached at 127.0.0.1:10 within 1 s"
