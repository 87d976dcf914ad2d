"""The planned stream: one order of packs for every number of ranks and readers, and continuation at any size."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from samples import image_bytes, make_dataset, make_settings, make_tokenizer, question, write_jsonl

from megatron_eagle.cli import main
from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.media.images import decode_image
from megatron_eagle.data.media.tiling import cut_tiles
from megatron_eagle.data.order.plan import Plan
from megatron_eagle.data.reports.inspection import write_page
from megatron_eagle.data.sample.chatml import encode_conversation
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.data.stream.digest import digest_of, read_digest, read_steps
from megatron_eagle.data.stream.pack_reader import PackReader
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.data.stream.streams import PackStream, open_stream
from megatron_eagle.errors import UserError

LENGTH, TOKENS_PER_TILE, BATCH = 512, 16, 8
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    return make_tokenizer(folder), make_dataset(folder / "a", 40, "a"), make_dataset(folder / "b", 24, "b", seed=1)


def data_settings(*paths, **changes):
    small = {"pack_length": LENGTH, "tile_size": 64, "tokens_per_tile": TOKENS_PER_TILE}
    return make_settings(*paths, **{**small, **changes})


def take(stream, count):
    return [next(stream) for _ in range(count)]


def ids(packs):
    return [sample_id for pack in packs for sample_id in pack.sample_ids]


def same(ours, theirs):
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


def epoch_packs(stream):
    return stream.plan.first_of_epoch(1)


def test_open_stream_takes_the_order_asked_for(world):
    tokenizer, a, _ = world
    assert isinstance(open_stream(data_settings(a), tokenizer, world_size=2, batch=4), PlannedStream)
    assert isinstance(open_stream(data_settings(a, order="buffer", packing_buffer=16), tokenizer), PackStream)


def test_an_epoch_holds_every_sample_once_as_it_was_encoded_alone(world):
    tokenizer, a, _ = world
    settings = data_settings(a)
    stored = {sample.conversation.id: sample for sample in iterate_samples(a)}
    stream = PlannedStream(settings, tokenizer)
    packs = take(stream, epoch_packs(stream))
    assert sorted(ids(packs)) == sorted(stored) and ids(packs) != sorted(stored)
    for pack in packs:
        slot, borders = 0, pack.cu_seqlens.tolist()
        for sample_id, start, end in zip(pack.sample_ids, borders, borders[1:], strict=False):
            tiles = [cut_tiles(decode_image(image), settings.tiling) for image in stored[sample_id].images]
            counts = [len(cut) for cut in tiles]
            expected = encode_conversation(stored[sample_id].conversation, tokenizer, counts, TOKENS_PER_TILE)
            assert torch.equal(pack.tokens[start:end], expected.tokens)
            if tiles:
                assert torch.equal(pack.tiles[slot : slot + sum(counts)], torch.cat(tiles))
            slot += sum(counts)
    following = take(stream, epoch_packs(stream))
    assert ids(following) != ids(packs) and Counter(ids(following)).most_common(1)[0][1] <= 2


def streams(settings, tokenizer, ranks, **others):
    return lambda rank: PlannedStream(settings, tokenizer, rank=rank, world_size=ranks, batch=BATCH, **others)


@pytest.mark.slow
def test_one_digest_for_every_number_of_ranks_and_readers(world):
    tokenizer, a, b = world
    settings = data_settings(a, BlendSource(str(b), 2.0))
    one = read_digest(streams(settings, tokenizer, 1, seed=5), 1, 60, BATCH)
    assert one.packs == 60 and one.samples > 120 and one.rejected == 0
    for ranks in (2, 4, 8):
        assert read_digest(streams(settings, tokenizer, ranks, seed=5), ranks, 60, BATCH) == one
    for workers in (1, 3):
        assert read_digest(streams(settings, tokenizer, 2, seed=5, workers=workers), 2, 60, BATCH) == one
    assert read_digest(streams(settings, tokenizer, 1, seed=6), 1, 60, BATCH) != one


@pytest.mark.long
def test_one_digest_of_2000_packs(world):
    tokenizer, a, b = world
    settings = data_settings(a, BlendSource(str(b), 2.0))
    one = read_digest(streams(settings, tokenizer, 1), 1, 2000, BATCH)
    print(one)
    for ranks in (2, 4, 8):
        assert read_digest(streams(settings, tokenizer, ranks), ranks, 2000, BATCH) == one
    for workers in (1, 2, 3, 4):
        assert read_digest(streams(settings, tokenizer, 1, workers=workers), 1, 2000, BATCH) == one


def interrupted_digest(open_rank, packs, interruptions, seed):
    """Stops after steps drawn by chance and goes on with the state that some rank saved, on another number of ranks."""
    rng = random.Random(seed)
    steps = math.ceil(packs / BATCH)
    stops = [*sorted(rng.sample(range(1, steps), interruptions)), steps]
    found, state, before = [], None, 0
    for stop in stops:
        ranks = rng.choice([1, 2, 4, 8])
        states = []
        for rank in range(ranks):
            stream = open_rank(rank, ranks)
            if state is not None:
                stream.restore(state)
            found += [(number, own) for number, own, _ in read_steps(stream, (stop - before) * BATCH // ranks)]
            states.append(stream.state())
        assert len({json.dumps({**json.loads(s), "ranks": 0}) for s in states}) == 1
        state, before = rng.choice(states), stop
    return digest_of((number, own) for number, own in found if number < packs)


def test_one_digest_after_stops_and_restarts_at_other_sizes(world):
    tokenizer, a, b = world
    settings = data_settings(a, BlendSource(str(b), 2.0))
    one = read_digest(streams(settings, tokenizer, 1), 1, 64, BATCH)
    again = interrupted_digest(lambda rank, ranks: streams(settings, tokenizer, ranks)(rank), 64, 4, seed=1)
    assert again == one.sha256


# A rank that writes down each pack it got, and after each step its position; started and killed by the test below.
VICTIM = """
import json, sys
from pathlib import Path
from megatron_eagle.data.stream.digest import read_steps
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.config.data import DataSettings, BlendSource
from megatron_eagle.data.sample.tokenizer import load_tokenizer
job = json.loads(sys.argv[1])
settings = DataSettings(sources=tuple(BlendSource(*s) for s in job["sources"]), **job["settings"])
tokenizer = load_tokenizer("sentencepiece", job["tokenizer"])
ranks, workers = job["ranks"], job["workers"]
streams = [PlannedStream(settings, tokenizer, rank=rank, world_size=ranks, batch=job["batch"], workers=workers)
           for rank in range(ranks)]
