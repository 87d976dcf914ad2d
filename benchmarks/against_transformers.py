"""The same samples through transformers' modules, padded and packed, and through ours: useful tokens a second, memory.

    python benchmarks/against_transformers.py FOLDER [--rounds 3] [--steps 4] [--cores 1 2]

The embedded model and data set (made in FOLDER, kept there). A step is the same four packs for everybody, its samples
in padded batches or packed, the same weights, the square-root average, clipping and AdamW, all in float32; the losses
are held against each other, so that all did the same work. Reading and cutting into tiles is left out: packs are made
before. Two cores are two threads of one process for transformers, as its Trainer has them, and two processes of one
thread for ours (dp=2), as ``megatron-eagle train --processes 2``. Every run has processes of its own; they take turns,
and each figure is the median over its steps of all rounds.
``ours is`` compares by the clock and by the processor's: where other work runs on the machine, believe the second.
Memory is what the process holds at its peak, less what it held with model and packs before the first step. At the end
the profile of one of our steps: which operations its time goes into.

Ways: ``padded N`` is N samples a forward pass, filled up to the longest with a mask, as trainers on transformers batch
them by default; ``by length`` sorts the step's samples first (transformers' group_by_length). ``packed`` is one row a
pack with positions that begin anew (transformers' DataCollatorWithFlattening), whose mask over segments transformers
makes by itself. Attention is PyTorch's ``sdpa`` in all of them.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKS = 4  # a step
STAGE = "stage1.5"
SAMPLES = 600
SEED = 7
WAYS = ("padded 1", "padded 4", "padded 16", "padded 16 by length", "packed", "ours")
# Of the operations that torch's profiler names, what they are for.
KINDS = {
    "products": ("mm", "matmul", "linear", "einsum"),
    "attention": ("attention", "softmax"),
    "convolutions": ("conv",),
    "optimizer": ("adam", "_foreach"),
    "norms, activations": ("norm", "gelu", "silu", "rsqrt"),
}


def recipe_of(folder: Path) -> Any:
    """The embedded recipe on one process, a step being PACKS packs."""
    from dataclasses import replace

    from megatron_eagle.config.data import BlendSource
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.config.shipped import shipped_recipes

    recipe = load_recipe(shipped_recipes()["tiny"])
    (stage,) = (one for one in recipe.stages if one.name == STAGE)
    stage = replace(stage, batch=PACKS, blend=(BlendSource(str(folder / "data")),))
    tokenizer = replace(recipe.tokenizer, path=str(folder / "tokenizer.model"))
    return replace(recipe, layout=Layout(), stages=(stage,), tokenizer=tokenizer)


def prepare(folder: Path, steps: int) -> None:
    """Data set, tokenizer and ``packs.pt``: the packs of ``steps`` steps."""
    import torch

    from megatron_eagle.config.presets import PRESETS
    from megatron_eagle.data.build.dataset import build_dataset
    from megatron_eagle.data.sample.tokenizer import train_sentencepiece
    from megatron_eagle.data.stream.streams import first_steps
    from megatron_eagle.demo.dataset import generate

    if not (folder / "data").exists():
        records = generate(folder / "raw", split="train", samples=SAMPLES, seed=SEED)
        build_dataset(records, folder / "data")
        turns = [
            turn
            for line in records.read_text(encoding="utf-8").splitlines()
            for turn in json.loads(line)["conversations"]
        ]
        texts = ["user\n", "assistant\n", *(turn["value"].replace("<image>", "") for turn in turns)]
        train_sentencepiece(texts, folder / "tokenizer.model", PRESETS["tiny"].language.vocab_size)
    recipe = recipe_of(folder)
    packs = first_steps(recipe, recipe.stages[0], steps, PACKS)
    torch.save([[vars(pack) for pack in step] for step in packs], folder / "packs.pt")


def load_packs(folder: Path) -> list[list[Any]]:
    """What ``prepare`` has written."""
    import torch

    from megatron_eagle.data.sample.packed_batch import PackedBatch

    return [[PackedBatch(**pack) for pack in step] for step in torch.load(folder / "packs.pt", weights_only=True)]


# --- transformers


def padded(model: Any, packs: list[Any], many: int, by_length: bool) -> Iterator[Any]:
    """The summed loss of ``many`` samples after the other, ready for backward."""
    import torch

    samples = [one for pack in packs for one in segments(pack)]
    if by_length:
        samples.sort(key=lambda one: len(one[0]))
    for low in range(0, len(samples), many):
        part = samples[low : low + many]
        longest = max(len(tokens) for tokens, *_ in part)
        tokens, labels = torch.zeros(2, len(part), longest, dtype=torch.int64)
        weights, mask = torch.zeros(len(part), longest), torch.zeros(len(part), longest, dtype=torch.int64)
        slots = []
        for row, (own, shifted, of_loss, _, starts) in enumerate(part):
            size = len(own)
            tokens[row, :size], labels[row, :size], weights[row, :size], mask[row, :size] = own, shifted, of_loss, 1
            slots.append(starts + row * longest)
        yield loss_of(model, tokens, labels, weights, torch.cat([one[3] for one in part]), torch.cat(slots), mask=mask)


def packed(model: Any, packs: list[Any]) -> Iterator[Any]:
    """The summed loss of each pack, ready for backward."""
    for pack in packs:
        yield loss_of(
            model, pack.tokens[None], pack.labels[None], pack.loss_weights[None], pack.tiles, pack.tile_slots,
            positions=pack.position_ids[None],
        )  # fmt: skip


def segments(pack: Any) -> Iterator[tuple[Any, ...]]:
    """(tokens, labels, loss weights, tiles, where these begin) of each sample of a pack; padding is none."""
    for start, end in zip(pack.borders[:-1], pack.borders[1:], strict=True):
        if pack.loss_weights[start:end].any():
            inside = (pack.tile_slots >= start) & (pack.tile_slots < end)
            own = (one[start:end] for one in (pack.tokens, pack.labels, pack.loss_weights))
            yield *own, pack.tiles[inside], pack.tile_slots[inside] - start


def loss_of(
    model: Any, tokens: Any, labels: Any, weights: Any, tiles: Any, slots: Any, mask: Any = None, positions: Any = None
) -> Any:
    """sum of weight x cross-entropy. tokens, labels, weights [b, n]; slots: of tiles, in the b x n positions."""
    import torch
    import torch.nn.functional as F

    embeddings = model.language.get_input_embeddings()(tokens)
    if len(tiles):
        features = model.visual(tiles)
        places = (slots[:, None] + torch.arange(features.shape[1])).flatten()
        flat = embeddings.flatten(0, 1).index_copy(0, places, features.flatten(0, 1))
        embeddings = flat.view_as(embeddings)
    logits = model.language(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp_min(0), reduction="none")
    return (each * weights.flatten()).sum()


def with_transformers(way: str, folder: Path, steps: int) -> dict[str, Any]:
    """Trains ``steps`` steps and one that warms up; seconds of each, losses, memory."""
    import torch

    from megatron_eagle.verification.reference import ReferenceEagle

    recipe = recipe_of(folder)
    model = ReferenceEagle(recipe.model.eagle(), SEED, dtype=torch.float32, attention="sdpa")
    stage, settings = recipe.stages[0], recipe.optimizer
    adam = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": settings.weight_decay if p.ndim > 1 else 0.0}
            for p in model.parameters()
        ],
        lr=stage.learning_rate / 100,  # losses after many steps drift apart by rounding, the less the smaller the steps
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )  # fmt: skip
    every = load_packs(folder)

    def step(packs: list[Any]) -> float:
        whole = float(sum(pack.loss_weights.sum() for pack in packs))
        if way == "packed":
            losses = packed(model, packs)
        else:
            losses = padded(model, packs, int(way.split()[1]), way.endswith("by length"))
        said = 0.0
        for loss in losses:
            (loss / whole).backward()
            said += float(loss.detach()) / whole
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        adam.step()
        adam.zero_grad()
        return said

    return timed(step, every, steps)


# --- ours


def with_ours(folder: str, steps: int, profiled: bool) -> dict[str, Any]:
    """As ``with_transformers``, in each process of a world, which share the packs; or the ``profile`` of one step."""
    from dataclasses import replace
    from datetime import timedelta
    from functools import partial

    import torch
    import torch.distributed as dist

    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine
    from megatron_eagle.training.step import Step
    from megatron_eagle.verification.check import load_reference
    from megatron_eagle.verification.reference import ReferenceEagle

    recipe = recipe_of(Path(folder))
    stage = recipe.stages[0]
    stage = replace(
        stage, learning_rate=stage.learning_rate / 100, part_learning_rates={}, decay="constant", warmup_fraction=0.0
    )
    platform = install()
    groups = initialise(recipe.layout, platform, timeout=timedelta(minutes=5))
    engine = build_engine(recipe, stage, platform, groups)
    reference = ReferenceEagle(recipe.model.eagle(), SEED, dtype=torch.float32)
    load_reference(engine, reference.state_dict(), reference.sources())
    del reference
    training = Step(engine, groups, stage, platform.device)

    def step(packs: list[Any]) -> float:
        return training.collect(training.run(partial(list, packs))).loss

    every = [packs[dist.get_rank() :: dist.get_world_size()] for packs in load_packs(Path(folder))]
    if profiled:
        return {"profile": profile_of(lambda: step(every[0]))}
    return timed(step, every, steps)


def profile_of(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of the processor by kind of operation, of the second call."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds = dict.fromkeys([*KINDS, "all else"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "all else")
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds


# --- all


def timed(step: Callable[[list[Any]], float], every: list[list[Any]], steps: int) -> dict[str, Any]:
    """Seconds and processor seconds of ``steps`` calls after one that warms up, losses, and MB on top at the peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses, seconds, processor = [], [], []
    for number in range(1 + steps):
        started, busy = time.perf_counter(), time.process_time()
        losses.append(step(every[number]))
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - busy)
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds[1:], "processor": processor[1:], "losses": losses, "megabytes": megabytes}


