"""A file that takes large buffers in small chunks.

One ``write`` of a whole tensor can take several times as long as many small ones: 3.2 GB in 2.0 to 6.8 s in calls of
1 MB, in 1.0 to 1.2 s in calls of 256 KB, on the machine of benchmarks/checkpoint_conversion_2026-11-20.md.
"""

from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 18


class ChunkedFile:
    """``handle``, opened for writing; what ``torch.save`` needs of a file."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle

    def write(self, data: Any) -> int:
        """All of ``data``, any contiguous buffer; its bytes."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # what is empty cannot be cast
        for start in range(0, len(view), CHUNK_BYTES):
            self._handle.write(view[start : start + CHUNK_BYTES])
        return len(view)

    def flush(self) -> None:
        self._handle.flush()
