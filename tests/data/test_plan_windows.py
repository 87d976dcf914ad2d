"""Windows of the plan: they look at what they draw, and to continue costs one of them wherever it is."""

import json

import numpy as np
import pytest
from samples import image_bytes, make_dataset, make_settings, make_tokenizer, question, write_jsonl

from megatron_eagle.config.data import BlendSource
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.order import source_samples
from megatron_eagle.data.order.lengths import dataset_lengths, lengths_of
from megatron_eagle.data.order.measuring import open_sample_index, text_tokens
from megatron_eagle.data.order.plan import Plan, WindowStart, epoch_lengths
from megatron_eagle.data.order.sample_index import Names
from megatron_eagle.data.order.window import Window
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.location import is_mapped, load_array
from megatron_eagle.data.stream.planned import PlannedStream
from megatron_eagle.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    return make_tokenizer(folder), make_dataset(folder / "a", 40, "a"), make_dataset(folder / "b", 24, "b", seed=1)


def small(*paths, **changes):
    return make_settings(*paths, **{"pack_length": 512, "tile_size": 64, "tokens_per_tile": 16, **changes})


def planned_windows(plan):
    """Numbers of the windows that a plan plans from now on."""
    numbers, before = [], plan.window
    plan.window = lambda number: numbers.append(number) or before(number)
    return numbers


def test_to_continue_plans_one_window_wherever_it_is(world):
    tokenizer, a, b = world
    settings = small(a, b, plan_window=13)

    def opened():
        return PlannedStream(settings, tokenizer, world_size=2, batch=4)

    stream = opened()
    following = []
    while len(following) < 60:
        state = stream.state()
        first = 4 * stream._taken // 2
        following = [*following, next(stream).sample_ids]
        next(stream)
        saved = json.loads(state)
        assert 0 <= saved["packs"] - saved["window"]["packs"] <= len(stream.plan.window(saved["window"]["window"]))
        again = opened()
        again.restore(state)
        numbers = planned_windows(again.plan)
        assert next(again).sample_ids == following[-1] and again.plan.start_of(first).packs <= first
        assert min(numbers) == saved["window"]["window"] and len(set(numbers)) <= 3  # a step of 4 packs may span 3
    assert saved["window"]["window"] > 10


def test_packs_before_the_window_that_a_plan_starts_at_are_refused(world):
    tokenizer, a, _ = world
    plan = Plan(small(a, plan_window=10), tokenizer, 0)
    third = plan.first_of_epoch(1)
    expected = plan.pack(third)
    start = plan.start_of(third)
    again = Plan(small(a, plan_window=10), tokenizer, 0)
    again.start_at(start)
    assert again.pack(third) == expected and start == WindowStart(4, third)
    for asked in (lambda: again.pack(third - 1), lambda: again.first_of_epoch(0)):
        with pytest.raises(ValueError, match="where this plan was told to start"):
            asked()


def test_a_position_of_the_order_before_is_refused(world):
    tokenizer, a, _ = world
    stream = PlannedStream(small(a), tokenizer)
    next(stream)
    older = json.loads(stream.state())
    del older["identity"]["order_format"], older["window"]
    with pytest.raises(UserError, match=r"before sources were shuffled place by place .*compatibility\.md\)$"):
        stream.restore(json.dumps(older).encode())
    newer = json.loads(stream.state())
    newer["identity"]["order_format"] = 3
    with pytest.raises(UserError, match="another stream: order_format was 3, is 2"):
        stream.restore(json.dumps(newer).encode())


def test_lengths_of_some_samples_are_those_of_all(tmp_path):
    """Images, films and what is broken, degraded or too long; kept beside the shards or not."""
    tokenizer = make_tokenizer(tmp_path)
    records = []
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(image_bytes((64 * (number + 1), 200), "red"))
        records.append(question(f"s{number}", "<image>\nWhat?", "Red." + " word" * 90 * (number % 4), f"{number}.png"))
    records[7]["conversations"][0]["value"] += " word" * 600
    build_dataset(write_jsonl(tmp_path, records), tmp_path / "built", samples_per_shard=4)
    index = open_sample_index(tmp_path / "built")
    for changes in ({}, {"degrade": True}, {"max_tiles_per_pack": 9}):
        settings = small(tmp_path / "built", **changes)
        whole = dataset_lengths(index, tokenizer, settings)
        assert whole.rejected or changes == {"degrade": True}
        for samples in (np.arange(12), np.array([7, 3, 11, 7]), np.zeros(0, np.int64)):
            text = text_tokens(index, tokenizer, settings.reading.system)
            some = lengths_of(index, text, samples, VisualPlanner(settings, tokenizer))
            for name in ("tokens", "tiles", "frames"):
                assert (getattr(some, name) == getattr(whole, name)[samples]).all()
            chosen = {n: whole.rejected[s] for n, s in enumerate(samples.tolist()) if s in whole.rejected}
            assert some.rejected == chosen


