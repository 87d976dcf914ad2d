"""Data sets in an S3-compatible store (moto, on loopback) behind a proxy that answers badly (make test-store).

The same stream as from disk: nothing lost, nothing read twice but what was asked for again, a cache within its bound.
"""

import contextlib
import json
import logging
import multiprocessing
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_proxy import FAULTS, Proxy, hostile_proxy
from PIL import Image
from read_stream import read_stream
from samples import make_tokenizer, question, write_jsonl, write_video

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.storage.shards import shard_counts

SAMPLES, BUCKET, MIB = 24, "bucket", 1 << 20
FRESH = multiprocessing.get_context("forkserver")  # the client reads its configuration once a process
FRESH.set_forkserver_preload(["read_stream"])


@dataclass
class Store:
    """proxy: before the server, whose bucket holds what lies in ``folder``."""

    proxy: Proxy
    folder: Path
    packages: str

    def read(
        self, root: str, names: list[str], scratch: Path, workers: int = 0, epochs: int = 1, **profile: Any
    ) -> Any:
        """What ``read_stream`` sends of the data sets ``names`` under ``root``; profile: more for the client."""
        options = {"endpoint_url": self.proxy.url, "region_name": "us-east-1", "base_path": BUCKET}
        options |= {"read_timeout": 1, "connect_timeout": 1, "retries": {"mode": "standard", "total_max_attempts": 4}}
        keys = {"type": "S3Credentials", "options": {"access_key": "key", "secret_key": "secret"}}
        store = {"storage_provider": {"type": "s3", "options": options}, "credentials_provider": keys}
        store["retry"] = {"attempts": 4, "delay": 0.01}
        cache = {"cache": profile.pop("cache")} if "cache" in profile else {}
        store["caching_enabled"] = bool(cache)
        scratch.mkdir(exist_ok=True)
        (scratch / "msc.json").write_text(json.dumps({"profiles": {"store": store | profile}, **cache}))
        self.proxy.log.clear()
        self.proxy.asked.clear()
        paths = [f"{root}/{name}" for name in names]
        mine, its = FRESH.Pipe(duplex=False)
        tokenizer = str(self.folder / "spm.model")
        reader = FRESH.Process(
            target=read_stream, args=(its, paths, tokenizer, workers, epochs, scratch, self.packages)
        )
        reader.start()
        its.close()
        try:
            return mine.recv()
        finally:
            reader.join()


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = request.config.getoption("--store-packages")
    sys.path.extend([folder] if folder else [])
    moto = pytest.importorskip("moto.server", reason="make test-store runs this: moto is not installed")
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("store")
    make_tokenizer(root)
    _build_sets(root)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        client.create_bucket(Bucket=BUCKET)
        with hostile_proxy(port) as proxy:
            own, sets = Store(proxy, root, folder or ""), ["pictures", "posters", "films"]
            own.read(str(root), sets, root / "local")  # text is counted before it is copied
            for file in (path for name in sets for path in (root / name).rglob("*")):
                if file.is_file():
                    client.put_object(Bucket=BUCKET, Key=str(file.relative_to(root)), Body=file.read_bytes())
            yield own
    finally:
        server.stop()


