"""compat/multi_storage_client.py."""

from types import SimpleNamespace

from contracts import contract, the


class Store:
    """Answers each question with half of what was asked for at first, then with all of it."""

    def __init__(self):
        self.asked = 0

    def get_object(self, path, byte_range):
        self.asked += 1
        return bytes(byte_range.size // (2 if self.asked == 1 else 1))


@contract(
    "the Multi-Storage Client's cache keeps files or stretches of them elsewhere: data/storage/object_store.py has it "
    "forget an answer that was too short"
)
def test_contract_forgetting_what_the_cache_holds(tmp_path):
    from multistorageclient.cache import CacheManager
    from multistorageclient.caching.cache_config import CacheConfig
    from multistorageclient.types import Range

    from megatron_eagle.compat.multi_storage_client import forget_cached

    the("multistorageclient:StorageClient._cache_manager")
    cache = CacheManager("profile", CacheConfig("10M", "1M", check_source_version=False, location=str(tmp_path)))
    client, store, wanted = SimpleNamespace(_cache_manager=cache), Store(), Range(1 << 19, 1 << 18)

    def read():
        return len(cache.read("set/shard.tar", byte_range=wanted, storage_provider=store) or b"")

    assert (read(), read(), store.asked) == (0, 0, 1)  # the half that came is taken for the whole file
    forget_cached(client, "set/shard.tar")
    assert (read(), store.asked) == (1 << 18, 2)
    forget_cached(SimpleNamespace(_cache_manager=None), "set/shard.tar")


@contract(
    "the Multi-Storage Client no longer raises its error for a wrong checksum from botocore's FlexibleChecksumError: "
    "data/storage/object_store.py asks again after it"
)
def test_contract_an_answer_that_came_damaged():
    from multistorageclient.types import RetryableError

    from megatron_eagle.compat.multi_storage_client import came_damaged

    for cause, damaged in ((the("botocore.exceptions:FlexibleChecksumError"), True), (RetryableError, False)):
        error = RuntimeError("Failed to GET")
        error.__cause__ = cause.__new__(cause)
        assert came_damaged(error) is damaged
