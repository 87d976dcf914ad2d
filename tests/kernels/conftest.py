"""How kernel tests run inside an ordinary pytest session.

A test marked ``interpreter`` needs a Python in which TRITON_INTERPRET=1 was set before Triton was imported, which the
session's own process cannot promise. Such tests are carried out by one worker process for the whole session, started at
the first of them; the outcome and the failure's text come back. With TRITON_INTERPRET=1 in the environment everything
runs here, which is what a debugger wants.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

WORKER = Path(__file__).with_name("interpreter_worker.py")


class InterpreterWorker:
    """A process that runs tests by their node id, one at a time."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            cwd=root,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, node: str) -> tuple[str, str]:
        """(passed | failed | skipped, text)."""
        print(node, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            return "failed", f"the interpreter worker died with exit code {self._process.wait()} in {node}"
        return tuple(json.loads(answer))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


_worker: list[InterpreterWorker] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: interprets Triton kernels, in a process of its own")


def pytest_unconfigure() -> None:
    _stop()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    from eagle_kernels.device import INTERPRETED  # imports Triton: not while other tests are being collected

    if pyfuncitem.get_closest_marker("interpreter") is None or INTERPRETED:
        return None
    if not _worker:
        _worker.append(InterpreterWorker(pyfuncitem.config.rootpath))
    try:
        outcome, text = _worker[0].run(pyfuncitem.nodeid)
    except BaseException:  # a time limit or Ctrl-C: the answer that is still to come must not reach the next test
        _stop()
        raise
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def _stop() -> None:
    while _worker:
        _worker.pop().stop()


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interpreted tests compute bfloat16 as a GPU does and get memory full of NaN from torch.empty and its like."""
    from eagle_kernels.device import INTERPRETED

    if not INTERPRETED or request.node.get_closest_marker("interpreter") is None:
        yield
        return
    from eagle_kernels.checking.interpreter import correct_bfloat16
    from eagle_kernels.checking.tiers import poison_memory

    correct_bfloat16()
    poison_memory()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def mutate(tmp_path: Path) -> Iterator[Callable[[ModuleType, str, str], ModuleType]]:
    """``mutate(module, old, new)`` imports a copy of a module in whose source ``old``, found exactly once, is ``new``.

    Shows that the tests can fail: a mutated kernel that gives the same numbers means a blind test.
    """
    names: list[str] = []

    def import_mutated(module: ModuleType, old: str, new: str) -> ModuleType:
        source = Path(module.__file__).read_text()
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
        name = f"mutated_{module.__name__.replace('.', '_')}_{len(names)}"
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace(old, new))
        specification = importlib.util.spec_from_file_location(name, path)
        mutated = importlib.util.module_from_spec(specification)
        names.append(name)
        sys.modules[name] = mutated  # Triton looks up a kernel's module by its name
        specification.loader.exec_module(mutated)
        return mutated

    yield import_mutated
    for name in names:
        sys.modules.pop(name, None)
