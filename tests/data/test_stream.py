"""The stream: same seed same packs, exact continuation, blend, skipped samples, and bugs that are not swallowed."""

import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import re
import tarfile
import time
from collections import Counter

import pytest
import torch
from samples import image_bytes, make_dataset, make_settings, make_tokenizer, question, write_jsonl

from megatron_eagle.config.data import BlendSource
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.images import decode_image
from megatron_eagle.data.media.tiling import cut_tiles
from megatron_eagle.data.sample.chatml import encode_conversation
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.data.stream import energon
from megatron_eagle.data.stream.streams import PackStream, open_stream
from megatron_eagle.errors import UserError

LENGTH, TOKENS_PER_TILE = 512, 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer and two data sets of 40 and 24 samples, none of them longer than a pack."""
    folder = tmp_path_factory.mktemp("world")
    return make_tokenizer(folder), make_dataset(folder / "a", 40, "a"), make_dataset(folder / "b", 24, "b", seed=1)


def data_settings(*paths, **changes):
    small = {
        "pack_length": LENGTH,
        "tile_size": 64,
        "tokens_per_tile": TOKENS_PER_TILE,
        "order": "buffer",
        "packing_buffer": 16,
        "shuffle_buffer": 10,
        "max_samples_per_sequence": 5,
    }
    return make_settings(*paths, **{**small, **changes})


def take(stream, count):
    return [next(stream) for _ in range(count)]


def same(ours: PackedBatch, theirs: PackedBatch):
    for field in dataclasses.fields(PackedBatch):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


def all_same(ours, theirs):
    return len(ours) == len(theirs) and all(map(same, ours, theirs))


def ids(packs):
    return [sample_id for pack in packs for sample_id in pack.sample_ids]


def test_packs_hold_the_samples_as_encoded_one_by_one(world):
    tokenizer, a, _ = world
    settings = data_settings(a)
    stored = {sample.conversation.id: sample for sample in iterate_samples(a)}
    seen_tiles = set()
    for pack in take(PackStream(settings, tokenizer), 12):
        assert pack.length == LENGTH and pack.rejected == []
        borders, slot = pack.cu_seqlens.tolist(), 0
        for sample_id, start, end in zip(pack.sample_ids, borders, borders[1:], strict=False):
            sample = stored[sample_id]
            tiles = [cut_tiles(decode_image(image), settings.tiling) for image in sample.images]
            counts = [len(cut) for cut in tiles]
            expected = encode_conversation(sample.conversation, tokenizer, counts, TOKENS_PER_TILE)
            assert torch.equal(pack.tokens[start:end], expected.tokens)
            assert torch.equal(pack.tile_slots[slot : slot + sum(counts)] - start, expected.tile_slots)
            if tiles:
                assert torch.equal(pack.tiles[slot : slot + sum(counts)], torch.cat(tiles))
            slot += sum(counts)
            seen_tiles.add(sum(counts))
        assert slot == len(pack.tiles) and pack.useful_tokens == borders[len(pack.sample_ids)]
    assert 0 in seen_tiles and max(seen_tiles) > 7


def test_same_seed_same_packs(world):
    tokenizer, a, b = world
    settings = data_settings(a, b)
    first = take(PackStream(settings, tokenizer, seed=3), 10)
    assert all_same(first, take(PackStream(settings, tokenizer, seed=3), 10))
    assert ids(first) != ids(take(PackStream(settings, tokenizer, seed=4), 10))


def test_an_epoch_holds_every_sample_once_in_shuffled_order(world):
    tokenizer, a, _ = world
    packs = PackStream(data_settings(a, packing_buffer=40, shuffle_buffer=1), tokenizer)
    seen: list[str] = []
    while len(seen) < 40:
        seen += next(packs).sample_ids
    assert sorted(seen) == sorted(f"a{n}" for n in range(40)) and seen != sorted(seen, key=lambda s: int(s[1:]))


def test_ranks_share_out_the_samples(world):
    tokenizer, a, _ = world
    settings = data_settings(a, packing_buffer=20, shuffle_buffer=1)
    halves = []
    for rank in range(2):
        packs = PackStream(settings, tokenizer, rank=rank, world_size=2)
        half: list[str] = []
        while len(half) < 20:
            half += next(packs).sample_ids
        halves.append(set(half))
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 40


def test_blend_follows_the_weights(world):
    tokenizer, a, b = world
    blend = PackStream(data_settings(BlendSource(str(a), 1), BlendSource(str(b), 3)), tokenizer)
    drawn = Counter(sample_id[0] for sample_id in ids(take(blend, 150)))
    assert drawn["b"] / drawn.total() == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("packs_before", [0, 1, 7])
def test_continues_exactly(world, packs_before):
    tokenizer, a, b = world
    settings = data_settings(a, b)
    stream = PackStream(settings, tokenizer, seed=1)
    take(stream, packs_before)
    state = stream.state()
    rest = take(stream, 8)
    again = PackStream(settings, tokenizer, seed=1)
    again.restore(state)
    assert all_same(take(again, 8), rest)
    again.restore(state)  # also after it has moved on
    assert all_same(take(again, 8), rest)


@pytest.mark.slow
def test_continues_exactly_with_reader_processes(world, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # else 5 s at each teardown
    before = set(multiprocessing.active_children())  # worlds that other tests started
    tokenizer, a, b = world
    settings = data_settings(a, b)
    stream = PackStream(settings, tokenizer, seed=1, workers=2)
    take(stream, 3)
    state = stream.state()
    rest = take(stream, 5)
    stream.close()
    again = PackStream(settings, tokenizer, seed=1, workers=2)
    again.restore(state)
    following = take(again, 5)
    again.close()
    assert all_same(following, rest)
    deadline = time.monotonic() + 20  # a process that was told to end may wait for a core to do so
    while not set(multiprocessing.active_children()) <= before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(multiprocessing.active_children()) <= before


def test_a_moved_data_set_continues_a_changed_one_does_not(world, tmp_path):
    tokenizer, a, b = world
    stream = PackStream(data_settings(a), tokenizer)
    next(stream)
    state, following = stream.state(), next(stream)
    (tmp_path / "moved").symlink_to(a)
    moved = PackStream(data_settings(tmp_path / "moved"), tokenizer)
    moved.restore(state)
    assert same(next(moved), following)
    with pytest.raises(UserError, match="another stream: sources was"):
        PackStream(data_settings(b), tokenizer).restore(state)
    with pytest.raises(UserError, match="seed was 0, is 1; pack_length was 512, is 600"):
        PackStream(data_settings(a, pack_length=600), tokenizer, seed=1).restore(state)


def test_settings_that_no_pack_depends_on_may_change_before_a_position_is_continued(world):
    tokenizer, a, _ = world
    stream = PackStream(data_settings(a), tokenizer)
    next(stream)
    state, following = stream.state(), next(stream)
    again = PackStream(data_settings(a, attention_parity=100, reader_timeout=5, max_rejected_in_a_row=3), tokenizer)
    again.restore(state)
    assert same(next(again), following)
    with pytest.raises(UserError, match="another stream: max_pixels was 89478485, is 9"):
        PackStream(data_settings(a, max_pixels=9), tokenizer).restore(state)


def test_another_tokenizer_of_the_same_size_is_another_stream(world, monkeypatch):
    tokenizer, a, _ = world
    stream = PackStream(data_settings(a), tokenizer)
    next(stream)
    state, following = stream.state(), next(stream)
    older = json.loads(state)
    del older["identity"]["tokenizer"]  # positions before 2026-11-26 had the size alone
    again = PackStream(data_settings(a), tokenizer)
    again.restore(json.dumps(older).encode())
    assert same(next(again), following)
    monkeypatch.setattr(tokenizer, "fingerprint", "other")
    with pytest.raises(UserError, match="another stream: tokenizer was"):
        PackStream(data_settings(a), tokenizer).restore(state)


def test_a_position_is_plain_data(world):
    """JSON of strings, numbers, lists and objects: nothing that a reader would have to make anything of."""
    tokenizer, a, b = world
    stream = PackStream(data_settings(a, b), tokenizer, seed=1)
    take(stream, 3)
    saved = json.loads(stream.state())
    assert saved["loader"].keys() == {"SavableDataLoaderState"}


class MakesFolder:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("order", ["buffer", "planned"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_position_that_is_a_pickle_is_refused_and_not_run(world, tmp_path, archive, order):
    tokenizer, a, _ = world
    evil, buffer = MakesFolder(tmp_path / "ran"), io.BytesIO()
    torch.save(evil, buffer)
    stream = open_stream(data_settings(a, order=order), tokenizer)
    with pytest.raises(UserError, match=r"position is a pickle, .* so it is refused: finish the stage with"):
        stream.restore(buffer.getvalue() if archive else pickle.dumps(evil))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (None, "no state of Energon's loader, but a NoneType"),
        ({"FlexState": {}}, "no state of Energon's loader, but a FlexState"),
        ({"os.system": ["true"]}, "names a 'os.system'"),
        ({"ndarray": ["object", {"bytes": ""}]}, "numbers of type 'object'"),
        ({"SliceState": {"index": 0, "current": 0, "more": 0}}, "unexpected keyword argument 'more'"),
        ({"tuple": [], "bytes": ""}, "too many values"),
    ],
)
def test_a_position_of_anything_else_is_refused(world, loader, reason):
    tokenizer, a, _ = world
    stream = PackStream(data_settings(a), tokenizer)
    saved = {**json.loads(stream.state()), "loader": loader}
    with pytest.raises(UserError, match=f"position cannot be read: .*{reason}"):
        stream.restore(json.dumps(saved).encode())
    for damaged in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000):
        with pytest.raises(UserError, match="position cannot be read"):
            stream.restore(damaged)


def break_samples(dataset, broken):
    """Overwrites files inside the shards, sizes kept: {key ending with this: {file ending: function of the bytes}}."""
    for shard in dataset.glob("*.tar"):
        data = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            for member in tar:
                for name, change in broken.items():
                    if member.name.endswith(name):
                        span = slice(member.offset_data, member.offset_data + member.size)
                        data[span] = change(bytes(data[span])).ljust(member.size, b"\0")[: member.size]
        shard.write_bytes(data)


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """12 samples, of which: no JSON, image header gone, image cut short, more tokens than a pack, no image at all."""
    tmp_path = tmp_path_factory.mktemp("sick")
    records = []
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes((200 + number, 200), "red", "JPEG"))
        records.append(question(f"s{number}", "<image>\nWhat?", "Red.", f"{number}.jpg"))
    records[7]["conversations"][0]["value"] += " word" * 600
    build_dataset(write_jsonl(tmp_path, records), tmp_path / "built", samples_per_shard=4)
    break_samples(
        tmp_path / "built",
        {
            "-s1.json": lambda data: b"nonsense",
            "-s3.0.jpg": lambda data: b"no image",
            "-s5.0.jpg": lambda data: data[: len(data) * 2 // 3],
            "-s9.json": lambda data: data.replace(b"0.jpg", b"9.jpg"),
        },
    )
    return tmp_path / "built"


# A sample that cannot be parsed goes by its key in the shard.
REASONS = {
    "000000001-s1": "not JSON",
    "s3": "not an image",
    "s5": "cannot be decoded",
    "s7": "tokens .* a pack holds 512",
    "000000009-s9": "no image 9.jpg",
}


def test_broken_samples_are_skipped_and_named_once_an_epoch(world, sick):
    tokenizer, *_ = world
    stream = PackStream(data_settings(sick, packing_buffer=12, shuffle_buffer=1), tokenizer)
    good: list[str] = []
    rejected: list[tuple[str, str]] = []
    while len(good) < 21:
        pack = next(stream)
        good += pack.sample_ids
        rejected += pack.rejected
    assert Counter(good) == {f"s{n}": 3 for n in range(12) if n not in (1, 3, 5, 7, 9)}
    # The last epoch's cut image may sit in a pack that is not due yet.
    counts = Counter(sample_id for sample_id, _ in rejected)
    assert counts.keys() == REASONS.keys() and all(count in (2, 3) for count in counts.values())
    for sample_id, reason in rejected:
        assert re.search(REASONS[sample_id], reason)


def test_rejections_are_part_of_the_continuation(world, sick):
    tokenizer, *_ = world
    settings = data_settings(sick, packing_buffer=5, shuffle_buffer=3)
    stream = PackStream(settings, tokenizer)
    for _ in range(6):
        state = stream.state()
        rest = take(stream, 4)
        again = PackStream(settings, tokenizer)
        again.restore(state)
        assert all_same(take(again, 4), rest)
    assert any(pack.rejected for pack in rest)


def test_a_stream_of_broken_samples_ends(world, sick):
    tokenizer, *_ = world
    stream = PackStream(data_settings(sick, max_pixels=10, max_rejected_in_a_row=50), tokenizer)
    with pytest.raises(UserError, match=r"\d\d samples in a row are broken, the last is 's?\d+.*"):
        next(stream)


@pytest.mark.parametrize("hook", ["tokenise", "pack_by_settings", "add_tiles"])
@pytest.mark.parametrize("error", [ValueError, AssertionError, KeyError, NameError])
def test_our_own_bugs_are_not_taken_for_broken_samples(world, monkeypatch, hook, error):
    def bug(*_):
        raise error("a bug of ours")

    tokenizer, a, _ = world
    monkeypatch.setattr(energon, hook, bug)
    with pytest.raises(Exception, match="a bug of ours") as caught:
        next(PackStream(data_settings(a), tokenizer))
    assert not isinstance(caught.value, UserError)


def test_a_bound_on_tiles(world):
    tokenizer, a, _ = world
    packs = take(PackStream(data_settings(a, max_tiles_per_pack=14), tokenizer), 20)
    assert all(len(pack.tiles) <= 14 for pack in packs)
    assert all("a pack holds 14" in reason for pack in packs for _, reason in pack.rejected)
    assert max(len(p.tiles) for p in take(PackStream(data_settings(a), tokenizer), 20)) > 14


def test_packs_without_any_tile(world, tmp_path):
    tokenizer, *_ = world
    records = [question(f"t{n}", f"What is number {n}?", "It is red.") for n in range(8)]
    build_dataset(write_jsonl(tmp_path, records), tmp_path / "built")
    pack = next(PackStream(data_settings(tmp_path / "built"), tokenizer))
    assert pack.tiles.shape == (0, 3, 64, 64) and pack.tiles.dtype == torch.uint8 and len(pack.tile_slots) == 0


def test_best_fit_wastes_little(world):
    tokenizer, a, b = world
    settings = data_settings(a, b, packing="best_fit", packing_buffer=200)
    packs = take(PackStream(settings, tokenizer), 40)
    assert 1 - sum(pack.useful_tokens for pack in packs) / (40 * LENGTH) < 0.06


def test_impossible_sources_and_settings(world, tmp_path):
    tokenizer, a, _ = world
    with pytest.raises(UserError, match="not a data set made by"):
        PackStream(data_settings(tmp_path), tokenizer)
    with pytest.raises(UserError, match="40 samples cannot be shared out over 64 readers"):
        PackStream(data_settings(a), tokenizer, rank=0, world_size=32, workers=2)
    with pytest.raises(ValueError, match="rank 2 is not among 2"):
        PackStream(data_settings(a), tokenizer, rank=2, world_size=2)
    for changes, message in [
        ({"pack_length": 8}, "pack_length=8 cannot hold one tile of 16 tokens"),
        ({"min_tiles": 13}, "min_tiles=13 is more than max_tiles=12"),
        ({"packing": "best_fit", "packing_delta": 3}, "packing_delta=3"),
        ({"no_such_key": 3}, "no_such_key"),
    ]:
        with pytest.raises(ValueError, match=message):
            data_settings(a, **changes)
    with pytest.raises(ValueError, match="at least one source"):
        data_settings()
