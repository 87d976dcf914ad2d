"""Stands in for ``megatron-eagle train`` where a test is about Slurm, the batch script and the supervisor.

Starting the real trainer costs seconds in every process; this one starts at once, so that dozens of faults fit into a
test. It keeps the trainer's word: same arguments, signals and exit codes (through the real ``Watchdog``), processes
that meet once a step and fail when one is lost, whole checkpoints published by a rename, metrics cut back to the
checkpoint. Its "weights" are a number that every step turns into another, so a lost, doubled or skipped step changes
all later losses.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_eagle.errors import Superseded, UserError
from megatron_eagle.training.fencing import Start
from megatron_eagle.training.json_lines import append_text, read_lines
from megatron_eagle.training.watchdog import STOPPED_EXIT_CODE, SUPERSEDED_EXIT_CODE, HangLimits, Watchdog

STEP_SECONDS = 0.05


def expected_losses(stages: list[dict[str, Any]]) -> list[tuple[str, int, float, str]]:
    """What a run of the stages logs that nothing disturbs."""
    state, found = "start", []
    for stage in stages:
        for step in range(1, stage["steps"] + 1):
            state = after(state, stage["name"], step)
            found.append((stage["name"], step, loss_of(state), state))
    return found


def after(state: str, stage: str, step: int) -> str:
    return hashlib.sha256(f"{state} {stage} {step}".encode()).hexdigest()[:16]


def loss_of(state: str) -> float:
    return int(state[:8], 16) / 2**32


class Peers(Watchdog):
    """Meets the other processes over TCP: each says once a step whether it was asked to stop, process 0 answers all."""

    def connect(self, rank: int, world: int) -> None:
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self.peers = []
        if rank == 0:
            listener = socket.create_server(address)
            self.peers = [listener.accept()[0] for _ in range(world - 1)]
            return
        for _ in range(200):
            try:
                self.peers = [socket.create_connection(address, timeout=600)]
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise ConnectionError(f"process 0 is not at {address}")

    def agree(self, own: bool, device: Any) -> bool:
        if device == 0:
            stop = any([self._read(peer) for peer in self.peers] + [own])
            for peer in self.peers:
                peer.sendall(bytes([stop]))
            return stop
        self.peers[0].sendall(bytes([own]))
        return self._read(self.peers[0])

    @staticmethod
    def _read(peer: socket.socket) -> bool:
        said = peer.recv(1)
        if not said:
            raise ConnectionError("connection closed by peer")
        return bool(said[0])


def train(options: argparse.Namespace, watch: Peers, rank: int) -> bool:
    recipe = yaml.safe_load(options.recipe.read_text())
    names = [stage["name"] for stage in recipe["stages"]]
    number = names.index(options.stage)
    stage, run = recipe["stages"][number], options.runs / recipe["name"]
    folder = run / "checkpoints" / stage["name"]
    step, state = newest(folder)
    if step == 0 and number:
        done, state = newest(run / "checkpoints" / names[number - 1])
        if done < recipe["stages"][number - 1]["steps"]:
            raise UserError(f"stage '{names[number - 1]}' has reached step {done}; finish it first")
    metrics = run / "metrics.jsonl"
    start = Start(run, options.start)
    if rank == 0:
        start.require_newest()
        cut_back(metrics, stage["name"], step)
    while step < stage["steps"]:
        time.sleep(STEP_SECONDS)
        if os.environ.get("STAND_IN_DIES_AT") == f"{stage['name']} {step} {rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        step, state = step + 1, after(state, stage["name"], step + 1)
        stop = watch.agree(watch.asked, rank)
        watch.step_done()
        if rank == 0:
            start.require_newest()
            entry = {"stage": stage["name"], "step": step, "loss": loss_of(state), "sample_digest": state}
            entry |= {"steps": stage["steps"], "learning_rate": 1.0, "grad_norm": 1.0, "useful_tokens": 1, "tokens": 1}
            entry |= {"tiles": 1, "seconds": STEP_SECONDS, "data_wait": 0.0}
            append_text(metrics, json.dumps(entry) + "\n", durable=False)
            if stop or step % stage["checkpoint_every"] == 0 or step == stage["steps"]:
                save(folder, step, stage["steps"], state)
        watch.agree(False, rank)  # the others wait for the checkpoint
        if stop and step < stage["steps"]:
            return False
    return True


def newest(folder: Path) -> tuple[int, str]:
    try:
        checkpoint = folder / (folder / "latest").read_text()
    except FileNotFoundError:
        return 0, "start"
    kept = json.loads((checkpoint / "checkpoint.json").read_text())
    return kept["step"], kept["state"]


def save(folder: Path, step: int, steps: int, state: str) -> None:
    final = folder / f"step_{step:08d}"
    partial = final.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "weights").write_bytes(bytes(int(os.environ.get("STAND_IN_CHECKPOINT_BYTES", "1000"))))
    (partial / "checkpoint.json").write_text(json.dumps({"step": step, "steps": steps, "state": state}))
    if not final.exists():
        partial.rename(final)
    (folder / "latest.new").write_text(final.name)
    (folder / "latest.new").rename(folder / "latest")


def cut_back(metrics: Path, stage: str, step: int) -> None:
    kept = [entry for _, entry in read_lines(metrics).entries if entry["stage"] != stage or entry["step"] <= step]
    new = metrics.with_suffix(".new")
    new.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    new.rename(metrics)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    parser.add_argument("recipe", type=Path)
    for name in ("--stage", "--hang"):
        parser.add_argument(name)
    for name in ("--runs", "--stacks"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--start", type=int)
    options = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch = Peers(HangLimits(*map(float, options.hang.split(","))), options.stacks, rank)
    watch.leave_on(signal.SIGUSR1, signal.SIGTERM)
    try:
        time.sleep(float(os.environ.get("STAND_IN_IMPORTS", "0")))
        watch.connect(rank, world)
        watch.training_begins()
        finished = train(options, watch, rank)
        if os.environ.get("STAND_IN_STAYS") == str(rank) and "SLURM_RESTART_COUNT" not in os.environ:
            os.kill(os.getpid(), signal.SIGSTOP)
    except UserError as error:
        print(f"megatron-eagle: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Superseded as superseded:
        print(f"megatron-eagle: {superseded}: leaving", file=sys.stderr, flush=True)
        sys.exit(SUPERSEDED_EXIT_CODE)
    finally:
        watch.close()
    sys.exit(0 if finished else STOPPED_EXIT_CODE)


if __name__ == "__main__":
    main()
