"""A file that is there whole or not at all, whoever else writes it and whenever a process is killed."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """The path to write ``file`` at; what is there at the end becomes ``file``, unless an error ends it."""
    partial = file.with_name(f".{uuid.uuid4().hex}-{file.name}")  # several machines may write it
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
