"""The order of passes against a recording of what Megatron's schedules run, and what the simulator makes of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import packs_of, recipe_of

from megatron_eagle.planning.schedule import Pass, passes
from megatron_eagle.planning.simulator import simulate

SMALL = {"language": {"num_hidden_layers": 8}, "batch": 8, "trainable": ["language"], "pack_length": 64}


def record(recipe):
    """Train one step and note each pass of each chunk of this process; runs in every process of a world."""
    from datetime import timedelta

    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine, run_schedule

    platform, stage = install(), recipe.stages[0]
    groups = initialise(recipe.layout, platform, timeout=timedelta(seconds=60))
    engine = build_engine(recipe, stage, platform, groups)
    events, counts = [], {}

    def note(kind, chunk):
        counts[kind, chunk] = counts.get((kind, chunk), -1) + 1
        events.append((kind, counts[kind, chunk], chunk))

    for chunk, model in enumerate(engine.models):
        model.register_forward_hook(lambda *_, chunk=chunk: note("forward", chunk))
        model.register_full_backward_pre_hook(lambda *_, chunk=chunk: note("backward", chunk))
    batches = packs_of(recipe, [[60]] * stage.batch, [0] * stage.batch)
    run_schedule(engine.chunks, batches, forward_only=False)
    return groups.pp_rank, events


QUICK = [(2, 2, None, 5), (2, 2, 2, 8), (4, 4, None, 8), (4, 2, 2, 4), (4, 4, 2, 8)]
# More, fewer and as many packs as stages; interleaved schedules want a multiple of pp.
MORE = [(4, 4, None, count) for count in (1, 2, 3, 4, 5, 11)] + [
    (4, 4, 2, 4),
    (4, 4, 2, 12),
    (4, 2, 4, 6),
    (2, 2, 4, 2),
]


@pytest.mark.parametrize(
    ("size", "pp", "vpp", "batch"),
    [*QUICK, *MORE[1:3], *(pytest.param(*case, marks=pytest.mark.long) for case in (*MORE[:1], *MORE[3:]))],
)
def test_the_order_that_megatron_runs(worlds, size, pp, vpp, batch):
    recipe = recipe_of({"pp": pp, "vpp": vpp}, **{**SMALL, "batch": batch})
    for pp_rank, events in worlds(size).run(record, recipe):
        assert events == [(p.kind, p.microbatch, p.chunk) for p in passes(pp, vpp, pp_rank, batch)]


def steady(stage, event):
    return 1.0 if event.kind == "forward" else 2.0


@given(st.integers(1, 6), st.sampled_from([None, 2, 3]), st.integers(1, 5))
def test_every_pass_once_and_simulation_keeps_the_order(pp, vpp, groups):
    count = groups * pp
    timeline = simulate(pp, vpp if pp > 1 else None, count, steady)
    for rank in range(pp):
        order = passes(pp, vpp if pp > 1 else None, rank, count)
        assert len(set(order)) == len(order) == 2 * count * (vpp or 1 if pp > 1 else 1)
        assert sorted(timeline.ends[rank], key=timeline.ends[rank].__getitem__) == order


def test_bubble_of_equal_stages():
    """1F1B waits for pp - 1 passes of both kinds (Narayanan et al., arXiv 2104.04473): (pp - 1) / (m + pp - 1)."""
    timeline = simulate(4, None, 12, steady)
    assert timeline.seconds == 3.0 * (12 + 3)
    assert timeline.bubble == pytest.approx(3 / 15)
    interleaved = simulate(4, 2, 12, lambda stage, event: steady(stage, event) / 2)
    assert interleaved.seconds == pytest.approx(3.0 * (12 + 3 / 2))


def test_a_pipeline_is_as_slow_as_its_slowest_stage():
    """Two encoders on the first of four stages of Eagle2-9B: 54 tiles cost 416 TFLOP, a stage's layers 174."""

    def on_first(stage, event):
        return 174.0 + 416.0 * (stage == 0)

    stuck, spread = simulate(4, None, 64, on_first), simulate(4, None, 64, lambda stage, event: 174.0 + 104.0)
    assert stuck.balance == pytest.approx(0.47, abs=0.005)
    assert spread.balance == 1.0
    assert stuck.seconds / spread.seconds > 2.0


def test_the_benchmark_of_encoder_placement_says_the_same_as_its_page():
    """The command that docs/encoder_placement.md names: 47 % at pp=4 with two encoders, twice as fast when spread."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "benchmarks/encoder_placement.py"]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| SigLIP")]
    page = (root / "docs" / "encoder_placement.md").read_text()
    assert len(rows) == 20 and all(row in page for row in rows)
    assert "| SigLIP + ConvNeXt | 4 | stage 0 | 7-7-7-7 | 47% | 47.3 | 47% | 1.00x |" in rows
    assert "| SigLIP + ConvNeXt | 4 | spread | 7-7-7-7 | 100% | 23.7 | 94% | 2.00x |" in rows


def test_times_may_differ_by_pack():
    long_one = simulate(2, None, 3, lambda stage, event: 5.0 if event.microbatch == 1 else 1.0)
    assert long_one.ends[0][Pass("forward", 1, 0)] == 6.0
    assert long_one.ends[1][Pass("backward", 2, 0)] == long_one.ends[1][Pass("forward", 2, 0)] + 1.0
