"""A step waits for the GPU once, when it fetches its numbers; everything else only queues work."""

from datetime import timedelta

import pytest
import torch
from fake_device import DEVICE, HOST, fake_device
from spread_cases import ALL, make_recipe, make_step, with_spread

from megatron_eagle.config.layout import Layout

FETCH = ("cpu", "megatron_eagle/training/step_stats.py:collect_stats")
# What Megatron reads itself, by name: the norm it clips by, once for each optimizer of the chain.
NORM = ("_local_scalar_dense", "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32")
# Not on CUDA: gloo copies a reduced part out of a buffer of its own when Megatron's backward pass waits for it, and
# without Transformer Engine and Apex Megatron reads the norm of every gradient by itself.
WITHOUT_A_GPU = {
    ("copy_", "megatron/core/tensor_parallel/layers.py:backward"),
    ("tensor of tensors", "megatron/core/utils.py:local_multi_tensor_l2_norm"),
}


def waits_of_a_step(layout: Layout, options: dict[str, str]) -> dict[tuple[str, str], int]:
    """Runs in every process of a world: the second step of a training, packs with and without tiles."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine
    from megatron_eagle.training.step import Step

    recipe, platform = make_recipe(layout, ALL, {}, options), install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=60))
    engine = build_engine(recipe, recipe.stages[0], platform, groups)
    own = make_step(0)[groups.dp_rank :: groups.dp_size]
    Step(engine, groups, recipe.stages[0], platform.device).run(lambda: own)
    step = Step(engine, groups, recipe.stages[0], DEVICE)
    held = [tensor for module, _ in engine.weight_owners() for tensor in (*module.parameters(), *module.buffers())]
    for owner in engine.gradient_owners():
        held += [part for buffer in owner.buffers for part in (buffer.grad_data, buffer.param_data) if part is not None]
    for part in engine.optimizer.chained_optimizers:
        held += [p.data for group in part.optimizer.param_groups for p in group["params"]]
        held += [value for state in part.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    with fake_device(*held) as waits:
        step.collect(step.run(lambda: own))
    return {wait: count for wait, count in waits.items() if wait not in WITHOUT_A_GPU}


@pytest.mark.parametrize(
    ("size", "layout", "options"),
    [
        (1, Layout(), {}),
        (2, Layout(pp=2), {}),
        (2, Layout(tp=2, sequence_parallel=True), {"recompute": "full"}),
        (2, with_spread(Layout()), {}),
        (2, with_spread(Layout(pp=2), encoder_chunk=2), {}),
        (2, Layout(cp=2), {}),
        (4, with_spread(Layout(cp=4, ulysses=2)), {}),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value),
)
def test_a_step_waits_for_the_device_once(worlds, size, layout, options):
    norms = 2 if layout.encoder == "spread" else 1
    for waits in worlds(size).run(waits_of_a_step, layout, options):
        assert waits == {FETCH: 1, NORM: norms}


@pytest.fixture
def on_device():
    return torch.arange(4.0)


WAITS = {
    "a number": lambda x: float(x[1]),
    "a truth": lambda x: bool(x.sum() > 1),
    "a list": lambda x: x.tolist(),
    "a copy on the host": lambda x: x.cpu(),
    "a copy by name": lambda x: x.to("cpu"),
    "a mask that picks": lambda x: x[x > 1],
    "places of a mask": lambda x: (x > 1).nonzero(),
    "masked_select": lambda x: x.masked_select(x > 1),
    "numbers of the host, made there": lambda x: torch.tensor([1.0], device=x.device),
    "a copy that blocks": lambda x: torch.zeros(3).to(x.device),
    "a copy like another": lambda x: torch.zeros(3).to(x),
    "an index from the host": lambda x: x[torch.tensor([1, 2])],
    "written to the host": lambda x: torch.zeros(4).copy_(x),
    "a tensor of tensors": lambda x: torch.tensor([x[0], x[1]]),
    "behind a view and a sum": lambda x: (x.view(2, 2).sum(0) + 1)[0].item(),
}
QUEUED = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "an index of the device": lambda x: x[torch.arange(2, device=x.device)],
    "a mask that fills": lambda x: x.clone().masked_fill_(x > 1, 0.0),
    "a copy that does not block": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "another dtype": lambda x: x.to(torch.float64).to(x.device),
    "the host's own": lambda x: (torch.zeros(3).tolist(), float(torch.ones(1)), torch.ones(2, device=HOST).nonzero()),
    "what came from a copy": lambda x: torch.zeros(3).to(x.device, non_blocking=True) + 1,
}


@pytest.mark.parametrize("name", WAITS)
def test_the_fake_device_sees_a_wait(on_device, name):
    with fake_device(on_device) as waits:
        WAITS[name](on_device)
    assert sum(waits.values()) == 1, waits


@pytest.mark.parametrize("name", QUEUED)
def test_the_fake_device_sees_no_wait_where_there_is_none(on_device, name):
    with fake_device(on_device) as waits:
        QUEUED[name](on_device)
    assert not waits


def test_the_fake_device_knows_what_was_computed_on_it(on_device):
    with fake_device(on_device) as waits:
        moved = torch.zeros(3).to(DEVICE, non_blocking=True)
        assert (moved + 1).device == DEVICE and torch.zeros(3).device == HOST and on_device.cpu().device == HOST
        assert sum(waits.values()) == 1
        float((moved + 1)[0])
    (where,) = [where for operation, where in waits if operation == "_local_scalar_dense"]
    assert where.endswith("test_synchronisations.py:test_the_fake_device_knows_what_was_computed_on_it")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_warns_of_no_other_wait():
    """The same as PyTorch sees it on CUDA, in one process: warnings of ``set_sync_debug_mode``, counted by where."""
    import warnings

    import torch.distributed as dist

    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import destroy, initialise
    from megatron_eagle.training.engine import build_engine
    from megatron_eagle.training.step import Step

    recipe, platform = make_recipe(Layout(), ALL, {}, {"kernels": "torch"}), install()
    torch.cuda.set_device(platform.device)
    dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, device_id=platform.device)
    groups = initialise(Layout(), platform, timeout=timedelta(seconds=60))
    try:
        step = Step(build_engine(recipe, recipe.stages[0], platform, groups), groups, recipe.stages[0], platform.device)
        step.collect(step.run(lambda: make_step(0)))  # the first one makes Adam's state and pins memory
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.collect(step.run(lambda: make_step(0)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        destroy()
    waits = [w.filename for w in caught if "synchronizing CUDA operation" in str(w.message)]
    ours = [file.rpartition("/")[2] for file in waits if "/megatron/core/" not in file]
    assert ours == ["step_stats.py"] and any(file.endswith("clip_grads.py") for file in waits)
