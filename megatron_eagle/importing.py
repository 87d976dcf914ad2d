"""Importing what is large, of which Python then never looks for garbage.

PyTorch and Megatron-Core make half a million objects, and all of them stay. Going through them takes 0.2 to 0.3 s, five
times while they are imported and again whenever Python or Megatron's optimizer collects, on one rank while others wait.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Within it nothing is collected, and what exists at its end never is: for imports, at the start of a process."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