def _build_sets(root: Path) -> None:
    """Pictures of about 100 KB and posters of 600 that no codec shrinks, and films."""
    source = root / "source"
    source.mkdir()
    draw = np.random.default_rng(0)
    for name, sides in (("pictures", (190, 180, 3)), ("posters", (450, 450, 3))):
        for number in range(SAMPLES):
            Image.fromarray(draw.integers(0, 256, sides, np.uint8)).save(source / f"{name}{number}.png")
        records = [question(f"{name}-{n}", "<image>\nWhat?", "Noise.", f"{name}{n}.png") for n in range(SAMPLES)]
        build_dataset(write_jsonl(source, records, f"{name}.jsonl"), root / name, samples_per_shard=SAMPLES // 2)
    write_video(source / "a.mp4", 100)
    films = [question(f"f{number}", "<video>What?", "It.", video="a.mp4") for number in range(3)]
    build_dataset(write_jsonl(source, films, "films.jsonl"), root / "films")


def faults_in_turn(method: str, path: str, asked: str, nth: int) -> str:
    """The first question for every stretch of a shard, and for the larger files beside them, is answered badly."""
    if nth or method == "HEAD" or not path.endswith((".tar", ".sqlite", ".json", "keys.npy")):
        return ""
    return FAULTS[sum(map(ord, path + asked)) % len(FAULTS)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_on_a_bad_day_gives_the_same_stream(store: Store, tmp_path: Path, workers: int) -> None:
    local = store.read(str(store.folder), ["pictures", "films"], tmp_path)
    assert len(local["used"]) == SAMPLES + 3 and not local["rejected"] and not store.proxy.log
    store.proxy.fault_of = faults_in_turn
    assert store.read("msc://store", ["pictures", "films"], tmp_path, workers) == local
    assert {one.fault for one in store.proxy.log} == {"", *FAULTS}
    if not workers:  # reader processes go on into the next pass before they are ended
        assert_pictures_were_read_once(store)


def assert_pictures_were_read_once(store: Store) -> None:
    """Every byte of record and image came once, in one answer a sample; each bad answer is one request more."""
    whole = [one for one in store.proxy.whole(".tar") if "/pictures/" in one.path]
    assert len(whole) == SAMPLES
    covered = Counter[str]()
    for one in whole:
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", one.range).groups())  # type: ignore[union-attr]
        assert one.sent == last + 1 - first
        covered.update(f"{one.path}:{place // 512}" for place in range(first - first % 512, last + 1, 512))
    assert set(covered.values()) == {1}
    blocks = sum(
        (store.folder / "pictures" / shard).stat().st_size for shard in shard_counts(store.folder / "pictures")
    )
    assert len(covered) > 0.9 * blocks / 512  # all but headers and the ends of the tars
    bad = [one for one in store.proxy.log if one.fault and one.method == "GET" and "/pictures/shard" in one.path]
    assert len(bad) == SAMPLES


@pytest.mark.slow
def test_a_cache_serves_what_it_holds_and_keeps_nothing_that_came_short(store: Store, tmp_path: Path) -> None:
    store.proxy.fault_of = lambda method, path, asked, nth: "" if nth or not path.endswith(".tar") else "short"
    local = store.read(str(store.folder), ["pictures"], tmp_path, epochs=2)
    lines = {"cache_line_size": "1M", "location": str(tmp_path / "cache"), "check_source_version": False}
    assert store.read("msc://store", ["pictures"], tmp_path, epochs=2, cache={**lines, "size": "100M"}) == local
    asked = Counter((one.path, one.range) for one in store.proxy.whole(".tar"))
    whole = {what for what in asked if what[1] in ("bytes=0-1048575", "bytes=1048576-2097151")}
    assert len(whole) == 4  # two lines of two shards, and nothing for the second epoch
    short = sum(one.fault == "short" for one in store.proxy.log)
    assert (
        short and sum(asked.values()) - len(asked) <= short
    )  # where one comes short, all lines of its file are forgotten
    assert len(asked) <= 2 * len(whole)  # where a line came cut off, the client asks for the sample alone
    assert 2 * MIB < cached(tmp_path / "cache") < 4 * MIB


@pytest.mark.slow
def test_a_cache_smaller_than_the_data_stays_within_its_bound(store: Store, tmp_path: Path) -> None:
    """Its size, and what comes in until the client looks at it again, at a store that sends four lines a second."""
    size, every, answers = 2 * MIB, 1, 4
    store.proxy.fault_of = lambda *_: time.sleep(1 / answers) or ""
    local = store.read(str(store.folder), ["posters"], tmp_path)
    eviction = {"policy": "lru", "refresh_interval": every}
    lines = {"cache_line_size": "1M", "location": str(tmp_path / "cache"), "check_source_version": False}
    with greatest(lambda: cached(tmp_path / "cache")) as most:
        cache = {**lines, "size": "2M", "eviction_policy": eviction}
        assert store.read("msc://store", ["posters"], tmp_path, cache=cache) == local
    came = sum(one.sent for one in store.proxy.whole(".tar"))
    assert came > 14 * MIB > size + (every * answers + 2) * MIB >= max(most) > size / 2


@contextmanager
def greatest(number: Callable[[], int]) -> Iterator[list[int]]:
    """The number as it is every 50 ms meanwhile."""
    seen, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(FileNotFoundError):
                seen.append(number())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def cached(folder: Path) -> int:
    """Bytes that a cache holds."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.mark.slow
def test_what_is_not_there_and_a_store_that_is_gone_are_one_line(store: Store, tmp_path: Path) -> None:
    store.proxy.fault_of = lambda method, path, asked, nth: ""
    said = store.read("msc://store", ["nothing"], tmp_path)["error"]
    assert said.startswith("msc://store/nothing: not a data set made by 'megatron-eagle data build'")
    said = store.read("msc://other", ["pictures"], tmp_path)["error"]
    assert said.startswith("msc://other/pictures: ") and "other" in said and "\n" not in said
    gone = store.read(
        "msc://store",
        ["pictures"],
        tmp_path,
        storage_provider={
            "type": "s3",
            "options": {
                "endpoint_url": "http://127.0.0.1:9",
                "region_name": "us-east-1",
                "base_path": BUCKET,
                "retries": {"total_max_attempts": 2},
            },
        },
    )["error"]
    assert gone.startswith("msc://store/pictures/.nv-meta/") and "127.0.0.1:9" in gone and "\n" not in gone
    for workers in (0, 1):
        store.proxy.fault_of = lambda method, path, asked, nth: "503" if path.endswith("1.tar") else ""
        said = store.read("msc://store", ["pictures"], tmp_path, workers, retry={"attempts": 2, "delay": 0.01})["error"]
        assert re.match(r"msc://store/pictures/shard-000001.tar cannot be read: .*503.*; pack \d+ was due", said), said
        assert "\n" not in said


@pytest.mark.slow
def test_a_shard_that_is_missing_is_its_samples_rejected(store: Store, tmp_path: Path) -> None:
    store.proxy.fault_of = lambda method, path, asked, nth: "gone" if path.endswith("1.tar") else ""
    found = store.read("msc://store", ["pictures"], tmp_path)
    assert sorted(name for name, _ in found["rejected"]) == sorted(
        f"pictures-{number}" for number in range(SAMPLES // 2, SAMPLES)
    )
    assert all("msc://store/pictures/shard-000001.tar is not there" in reason for _, reason in found["rejected"])
