"""NVIDIA's Multi-Storage Client: forgetting what its cache took from a store, and telling one of its errors.

Leaned on, in ``multistorageclient``: ``StorageClient._cache_manager``, None without a cache, with ``delete`` for a file
that is kept as a whole, ``_invalidate_chunks`` for its stretches and ``_get_cache_file_path``. An answer that is too
short is kept there like any other, the first stretch even as if it were the whole file, and would be given out again.

Leaned on, too: that its error for an answer whose checksum is wrong, which it does not ask for again, is raised from
botocore's ``FlexibleChecksumError``.
"""

from multistorageclient import StorageClient


def forget_cached(client: StorageClient, path: str) -> None:
    """Removes all that the cache, if there is one, holds of the file ``path``."""
    cache = client._cache_manager
    if cache is not None:
        cache.delete(path)
        cache._invalidate_chunks(cache._get_cache_file_path(path))


def came_damaged(error: BaseException) -> bool:
    """Whether the client refused an answer because its bytes are not those that the store sums up."""
    return type(error.__cause__).__name__ == "FlexibleChecksumError"
