"""A loss or gradient that is no number: where it began is planted here, and must be what the report says."""

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from spread_cases import ALL, make_recipe, make_step, with_spread
from test_train import run_command
from train_cases import metrics

from megatron_eagle.config.layout import Layout

STRANGE_TOKEN = 77
STRANGE_PACK = 2


@dataclass(frozen=True)
class Seen:
    """message: what the user reads. changed: names of weights that the bad step changed."""

    message: str
    changed: list[str]


def bad_step(layout: Layout, plant: str) -> Seen:
    """Runs in every process of a world: a good step, then one with ``plant``."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.parallel.groups import initialise
    from megatron_eagle.training.engine import build_engine
    from megatron_eagle.training.non_finite import describe, explain
    from megatron_eagle.training.step import Step

    recipe, platform = make_recipe(layout, ALL, {}, {}), install()
    groups = initialise(layout, platform, timeout=timedelta(seconds=60))
    engine = build_engine(recipe, recipe.stages[0], platform, groups)
    step = Step(engine, groups, recipe.stages[0], platform.device)
    packs = [replace(pack, sample_ids=[f"pack{number}"]) for number, pack in enumerate(make_step(0))]
    packs = [replace(pack, tokens=pack.tokens.clamp(max=STRANGE_TOKEN - 1)) for pack in packs]
    packs[STRANGE_PACK].tokens[100] = STRANGE_TOKEN
    own = packs[groups.dp_rank :: groups.dp_size]
    step.run(lambda: own)
    PLANTS[plant](engine)
    named = [(name, weight) for owner, _ in engine.weight_owners() for name, weight in owner.named_parameters()]
    before = {name: weight.detach().clone() for name, weight in named}
    result = step.run(lambda: own)
    loss = step.collect(result).loss
    found = explain(engine, step.normalise(result.batches), groups)
    changed = [name for name, weight in named if not torch.equal(weight, before[name]) and not weight.isnan().any()]
    return Seen(describe("step 2", loss, result.grad_norm, found, ["all"], None), changed)


def _modules(engine, name: str):
    owners = (owner for owner, _ in engine.weight_owners())
    return [part for owner in owners for path, part in owner.named_modules() if path.endswith(name)]


def plant_huge_mlp(engine) -> None:
    """The last layer's MLP overflows, whichever pipeline stage has it; both stages number their layers from 0."""
    if any(owner.post_process for owner in engine.models):
        for part in _modules(engine, "language.decoder.layers.0.mlp.linear_fc2"):
            part.weight.data.fill_(3e38)


def plant_strange_token(engine) -> None:
    def spoil(_, arguments, values, output):
        return torch.where((values["input_ids"] == STRANGE_TOKEN).any(), torch.full_like(output, torch.inf), output)

    for part in _modules(engine, "language.embedding"):
        part.register_forward_hook(spoil, with_kwargs=True)


def plant_encoder(engine) -> None:
    for part in _modules(engine, "connector"):
        part.register_forward_hook(lambda _, arguments, output: output * torch.inf)


def plant_weight(engine) -> None:
    for part in _modules(engine, "final_layernorm"):
        part.weight.data[3] = torch.nan


def plant_backward(engine) -> None:
    """Finite forward, and a gradient of 0 * infinity in everything before."""
    for part in _modules(engine, "language.embedding"):
        part.register_forward_hook(lambda _, arguments, output: output + (output * 0).abs().sqrt())


PLANTS = {
    "mlp": plant_huge_mlp,
    "token": plant_strange_token,
    "connector": plant_encoder,
    "weight": plant_weight,
    "backward": plant_backward,
}
LAYOUTS = [
    pytest.param(1, Layout(), marks=pytest.mark.long),
    (2, Layout()),
    (2, Layout(tp=2, sequence_parallel=True)),
    pytest.param(2, Layout(pp=2), marks=pytest.mark.long),
    (2, Layout(cp=2)),
    (2, with_spread(Layout(pp=2))),
]


@pytest.mark.parametrize(("size", "layout"), LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("plant", "words", "samples"),
    [
        ("mlp", "the first output that is not finite is that of language.decoder.layers.0.mlp.linear_fc2 (", "pack"),
        ("token", "is that of language.embedding (", f"with the samples pack{STRANGE_PACK}"),
        ("connector", "is that of connector (", "with the samples pack0"),
        ("weight", "final_layernorm.weight are not finite themselves (1 of ", "samples of this replica's step: all"),
        ("backward", "all outputs are finite, the gradient of language.embedding.", "replica's step: all"),
    ],
)
def test_the_report_names_what_was_planted(worlds, size, layout, plant, words, samples) -> None:
    seen = worlds(size).run(bad_step, layout, plant)
    assert len({report.message for report in seen}) == 1, seen
    assert words in seen[0].message and samples in seen[0].message, seen[0].message
    assert "no weight was changed" in seen[0].message and not any(report.changed for report in seen)


def test_training_ends_with_a_sentence_and_a_code_of_its_own(small_run, tmp_path: Path) -> None:
    recipe = small_run.write_recipe(tmp_path / "r.yaml")
    result = run_command(
        "train", str(recipe), "--stage", "first", "--runs", str(tmp_path), "--processes", "2",
        "stages.first.learning_rate=1e30", "stages.first.warmup_fraction=0", "stages.first.checkpoint_every=1",
    )  # fmt: skip
    assert result.returncode == 87, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("megatron-eagle: ") == 1, result.stderr
    line = next(line for line in result.stderr.splitlines() if line.startswith("megatron-eagle: "))
    assert "no weight was changed" in line and "the first output that is not finite is that of " in line
    step = len(metrics(tmp_path))
    assert f"first step {step + 1}: loss " in line and f"last good checkpoint: {tmp_path}" in line
    assert f"{step}" in line.split("last good checkpoint: ")[1].split(";")[0] and "with the samples " in line
