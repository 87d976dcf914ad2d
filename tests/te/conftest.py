"""Processes with Transformer Engine over the stub; tests that want them are skipped without the package, saying so."""

import functools
import importlib.util
from collections.abc import Callable, Iterator

import pytest
import stub

from megatron_eagle.parallel.process_pool import World


@pytest.fixture(scope="session")
def stubbed(request: pytest.FixtureRequest) -> Iterator[Callable[[int], World]]:
    """``stubbed(n)``: n processes with Transformer Engine over the stub, which no other test's processes see."""
    folder = request.config.getoption("--transformer-engine")
    if folder is None and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("no package transformer_engine: make test-te gets it without its compiled part")
    made: dict[int, World] = {}
    yield lambda size: made.setdefault(size, World(size, functools.partial(stub.install, folder)))
    for world in made.values():
        world.stop()