def test_opening_looks_at_few_samples_and_a_window_at_its_own(world, monkeypatch):
    tokenizer, a, b = world
    looked_at = []

    def counted(index, text, samples, planner):
        looked_at.append(len(samples))
        return lengths_of(index, text, samples, planner)

    monkeypatch.setattr(source_samples, "lengths_of", counted)
    monkeypatch.setattr(source_samples, "FIRST_LOOK", 2)
    plan = Plan(small(a, BlendSource(str(b), 3.0), plan_window=8), tokenizer, 0)
    assert looked_at == [2]
    window = plan.window(100)
    assert looked_at[1:] == [2, 6] and len(window.tokens) == 8


def test_a_sample_that_can_be_used_is_found_however_late_it_is(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    long = [question(f"long{n}", "What?" + " word" * 600, "It.") for n in range(150)]
    for records, name in (([*long, question("short", "What?", "It.")], "one"), (long, "none")):
        folder = tmp_path / name
        folder.mkdir()
        build_dataset(write_jsonl(folder, records), folder / "built")
    sources = [BlendSource(str(tmp_path / name / "built"), repeat=1.0) for name in ("none", "one")]
    settings = small(*sources, plan_window=20)
    stream = PlannedStream(settings, tokenizer)
    # Windows in which nothing can be used make a pack of padding, which names what they held.
    rejected = [len(stream.plan.pack(number).rejected) for number in range(stream.plan.first_of_epoch(1))]
    samples = [len(stream.plan.pack(number).samples) for number in range(stream.plan.first_of_epoch(1))]
    assert sum(rejected) == 300 and sum(samples) == 1 and samples.count(0) >= 15
    batch = next(stream)
    assert len(batch.rejected) == rejected[0] and "a pack holds 512" in batch.rejected[0][1]
    with pytest.raises(UserError, match="no sample of .*none.* can be used: sample of .* tokens"):
        PlannedStream(small(tmp_path / "none" / "built"), tokenizer)


def test_a_data_set_that_is_built_again_while_it_is_read_is_named(world, tmp_path):
    tokenizer, _, _ = world
    path = make_dataset(tmp_path / "c", 10, "c")
    plan = Plan(small(path), tokenizer, 0)
    (path / ".nv-meta" / "index.uuid").write_text("another")
    with pytest.raises(UserError, match="is another data set by now"):
        plan.window(0)


def test_names_are_taken_and_joined():
    names = Names.of(["a", "", "grün", "cc", "\udcff"])
    assert list(names.take(np.array([2, 0, 1, 2, 4]))) == ["grün", "a", "", "grün", "\udcff"]
    assert list(Names.joined([names.take(np.array([3])), names.take(np.zeros(0, np.int64)), names])) == ["cc", *names]
    assert len(Names.joined([])) == 0
    many = Names.of(map(str, range(70_000)))
    assert many.take(np.arange(69_999, -1, -1))[0] == "69999" and len(many.take(np.arange(70_000))) == 70_000


def test_a_window_is_the_same_from_a_file(world, tmp_path):
    tokenizer, a, b = world
    window = Plan(small(a, b), tokenizer, 0).window(1)
    window.save(tmp_path)
    again = Window.load(tmp_path)
    assert is_mapped(again.members) and len(again) == len(window)
    assert list(again.ids) == list(window.ids) and [*again.reasons] == [*window.reasons]
    assert [again.members_of(n) for n in range(len(again))] == [window.members_of(n) for n in range(len(window))]
    tokens, tiles = epoch_lengths(Plan(small(a, b), tokenizer, 0))
    assert len(tokens) == len(tiles) == 64


def test_arrays_are_mapped_as_numpy_would(tmp_path):
    file = tmp_path / "array.npy"
    for array in (np.arange(6, dtype=np.int32), np.ones((2, 3)), np.asfortranarray(np.eye(3)), np.zeros((0, 2))):
        np.save(file, array)
        found = load_array(file)
        assert is_mapped(found) and found.dtype == array.dtype and not found.flags.writeable
        assert found.shape == array.shape and (found == np.load(file)).all()
    np.save(file, np.arange(1000))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"array.npy: 8120 bytes are not an array \(1000,\) of int64"):
        load_array(file)
    np.save(file, np.array(["a", None], dtype=object))
    with pytest.raises(ValueError, match="of object"):
        load_array(file)
