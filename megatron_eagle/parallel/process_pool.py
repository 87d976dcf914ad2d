"""Worlds of several processes, started once per size and used for many calls.

Starting Python and importing torch and Megatron costs seconds per process, more than most checks of a layout. A World
keeps its processes and sends them functions:

    def add_up(number):                      # at the top of a module, runs in every process
        ...
    results = World(2).run(add_up, 3)        # one result per rank

Functions travel by module and name, arguments and results by pickle. An exception in a process is raised in the caller
with that process's traceback. After every call the process groups are given up, so each call makes its own layout.
"""

import gc
import importlib
import itertools
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

from megatron_eagle.importing import importing
from megatron_eagle.parallel.launch import reserved_port

IMPORTED_ONCE = ["megatron_eagle.training.loop"]  # by forked worlds, for all their processes; and what it imports
CALLS_BEFORE_RENEWAL = 100  # a little of every call stays in a process, such as the weights of wrapped models
START_TIMEOUT = 240.0  # seconds; importing torch and Megatron in several processes on a busy machine


class WorldError(Exception):
    """A process of a world failed, hung or died; the message says which and how."""


class World:
    """``size`` processes joined by gloo, or by NCCL on as many GPUs where there are some.

    prepare: called in each of them before it imports torch or Megatron.

    Without a GPU, since CUDA does not survive a fork, they are forked from one process that has imported all, in
    milliseconds instead of four seconds of processor time each. Two are not: forked processes order sets alike, those
    that a launcher starts each in its own way, and a layout has to work for these.
    """

    def __init__(self, size: int, prepare: Callable[[], None] | None = None) -> None:
        self.size, self._prepare = size, prepare
        self._calls = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``function(*args)`` in every process and return the results in order of rank.

        Raises WorldError with a process's traceback if it fails, and with the ranks that have not answered after
        ``timeout`` seconds, or that died. In these two cases all processes are ended and the next call starts new ones.
        """
        if not self._processes:
            self._start()
        self._calls += 1
        if self._calls % CALLS_BEFORE_RENEWAL == 0:
            self.stop()
            self._start()
        call = (sys.path, function.__module__, function.__qualname__, args)
        for pipe in self._pipes:
            pipe.send(call)
        answers = self._collect(timeout)
        self._check(answers)
        return [value for _, value in answers]

    def stop(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        import torch

        forked = self._prepare is None and self.size != 2 and not torch.cuda.is_available()
        context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(IMPORTED_ONCE)  # heeded by the first such world of this process
        with reserved_port() as port:
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, self.size, port, theirs, sys.path, self._prepare))
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            self._check(self._collect(START_TIMEOUT))

    def _check(self, answers: list[tuple[bool, Any]]) -> None:
        failures = [f"rank {rank} of {self.size}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failures:
            if not all(process.is_alive() for process in self._processes):
                self.stop()
            raise WorldError("\n".join(failures))

    def _collect(self, timeout: float) -> list[tuple[bool, Any]]:
        deadline = monotonic() + timeout
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.size:
            waiting = [rank for rank in range(self.size) if rank not in answers]
            ready = wait([self._pipes[rank] for rank in waiting], timeout=max(0.0, deadline - monotonic()))
            for rank in waiting:
                if self._pipes[rank] not in ready:
                    continue
                try:
                    answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    self._processes[rank].join(1)
                    answers[rank] = (False, f"died with exit code {self._processes[rank].exitcode}")
            if any(not good for good, _ in answers.values()):
                deadline = min(deadline, monotonic() + 2.0)  # the others may be waiting for it for ever
            if monotonic() > deadline:
                for rank in set(range(self.size)) - set(answers):
                    self._processes[rank].kill()
                    self._processes[rank].join()
                    answers[rank] = (False, f"no answer within {timeout:.0f} s, or while another rank failed")
        return [answers[rank] for rank in range(self.size)]


def _serve(
    rank: int, size: int, port: int, pipe: Connection, path: list[str], prepare: Callable[[], None] | None
) -> None:
    """What each process runs: answer calls until the pipe closes."""
    sys.path[:] = path
    if prepare:
        prepare()
    warnings.simplefilter("ignore")  # what dependencies tell their own developers would bury a test's output
    with importing():
        import torch
        import torch.distributed as dist

        from megatron_eagle.compat.platform import install

        platform = install(local_rank=rank)  # before Megatron, some of whose modules need not run in full then
        from megatron.core import parallel_state

        from megatron_eagle.compat.gradient_buffers import let_go_of_gradients

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    patience = timedelta(seconds=90)
    pipe.send((True, "ready"))
    for number in itertools.count():
        try:
            sys.path[:], module, name, args = pipe.recv()
        except EOFError:  # the tests are over
            return
        dist.init_process_group(
            platform.backend, store=dist.PrefixStore(str(number), store), rank=rank, world_size=size, timeout=patience
        )
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        let_go_of_gradients()
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # models hold groups in cycles, and every group that lives on keeps gloo's polling threads
        pipe.send(answer)