def child(way: str, folder: Path, steps: int, cores: int) -> None:
    """One run; prints JSON."""
    import torch

    if way in ("ours", "profile"):
        from megatron_eagle.parallel.process_pool import World

        world = World(cores)
        try:
            all_ranks = world.run(with_ours, str(folder), steps, way == "profile", timeout=1200)
        finally:
            world.stop()
        found = all_ranks[0]
        if way == "ours":
            found["processor"] = [sum(own) for own in zip(*(each["processor"] for each in all_ranks), strict=True)]
            found["megabytes"] = sum(each["megabytes"] for each in all_ranks)
    else:
        torch.set_num_threads(cores)
        found = with_transformers(way, folder, steps)
    print(json.dumps(found))


def run(way: str, folder: Path, steps: int, cores: int) -> dict[str, Any]:
    """One run in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
    words = [sys.executable, __file__, str(folder), "--steps", str(steps), "--cores", str(cores), "--way", way]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rate(runs: list[dict[str, Any]], clock: str, useful: float) -> float:
    """Useful tokens a second of ``clock``, the median over all steps."""
    return useful / statistics.median(one for each in runs for one in each[clock])


def main() -> None:
    """All ways in turn; prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--way", choices=[*WAYS, "profile"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.way:
        child(options.way, folder, options.steps, options.cores[0])
        return
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, 1 + options.steps)
    every = load_packs(folder)[1:]
    useful = sum(pack.useful_tokens for packs in every for pack in packs) / len(every)
    samples = sum(len(pack.sample_ids) for packs in every for pack in packs) / len(every)
    tiles = sum(len(pack.tiles) for packs in every for pack in packs) / len(every)
    print(f"a step: {PACKS} packs, {samples:.0f} samples, {useful:,.0f} useful tokens, {tiles:.0f} tiles\n")
    for cores in options.cores:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                found[way].append(run(way, folder, options.steps, cores))
        first = found["ours"][0]["losses"]
        print(f"| cores: {cores} | useful tokens/s | a processor s | ours is | MB | losses differ by |")
        print("|---|---|---|---|---|---|")
        rates = {way: (rate(runs, "seconds", useful), rate(runs, "processor", useful)) for way, runs in found.items()}
        for way, runs in found.items():
            apart = max(abs(a / b - 1) for a, b in zip(runs[0]["losses"], first, strict=True))
            megabytes = statistics.median(one["megabytes"] for one in runs)
            times = " and ".join(f"{ours / own:.2f}" for ours, own in zip(rates["ours"], rates[way], strict=True))
            both = " | ".join(f"{own:,.0f}" for own in rates[way])
            print(f"| {way} | {both} | {times} x | {megabytes:,.0f} | {apart:.1e} |")
        print(flush=True)
    seconds = run("profile", folder, options.steps, 1)["profile"]
    print("Ours, one core: " + ", ".join(f"{kind} {own / sum(seconds.values()):.0%}" for kind, own in seconds.items()))


if __name__ == "__main__":
    main()