position, log = Path(job["position"]), open(job["log"], "a")
if position.exists():
    for stream in streams:
        stream.restore(position.read_bytes())
while True:
    packs = [pack for stream in streams for pack in read_steps(stream, job["batch"] // ranks)]
    log.write("".join(json.dumps([number, ids]) + "\\n" for number, ids, _ in packs))
    log.flush()
    position.with_suffix(".new").write_bytes(streams[0].state())
    position.with_suffix(".new").replace(position)
"""


def kill_at_random(world, tmp_path: Path, kills: int, packs: int) -> None:
    tokenizer, a, b = world
    settings = {"pack_length": LENGTH, "tile_size": 64, "tokens_per_tile": TOKENS_PER_TILE}
    job = {
        "sources": [[str(a)], [str(b), 2.0]],
        "settings": settings,
        "tokenizer": str(a.parent.parent / "spm.model"),
        "batch": BATCH,
        "position": str(tmp_path / "position"),
        "log": str(tmp_path / "log"),
    }
    rng = random.Random(7)
    log = tmp_path / "log"
    log.touch()
    sizes = []
    for kill in range(kills + 1):
        job |= {"ranks": rng.choice([r for r in (1, 2, 4, 8) if sizes[-1:] != [r]]), "workers": rng.choice([0, 0, 1])}
        sizes.append(job["ranks"])
        aim = rng.uniform(0.2, 1.8) * packs / (kills + 1) if kill < kills else packs
        before = len(log.read_text().splitlines())
        victim = subprocess.Popen([sys.executable, "-c", VICTIM, json.dumps(job)], start_new_session=True)
        deadline = time.monotonic() + 240
        while len(log.read_text().splitlines()) < (before + aim if kill < kills else packs + 2 * BATCH * (kills + 1)):
            assert victim.poll() is None and time.monotonic() < deadline, f"victim {kill} ended or hung"
            time.sleep(rng.uniform(0.01, 0.05))
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
    found: dict[int, list[str]] = {}
    for line in log.read_text().splitlines():
        try:
            number, own = json.loads(line)
        except ValueError:
            continue  # cut off by a kill; the step is in the log again
        assert found.setdefault(number, own) == own
    one = read_digest(
        streams(DataSettings(sources=(BlendSource(str(a)), BlendSource(str(b), 2.0)), **settings), tokenizer, 1),
        1,
        packs,
        BATCH,
    )
    digest = digest_of((number, own) for number, own in found.items() if number < packs)
    print(f"{kills} kills, ranks {sizes}, sha256 {digest}")
    assert digest == one.sha256


@pytest.mark.long
def test_one_digest_after_20_kills(world, tmp_path):
    kill_at_random(world, tmp_path, kills=20, packs=2000)


def test_the_packs_of_a_step_cost_the_ranks_the_same(world):
    tokenizer, a, b = world
    settings = data_settings(a, b, attention_parity=100)
    shares = [PlannedStream(settings, tokenizer, rank=rank, world_size=2, batch=BATCH) for rank in range(2)]
    plan = shares[0].plan
    for _ in range(4):
        numbers = [[n for n, *_ in read_steps(stream, BATCH // 2)] for stream in shares]
        first = min(numbers[0] + numbers[1])
        assert sorted(numbers[0] + numbers[1]) == list(range(first, first + BATCH))
        loads = [sum(map(plan.cost, own)) for own in numbers]
        in_order = [sum(plan.cost(n) for n in range(first + rank, first + BATCH, 2)) for rank in range(2)]
        assert max(loads) <= max(in_order) and max(loads) / sum(loads) < 0.52


def test_weights_and_repeats(world):
    tokenizer, a, b = world
    blend = PlannedStream(data_settings(BlendSource(str(a), 1), BlendSource(str(b), 3)), tokenizer)
    drawn = Counter(i[0] for i in ids(take(blend, 200)))
    assert drawn["b"] / drawn.total() == pytest.approx(0.75, abs=0.03)
    repeats = data_settings(BlendSource(str(a), repeat=0.5), BlendSource(str(b), repeat=2.0))
    stream = PlannedStream(repeats, tokenizer)
    first = Counter(ids(take(stream, epoch_packs(stream))))
    second = Counter(ids(take(stream, stream.plan.first_of_epoch(2) - epoch_packs(stream))))
    assert [count for i, count in first.items() if i[0] == "b"] == [2] * 24
    assert sum(count for i, count in first.items() if i[0] == "a") == 20
    assert {i: c for i, c in (first + second).items() if i[0] == "a"} == {f"a{n}": 1 for n in range(40)}
    for sources, message in [
        ((BlendSource(str(a), repeat=2.0), BlendSource(str(b))), "give all of them one"),
        ((BlendSource(str(a), repeat=2.0),), "needs order=planned"),
    ]:
        with pytest.raises(ValueError, match=message):
            data_settings(*sources, order="planned" if len(sources) > 1 else "buffer")


def test_windows_smaller_than_an_epoch_lose_nothing(world):
    tokenizer, a, b = world
    stream = PlannedStream(
        data_settings(BlendSource(str(a), repeat=1.0), BlendSource(str(b), repeat=1.0), plan_window=13), tokenizer
    )
    seen = Counter(ids(take(stream, stream.plan.first_of_epoch(3))))
    assert seen.total() == 3 * 64 and set(seen.values()) == {3}


def sick_world(tmp_path):
    records = []
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes((200 + number, 200), "red", "JPEG"))
        records.append(question(f"s{number}", "<image>\nWhat?", "Red.", f"{number}.jpg"))
    records[7]["conversations"][0]["value"] += " word" * 600
    build_dataset(write_jsonl(tmp_path, records), tmp_path / "built", samples_per_shard=4)
    return tmp_path / "built"


def test_a_sample_that_breaks_moves_no_other(world, tmp_path):
    from test_stream import break_samples

    tokenizer, *_ = world
    built = sick_world(tmp_path)
    settings = data_settings(built)
    stream = PlannedStream(settings, tokenizer)
    count = epoch_packs(stream)
    whole = take(stream, count)
    assert [sample for pack in whole for sample, _ in pack.rejected] == ["s7"]
    break_samples(
        built,
        {
            "-s1.json": lambda data: b"nonsense",
            "-s3.0.jpg": lambda data: b"no image",
            "-s5.0.jpg": lambda data: data[: len(data) * 2 // 3],
            "-s8.0.jpg": lambda data: image_bytes((20, 200), "red", "JPEG"),
            "-s9.json": lambda data: data.replace(b"0.jpg", b"9.jpg"),
        },
    )
    reasons = {
        "s1": "not JSON",
        "s3": "not an image",
        "s5": "cannot be decoded",
        "s7": "tokens .* a pack holds 512",
        "s8": "the shard was changed",
        "s9": "no image 9.jpg in the shard",
    }
    for workers in (0, 2):
        stream = PlannedStream(settings, tokenizer, workers=workers)
        broken = take(stream, count)
        stream.close()
        assert [[i for i in p.sample_ids if i not in reasons] for p in whole] == [p.sample_ids for p in broken]
        rejected = dict(item for pack in broken for item in pack.rejected)
        assert rejected.keys() == reasons.keys()
        assert not [(sample, reason) for sample, reason in rejected.items() if not re.search(reasons[sample], reason)]
        assert len(ids(broken)) + len(rejected) == 12  # read = used + rejected


def test_a_shard_that_vanishes_and_one_that_is_cut(world, tmp_path):
    tokenizer, a, _ = world
    copy = tmp_path / "copy"
    shutil.copytree(a, copy)
    stream = PlannedStream(data_settings(copy, max_rejected_in_a_row=30), tokenizer)
    count = epoch_packs(stream)
    (copy / "shard-000001.tar").unlink()
    data = (copy / "shard-000002.tar").read_bytes()
    (copy / "shard-000002.tar").write_bytes(data[: len(data) // 2])
    packs = take(stream, count)
    rejected = [item for pack in packs for item in pack.rejected]
    assert len(ids(packs)) + len(rejected) == 40 and {f"a{n}" for n in range(10, 20)} <= {i for i, _ in rejected}
    assert 10 < len(rejected) < 20 and all("shard-00000" in r or "cannot" in r or "JSON" in r for _, r in rejected)
    for shard in copy.glob("*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match=r"\d\d samples in a row are broken, the last is 'a\d+'"):
        take(stream, count)


class Loser(PackReader):
    """A bug: a sample is dropped without a word."""

    def __getitem__(self, pack):
        return super().__getitem__(dataclasses.replace(pack, samples=pack.samples[1:]))


def test_a_sample_that_is_neither_used_nor_rejected_stops_the_run(world):
    tokenizer, a, _ = world
    stream = PlannedStream(data_settings(a), tokenizer)
    lost = stream.plan.pack(0).samples[0].id
    stream._reader = Loser(data_settings(a), tokenizer)
    with pytest.raises(RuntimeError, match=rf"pack 0 should account for \d+ samples .*missing \['{lost}'\]"):
        next(stream)


class Sleeper(PackReader):
    def __getitem__(self, pack):
        if pack.number == 3:
            time.sleep(60)
        return super().__getitem__(pack)


def test_a_reader_process_that_hangs_is_named(world):
    tokenizer, a, _ = world
    settings = data_settings(a, reader_timeout=2)
    stream = PlannedStream(settings, tokenizer, workers=1)
    stream._reader = Sleeper(settings, tokenizer)
    take(stream, 3)
    with pytest.raises(
        UserError, match="hangs or died: DataLoader timed out after 2 seconds; pack 3 was due, of sampl"
    ):
        next(stream)


def test_positions_of_other_streams_are_refused(world):
    tokenizer, a, b = world
    stream = PlannedStream(data_settings(a), tokenizer, batch=4)
    take(stream, 3)
    half = stream.state()
    again = PlannedStream(data_settings(a), tokenizer, batch=4)
    again.restore(half)
    assert same(next(again), next(stream))
    with pytest.raises(UserError, match="0 packs and 3 of the next step's .* 4 packs a step on 1 ranks"):
        PlannedStream(data_settings(a), tokenizer, world_size=2, batch=4).restore(half)
    with pytest.raises(UserError, match="another stream: sources was"):
        PlannedStream(data_settings(b), tokenizer, batch=4).restore(half)
    with pytest.raises(UserError, match="seed was 0, is 1; pack_length was 512, is 600"):
        PlannedStream(data_settings(a, pack_length=600), tokenizer, seed=1, batch=4).restore(half)
    older = json.loads(half)
    del older["identity"]["settings"]["text_format"]
    with pytest.raises(UserError, match=r"before 2026-11-26, when other line breaks .*compatibility\.md"):
        PlannedStream(data_settings(a), tokenizer, batch=4).restore(json.dumps(older).encode())
    with pytest.raises(ValueError, match="batch=3 packs cannot be shared out"):
        PlannedStream(data_settings(a), tokenizer, world_size=2, batch=3)


def costs_left_out(state: bytes) -> bytes:
    """The position as it was saved before costs followed from the model."""
    saved = json.loads(state)
    del saved["costs"]
    return json.dumps(saved).encode()


def test_other_costs_deal_a_step_otherwise_but_make_no_other_stream(world):
    tokenizer, a, _ = world

    def opened(**costs):
        return PlannedStream(data_settings(a, **costs), tokenizer, rank=0, world_size=2, batch=4)

    stream = opened()
    take(stream, 2)
    whole = stream.state()
    next(stream)
    half, following = stream.state(), next(stream)
    for state in (whole, costs_left_out(whole)):
        opened(attention_parity=100, tile_cost=30.0).restore(state)
    for state in (half, costs_left_out(half)):
        again = opened()
        again.restore(state)
        assert same(next(again), following)
        with pytest.raises(UserError, match="1 packs into a step .* attention_parity was 65000, is 100; tile_cost was"):
            opened(attention_parity=100, tile_cost=30.0).restore(state)
    alone = PlannedStream(data_settings(a), tokenizer, batch=4)
    next(alone)
    PlannedStream(data_settings(a, attention_parity=100), tokenizer, batch=4).restore(alone.state())


def test_samples_too_long_are_shown_with_fewer_tiles(world, tmp_path):
    tokenizer, *_ = world
    (tmp_path / "big.png").write_bytes(image_bytes((400, 300), "red"))
    names = ["big.png"] * 3
    built = tmp_path / "built"
    build_dataset(write_jsonl(tmp_path, [question("big", "<image>" * 3 + "What?", "Red.", names)]), built)
    with pytest.raises(
        UserError, match="no sample of .* can be used: sample of .* tokens .39 tiles., a pack holds 512"
    ):
        PlannedStream(data_settings(built), tokenizer)
    pack = next(PlannedStream(data_settings(built, degrade=True), tokenizer))
    assert pack.sample_ids == ["big"] and len(pack.tiles) == 21  # 3 x (3x2 + thumbnail)


def test_inspection_shows_what_the_model_sees(world, tmp_path):
    tokenizer, a, b = world
    views = write_page(Plan(data_settings(a, b), tokenizer, 0), tmp_path / "page", shown=5)
    assert [len(view.tokens) for view in views] == [40, 24]
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("<article") == 5 and page.count('<div class="block learned">') == 5
    write_page(Plan(data_settings(a, b), tokenizer, 0), tmp_path / "page", shown=64)
    page = (tmp_path / "page" / "index.html").read_text()
    assert "4 x 3 and a thumbnail</a>" in page and "frames of a sample" not in page  # a panel of what there is not
    assert "What is number" in page and "40 = 40 + 0" in page
    assert (tmp_path / "page" / "lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_data_commands(small_run, tmp_path, capsys):
    recipe = small_run.write_recipe(tmp_path / "recipe.yaml")

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["data", *arguments])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    parts = [run("measure", str(recipe), "--part", f"{number}/2") for number in (1, 2)]
    assert all(f"part {number}/2: " in said and "without --part" in said for number, said in enumerate(parts, 1))
    assert "first: " in run("measure", str(recipe), "--workers", "2") and "80 samples = 80 used + 0 rejected" in run(
        "measure", str(recipe)
    )
    digests = {
        run("digest", str(recipe), "--packs", "10", "--dp", dp, "stages.first.batch=4") for dp in ("1", "2", "4")
    }
    assert len(digests) == 1 and "10 packs" in digests.pop()
    report = run("pack-report", str(recipe), "--ranks", "2", "--plot", str(tmp_path / "packs.png"))
    assert "balanced | " in report and (tmp_path / "packs.png").exists() and " dealt / bound" in report
    assert "degraded or dropped, by source, in packs of" in report and ": 80 whole" in report
    inspected = run("inspect", str(recipe), "--out", str(tmp_path / "page"), "--shown", "2")
    assert "80 = 80 + 0" in inspected and "degraded or dropped, by source" in inspected
    assert "Degraded or dropped</h2>" in (tmp_path / "page" / "index.html").read_text()
