"""Packing: nothing lost, nothing over-full, and the loss weights are the formula's."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.config.packing_rules import packing_rules
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.data.order import rules
from megatron_eagle.data.order.packing import pack_by_settings, pack_samples
from megatron_eagle.data.reports.pack_report import Bounds, compare_packings
from megatron_eagle.data.sample.assemble import Segment, assemble_pack
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL

PAD = 7


@st.composite
def rooms(draw):
    lengths = draw(st.lists(st.integers(1, 130), max_size=60))
    tiles = draw(st.lists(st.integers(0, 13), min_size=len(lengths), max_size=len(lengths)))
    return lengths, tiles, draw(st.none() | st.integers(1, 30)), draw(st.integers(0, 5))


@given(rooms())
@settings(max_examples=300, deadline=None)
def test_every_sample_is_in_one_pack_that_holds_it(room):
    lengths, tiles, max_tiles, spare = room
    limit = math.inf if max_tiles is None else max_tiles
    for rule in packing_rules():
        plan = pack_samples(rule, lengths, 100, tiles=tiles, max_tiles=max_tiles, spare=spare)
        assert sorted([*sum(plan.packs, []), *plan.too_long]) == list(range(len(lengths)))
        assert plan.too_long == [i for i, n in enumerate(lengths) if n > 100 or tiles[i] > limit]
        for pack in plan.packs:
            assert pack and sum(lengths[i] for i in pack) <= 100
            assert sum(tiles[i] for i in pack) <= limit


@given(rooms())
@settings(max_examples=200, deadline=None)
def test_balanced_is_the_naive_algorithm(room):
    """The published steps with a linear search for the emptiest pack."""
    lengths, _, _, spare = room
    fits = sorted((i for i, n in enumerate(lengths) if n <= 100), key=lambda i: -lengths[i])
    bins = [[] for _ in range(math.ceil(sum(lengths[i] for i in fits) / 100) + spare)]

    def fill(pack):
        return sum(lengths[i] for i in pack)

    for i in fits:
        emptiest = min(bins, key=fill)
        if fill(emptiest) + lengths[i] > 100:
            bins.append(emptiest := [])
        emptiest.append(i)
    expected = sorted(sorted(lengths[i] for i in pack) for pack in bins if pack)
    packs = pack_samples("balanced", lengths, 100, spare=spare).packs
    assert sorted(sorted(lengths[i] for i in pack) for pack in packs) == expected


def fewest_packs(lengths, length):
    """Exhaustive: each sample into every pack that could hold it."""
    best = len(lengths)

    def place(i, fills):
        nonlocal best
        if len(fills) >= best:
            return
        if i == len(lengths):
            best = len(fills)
            return
        for b in range(len(fills)):
            if fills[b] + lengths[i] <= length:
                place(i + 1, fills[:b] + [fills[b] + lengths[i]] + fills[b + 1 :])
        place(i + 1, [*fills, lengths[i]])

    place(0, [])
    return best


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_best_fit_is_close_to_the_fewest_packs(lengths):
    """Best-fit decreasing never needs more than 11/9 of the fewest packs, plus 6/9 (Dosa 2007)."""
    fewest = fewest_packs(lengths, 20)
    assert fewest <= len(pack_samples("best_fit", lengths, 20).packs) <= 11 / 9 * fewest + 6 / 9


def test_balanced_mixes_long_and_short_where_best_fit_separates_them():
    lengths = [60] * 10 + [5] * 80
    balanced, tight = (pack_samples(rule, lengths, 120, spare=1).packs for rule in ("balanced", "best_fit"))

    def spread(packs):
        shares = [sum(lengths[i] == 60 for i in pack) / len(pack) for pack in packs]
        return max(shares) - min(shares)

    assert spread(balanced) < 0.2 and spread(tight) == 1


def test_sizes_must_make_sense():
    with pytest.raises(ValueError, match="max_tiles=3 needs the tiles"):
        pack_samples("best_fit", [1], 10, max_tiles=3)
    with pytest.raises(ValueError, match="2 lengths but 1 tile counts"):
        pack_samples("balanced", [1, 2], 10, spare=0, tiles=[1])
    with pytest.raises(ValueError, match="0 tokens"):
        pack_samples("best_fit", [3, 0], 10)
    assert pack_samples("balanced", [], 10, spare=3).packs == []


def test_a_rule_is_one_file(tmp_path, monkeypatch):
    """A file beside the others is known by name to recipes and reports, at once; a name without a file is refused."""
    (tmp_path / "one_each.py").write_text(
        "def pack(samples, spare):\n    return [[i] for i in samples.longest_first]\n"
    )
    with pytest.raises(
        ValueError, match="packing rule 'one_each' does not exist; there are balanced, best_fit, greedy"
    ):
        pack_samples("one_each", [3, 5], 10)
    monkeypatch.setattr("megatron_eagle.config.packing_rules._FOLDER", tmp_path)
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    assert pack_samples("one_each", [3, 5], 10).packs == [[1], [0]]
    reading = ReadingSettings(packing="one_each")
    one_each = DataSettings(sources=(BlendSource("x"),), pack_length=10, tokens_per_tile=2, reading=reading)
    assert pack_by_settings(one_each, [3, 5], [0, 0]).packs == [[1], [0]]
    found = compare_packings(np.array([3, 5]), np.array([0, 0]), Bounds(10, None, 0, 100, 0.0))
    assert [(result.name, result.packs) for result in found] == [("one_each", 2)]
    with pytest.raises(ValueError, match="packing rule 'balanced' does not exist; there are one_each"):
        replace(reading, packing="balanced")


@pytest.mark.parametrize(
    ("packs", "message"),
    [
        ([[0], [1]], "sample 2 into 0 packs instead of 1, and so for 1 of 4 samples"),
        ([[0, 1], [2, 0]], "sample 0 into 2 packs instead of 1, and so for 1 of 4"),
        ([[0, 1], [2, 3]], "sample 3 into 1 packs instead of 0"),
        ([[0, 1], [], [2]], "made 1 empty packs of 3"),
        ([[0, 1, 2]], "made a pack of 12 tokens, it can hold 10"),
        ([[0, 2], [1]], "made a pack of 7 tiles, it can hold 6"),
    ],
)
def test_what_a_rule_gets_wrong_is_found(monkeypatch, packs, message):
    monkeypatch.setattr("megatron_eagle.data.order.packing.packing_rule", lambda name: lambda samples, spare: packs)
    with pytest.raises(ValueError, match=f"packing rule 'mine' (put|made).*{message.removeprefix('made ')}"):
        pack_samples("mine", [4, 4, 4, 11], 10, tiles=[3, 3, 4, 0], max_tiles=6)


def test_rules_need_no_torch():
    """Whoever plans or reports packs on a login node has numpy and nothing else."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_eagle.config.packing_rules import packing_rules\n"
        "from megatron_eagle.data.order.rules import packing_rule\n"
        "from megatron_eagle.data.order.sample_sizes import SampleSizes\n"
        "print(*(packing_rule(name)(SampleSizes.of([3, 5, 9], 10), 0) for name in packing_rules()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["[[2],", "[1,", "0]]"] * 3, done.stderr


