"""Pictures and videos that clients of the endpoint have uploaded, by an id of ours; none of them touches the disk."""

import threading
import time
import uuid
from typing import Any

from megatron_eagle.serving.limits import Limits, Refused

KEEP_SECONDS = 3600.0  # an upload, after it was used last


class Uploads:
    """Uploads, in memory; an upload that was not used for an hour goes."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._lock = limits, threading.Lock()
        self._files: dict[str, tuple[str, bytes, float]] = {}

    def keep(self, name: str, data: bytes) -> dict[str, Any]:
        """Keep a file; Refused if all uploads together would be too large."""
        with self._lock:
            self._forget_old()
            stored = sum(len(kept) for _, kept, _ in self._files.values())
            if stored + len(data) > self._limits.stored_bytes:
                raise Refused(
                    f"the upload has {len(data)} bytes and {stored} are kept already, the limit is "
                    f"{self._limits.stored_bytes}; delete some",
                    "storage_full",
                    status=413,
                )
            identity = f"file-{uuid.uuid4().hex}"
            self._files[identity] = (name, data, time.monotonic())
        return self.describe(identity)

    def describe(self, identity: str) -> dict[str, Any]:
        """OpenAI's description of an upload."""
        name, data, _ = self._get(identity)
        return {"id": identity, "object": "file", "bytes": len(data), "filename": name, "purpose": "vision"}

    def content(self, identity: str) -> bytes:
        """Its bytes; it is kept for another hour."""
        name, data, _ = self._get(identity)
        self._files[identity] = (name, data, time.monotonic())
        return data

    def drop(self, identity: str) -> None:
        """Forget an upload."""
        self._get(identity)
        self._files.pop(identity, None)

    def _get(self, identity: str) -> tuple[str, bytes, float]:
        found = self._files.get(identity)
        if found is None:
            raise Refused(f"there is no file {identity[:100]!r} here", "file_not_found", status=404)
        return found

    def _forget_old(self) -> None:
        now = time.monotonic()
        self._files = {name: kept for name, kept in self._files.items() if now - kept[2] < KEEP_SECONDS}
