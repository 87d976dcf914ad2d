"""A file that takes large buffers in small pieces.

One ``write`` of a whole tensor can take several times as long as many of a megabyte each: 1.5 GB in 1.7 to 4.9 s in
16 MB calls, in 0.3 to 0.5 s in 1 MB calls, on the machine of docs/checkpoints.md.
"""

from typing import Any, BinaryIO

PIECE_BYTES = 1 << 20


class InPieces:
    """``handle``, opened for writing; what ``torch.save`` needs of a file."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle

    def write(self, data: Any) -> int:
        """All of ``data``, any contiguous buffer; its bytes."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # what is empty cannot be cast
        for start in range(0, len(view), PIECE_BYTES):
            self._handle.write(view[start : start + PIECE_BYTES])
        return len(view)

    def flush(self) -> None:
        self._handle.flush()