@st.composite
def segments(draw):
    made = []
    for number in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 12))
        tokens = torch.tensor(draw(st.lists(st.integers(10, 99), min_size=size, max_size=size)))
        learned = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        labels = torch.where(learned, tokens, IGNORE_LABEL)
        slots = torch.tensor(sorted(draw(st.sets(st.integers(0, size - 1), max_size=3))), dtype=torch.int64)
        tiles = torch.randint(0, 256, (len(slots), 3, 2, 2), dtype=torch.uint8)
        made.append(Segment(f"s{number}", tokens, labels, slots, tiles))
    return made


@given(segments(), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_a_pack_holds_what_was_put_in(parts, padding):
    useful = sum(len(part.tokens) for part in parts)
    pack = assemble_pack(parts, useful + padding, PAD)

    assert pack.useful_tokens == useful and pack.length == useful + padding
    assert pack.sample_ids == [part.sample_id for part in parts] and pack.rejected == []
    assert (pack.tokens.dtype, pack.labels.dtype, pack.position_ids.dtype) == (torch.int64,) * 3
    assert (pack.cu_seqlens.dtype, pack.loss_weights.dtype, pack.tiles.dtype) == (
        torch.int32,
        torch.float32,
        torch.uint8,
    )
    borders = pack.cu_seqlens.tolist()
    assert len(borders) == len(parts) + 1 + (padding > 0)
    assert all(a < b for a, b in zip(borders, borders[1:], strict=False))
    tile = 0
    for part, start, end in zip(parts, borders, borders[1:], strict=False):
        assert pack.tokens[start:end].tolist() == part.tokens.tolist()
        assert pack.position_ids[start:end].tolist() == list(range(end - start))
        # The prediction at each position is the next token of the same sample, if that one is learned.
        wanted = [*part.labels.tolist()[1:], IGNORE_LABEL]
        assert pack.labels[start:end].tolist() == wanted
        count = sum(label != IGNORE_LABEL for label in wanted)
        weights = [1 / math.sqrt(count) if label != IGNORE_LABEL else 0 for label in wanted]
        assert pack.loss_weights[start:end].tolist() == pytest.approx(weights)
        for slot, pixels in zip(part.tile_slots.tolist(), part.tiles, strict=True):
            assert pack.tile_slots[tile] == start + slot and torch.equal(pack.tiles[tile], pixels)
            tile += 1
    assert tile == len(pack.tiles) == len(pack.tile_slots)
    tail = slice(useful, None)
    assert pack.tokens[tail].tolist() == [PAD] * padding and pack.labels[tail].tolist() == [IGNORE_LABEL] * padding
    assert pack.loss_weights[tail].sum() == 0 and pack.position_ids[tail].tolist() == list(range(padding))


@given(segments())
@settings(max_examples=100, deadline=None)
def test_weights_are_eagles_square_root_average(parts):
    """sum_i sqrt(n_i) mean_i / sum_i sqrt(n_i), computed sample by sample."""
    pack = assemble_pack(parts, 64, PAD)
    token_loss = torch.rand(64)
    above = below = 0.0
    for start, end in zip(pack.cu_seqlens.tolist(), pack.cu_seqlens.tolist()[1:], strict=False):
        learned = token_loss[start:end][pack.labels[start:end] != IGNORE_LABEL]
        if len(learned):
            above += math.sqrt(len(learned)) * learned.mean().item()
            below += math.sqrt(len(learned))
    assert float(pack.loss_weights.sum()) == pytest.approx(below, rel=1e-5)
    assert (pack.loss_weights * token_loss).sum().item() == pytest.approx(above, rel=1e-5, abs=1e-6)


def test_too_much_is_refused_with_the_numbers():
    part = Segment("a", torch.arange(6), torch.arange(6), torch.empty(0, dtype=torch.int64), torch.empty(0, 3, 2, 2))
    with pytest.raises(ValueError, match=r"2 segments of \[6, 6\] tokens add up to 12, a pack holds 11"):
        assemble_pack([part, part], 11, PAD)
    with pytest.raises(ValueError, match="at least one segment"):
        assemble_pack([], 11, PAD)
