"""The fixture ``worlds``: one set of processes per size for the whole test session.

def test_something(worlds):
    results = worlds(2).run(add_up, 3)   # ``add_up`` stands at the top of the test's module; one result per rank
"""

from collections.abc import Callable, Iterator

import pytest

from megatron_eagle.parallel.process_pool import World, WorldError

__all__ = ["World", "WorldError", "worlds"]


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """``worlds(n)`` is the shared world of n processes."""
    made: dict[int, World] = {}
    yield lambda size: made.setdefault(size, World(size))
    for world in made.values():
        world.stop()
