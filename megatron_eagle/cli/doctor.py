"""``megatron-eagle doctor``: the pre-flight of a cluster job."""

import argparse
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

from megatron_eagle.cli.common import (
    Verbs,
    add_launch_arguments,
    become_part_of_a_run,
    not_negative,
    open_platform,
    seconds,
    verb,
)


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "doctor",
        "check that these processes can train together, and name the node that cannot",
        "Compares packages, devices, clocks and free space of all nodes, looks whether they share the folder, and\n"
        "times an all-reduce. Starts like 'train': under srun, torchrun, or with --processes on one machine.",
        "  megatron-eagle doctor --folder runs --processes 2\n"
        "  srun --nodes 16 --ntasks-per-node 8 ... megatron-eagle doctor --folder /shared/runs\n",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder that all nodes must share")
    parser.add_argument("--min-free-gb", type=not_negative, default=1.0, metavar="GB", help="space it must have free")
    parser.add_argument(
        "--timeout", type=seconds, default=120.0, metavar="SECONDS", help="how long to wait for a process"
    )
    parser.add_argument(
        "--nodes", default="", metavar="A,B", help="all nodes in the order of their ranks, to name one that is silent"
    )
    add_launch_arguments(parser)
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    from megatron_eagle.training.watchdog import Watchdog

    # Before PyTorch, whose import takes seconds; a stop that comes amid a pre-flight must not look like a bad node.
    Watchdog(rank=int(os.environ.get("RANK", "0"))).leave_on(signal.SIGUSR1, signal.SIGTERM)
    become_part_of_a_run(options.processes)
    platform = open_platform(options)
    import torch.distributed as dist

    from megatron_eagle.cluster.causes import BAD_NODE
    from megatron_eagle.cluster.doctor import Wants, examine

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    nodes = tuple(name for name in options.nodes.split(",") if name)
    wants = Wants(options.folder, options.min_free_gb, options.timeout, nodes)
    wait = timedelta(seconds=options.timeout)
    try:  # next to the port that init_process_group will open for itself
        store = dist.TCPStore(address, port + 1, world, rank == 0, wait, wait_for_workers=False)
    except dist.DistError:
        if rank == 0:
            raise
        said = f"process 0 cannot be reached at {address}:{port + 1} within {options.timeout:g} s"
        print(f"megatron-eagle: bad node {wants.node_of(0, world)}: {said}", file=sys.stderr, flush=True)
        sys.exit(BAD_NODE)
    diagnosis = examine(platform, wants, store, rank, world)
    if diagnosis is None:
        return
    for line in diagnosis.lines:
        print(f"doctor: {line}", flush=True)
    for node, why in diagnosis.bad.items():
        print(f"megatron-eagle: bad node {node}: {why}", file=sys.stderr, flush=True)
    if diagnosis.bad:
        sys.exit(BAD_NODE)
