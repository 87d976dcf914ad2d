"""The dry run: its lists against what real processes issue, and whether it notices a process that goes astray."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import recipe_of
from spread_cases import Recorder

from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.dry_run.deadlock_check import CollectiveMismatch, Program, as_seen_by, meet
from megatron_eagle.dry_run.symbolic_rank import Call
from megatron_eagle.dry_run.walk import coordinates, dry_run, match_exchanges, walk_replicas
from megatron_eagle.training.spread_encoder import SpreadEncoder

install()  # what the trainer's entry points do first

SPREAD = {"pp": 2, "layers_per_stage": [1, 2], "encoder": "spread"}
UNEVEN = {"pp": 2, "layers_per_stage": [1, 2]}
LAYOUTS = [
    (4, {**UNEVEN}, {}),
    (4, {"tp": 2, "sequence_parallel": True, "encoder": "spread", "encoder_chunk": 4}, {"recompute": "full"}),
    (8, {**SPREAD, "cp": 2}, {}),
    (8, {**UNEVEN, "tp": 2, "sequence_parallel": True}, {"overlap": True}),
    (8, {"pp": 2, "vpp": 2, "tp": 2, "sequence_parallel": True}, {"language": {"num_hidden_layers": 4}}),
    (8, {"cp": 4, "ulysses": 2}, {"precision": "bf16"}),
    (8, {"cp": 4, "least_cp": 1}, {"batch": 16}),
    (4, {**SPREAD}, {"trainable": ["connector"]}),
]


def run(size, layout, changes):
    recipe = recipe_of(layout, **{"batch": 16, **changes})
    return dry_run(recipe, recipe.stages[0], size)


@pytest.mark.slow
def test_every_process_meets_the_others_and_holds_what_the_plan_says():
    size, layout, changes = LAYOUTS[1]
    outcome = run(size, layout, changes)
    assert outcome.equal and outcome.met > 50
    assert {process.with_tiles for process in outcome.walked} == {True, False}


@pytest.mark.long
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: str(case[1]))
def test_every_layout(case):
    assert run(*case).equal


def real_calls(recipe, shapes):
    """Every collective of a real step, built and trained as the dry run does; runs in every process of a world."""
    from datetime import timedelta

    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.model import tokens_per_tile
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.planning.samples import synthetic
    from megatron_eagle.training.engine import build_engine
    from megatron_eagle.training.step import Step

    platform, stage, config = install(), recipe.stages[0], recipe.model.eagle()
    groups = initialise(recipe.layout, platform, timeout=timedelta(seconds=60))
    batches = [synthetic(shape, config.tile_size, tokens_per_tile(config)) for shape in shapes[groups.dp_rank]]
    with Recorder() as recorder:
        engine = build_engine(recipe, stage, platform, groups)
        step = Step(engine, groups, stage, platform.device)
        step.collect(step.run(lambda: batches))
    return recorder.calls


@pytest.mark.parametrize(
    "layout", [{}, SPREAD, {"cp": 2, "least_cp": 1}], ids=["dp=2", "pp=2, spread", "cp=2, least_cp=1"]
)
def test_the_lists_are_those_of_real_processes(worlds, layout):
    recipe = recipe_of(layout, batch=4)
    walked, shapes = walk_replicas(recipe, recipe.stages[0], coordinates(recipe.layout, 2), packs=2)
    real = worlds(2).run(real_calls, recipe, shapes)
    for process in walked.values():
        listed = [(call.operation, call.members) for call in process.calls if call.operation not in ("send", "recv")]
        issued = [(name.split(".")[0], members) for name, members in real[process.rank] if len(members) > 1]
        assert listed == issued


@pytest.mark.slow
def test_a_process_that_leaves_out_a_sum_when_it_has_no_tiles_is_named(monkeypatch):
    whole = SpreadEncoder.backward

    def careless(self):
        if self._step.shares.total:
            whole(self)

    monkeypatch.setattr(SpreadEncoder, "backward", careless)
    with pytest.raises(CollectiveMismatch, match=r"rank [0-3] .*reduce_scatter.* of float32"):
        run(4, SPREAD, {})


@pytest.fixture(scope="module")
def programs():
    """The exchanges of eight processes, all walked or copied from one that was."""
    recipe = recipe_of({**SPREAD, "cp": 2}, batch=16)
    places = coordinates(recipe.layout, 8)
    walked, _ = walk_replicas(recipe, recipe.stages[0], places, packs=2)
    return [Program(process.calls) for process in sorted(walked.values(), key=lambda process: process.rank)]


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_exchange_left_out_or_changed_is_noticed(programs, data):
    rank = data.draw(st.integers(0, 7))
    number = data.draw(st.integers(0, len(programs[rank].calls) - 1))
    calls = list(programs[rank].calls)
    if data.draw(st.booleans()) or calls[number].operation == "alltoall_base_":
        del calls[number]
    else:
        calls[number] = replace(calls[number], sizes=(("float32", 123_457),))
    broken = [Program(calls) if other == rank else program for other, program in enumerate(programs)]
    with pytest.raises(CollectiveMismatch, match="rank"):
        meet(broken, messages_wait=True)


def test_processes_that_come_in_another_order_wait_for_ever():
    first, second = Call("allreduce_", (0, 1), (("float32", 4),)), Call("allreduce_", (0, 1, 2), (("float32", 4),))
    assert meet([Program([first, second]), Program([first, second]), Program([second])], messages_wait=True) == 2
    with pytest.raises(
        CollectiveMismatch, match=r"rank 0 waits for ever in allreduce of float32 x 4 among 2 .* rank 1 is in"
    ):
        meet([Program([first, second]), Program([second, first]), Program([second])], messages_wait=True)


def test_lists_are_carried_over_along_the_axes_that_differ():
    places = coordinates(Layout(tp=2, pp=2, sequence_parallel=True), 8)
    calls = [Call("allreduce_", members, ()) for members in ((0, 1), (0, 2), (0, 4), (0, 1, 4, 5), tuple(range(8)))]
    moved = [call.members for call in as_seen_by(calls, 0, 2, places)]
    assert moved == [(2, 3), (0, 2), (2, 6), (2, 3, 6, 7), tuple(range(8))]


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [(2, None, 5), (4, None, 8), (2, 2, 4), (4, 3, 8)])
def test_every_send_meets_its_receive(pp, vpp, microbatches):
    sends = (pp * (vpp or 1) - 1) * microbatches
    assert match_exchanges(pp, vpp, microbatches) == 2 * sends
