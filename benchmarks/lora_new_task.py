"""LoRA beside full fine-tuning on a task the base never saw: what it learns, and what it forgets.

    make demo
    python benchmarks/lora_new_task.py runs/demo FOLDER [--steps 60]

The base is the demo's trained model. It knows bars, their colours and the tallest one; nothing ever asked it for the
shortest. It is fine-tuned on that question alone, all of its weights or adapters on all linear layers, from
the same checkpoint, on the same packs, for as many steps, each at the given learning rates. Scored are held-out
questions of the new task, in wordings not trained on, and the demo's own held-out set. Given again it continues: what
is done is kept.

Figures: lora_new_task_2026-11-26.md.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TRAINED, ASKED = 2000, 120  # samples of the new task
LORA = {"rank": 8, "alpha": 16, "targets": ["vision", "connector", "language"]}
STAGE = "shortest"


@dataclass(frozen=True)
class Outcome:
    """A line of the table: shares of questions answered rightly; parameters trained; bytes of the checkpoint."""

    name: str
    new: float
    old: float
    trained: int
    size: int


def generate(folder: Path, split: str, samples: int) -> Path:
    """Charts of three to five bars, each asked for its shortest, in the LLaVA form; chance alone is right of 26 %."""
    from megatron_eagle.demo.dataset import size_for_grid
    from megatron_eagle.demo.drawing import COLOURS, ChartScene, draw_scene
    from megatron_eagle.demo.questions import ASK

    rng = random.Random(f"{STAGE}/{split}")
    (folder / "images").mkdir(parents=True)
    path = folder / "samples.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(samples):
            colours = rng.sample(list(COLOURS), rng.randint(3, 5))
            heights = [1, *rng.sample(range(3, 9), len(colours) - 1)]
            bars = tuple(zip(colours, rng.sample([height / 8 for height in heights], len(heights)), strict=True))
            image = f"images/{split}-{number:05d}.png"
            draw_scene(ChartScene(bars), size_for_grid((1, 1), rng), rng).save(folder / image)
            question = ASK["tallest"].pick(split, rng).replace("tallest", "shortest")
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": min(bars, key=lambda bar: bar[1])[0]},
            ]
            record = {"id": f"{split}-{number:05d}", "task": STAGE, "image": image, "conversations": turns}
            file.write(json.dumps(record) + "\n")
    return path


def recipe(folder: Path, demo: Path, steps: int, name: str, lora: bool, rate: float) -> Path:
    """The demo's recipe in one process, with one stage on the new task behind the demo's last checkpoint."""
    from megatron_eagle.checkpoint.files import find_latest
    from megatron_eagle.config.shipped import shipped_recipes

    raw: dict[str, Any] = yaml.safe_load(shipped_recipes()["tiny"].read_text(encoding="utf-8"))
    last = raw["stages"][-1]
    raw["tokenizer"]["path"] = str(demo / "data" / "tokenizer.model")
    raw["layout"] = {}
    if name != demo.name:
        raw["model"]["initial_weights"] = str(find_latest(demo / "checkpoints" / last["name"]))
        changes = {
            "name": STAGE,
            "steps": steps,
            "pack_length": 512,
            "learning_rate": rate,
            "warmup_fraction": 0.1,
            "blend": [{"path": str(folder / "data" / "train")}],
            "checkpoint_every": steps,
        }
        kept = {key: value for key, value in last.items() if key != "part_learning_rates"}
        raw["stages"] = [kept | changes]
    raw |= {"name": name} | ({"lora": LORA} if lora else {})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def accuracy(path: Path, runs: Path, data: Path, out: Path) -> float:
    """The share of the questions of ``data`` that the newest checkpoint answers rightly."""
    if not (out / "accuracy.json").exists():
        _command("evaluate", path, "--data", data, "--runs", runs, "--out", out, "--processes", 1, "--answer-tokens", 8)
    return float(json.loads((out / "accuracy.json").read_text(encoding="utf-8"))["overall"])


def _command(*words: object) -> None:
    """In this process: importing PyTorch takes as long as ten steps."""
    from megatron_eagle import cli

    try:
        cli.main([str(word) for word in words])
    except SystemExit as end:
        if end.code:
            raise


def outcomes(options: argparse.Namespace) -> Iterator[Outcome]:
    """The base, then each way at each learning rate."""
    from megatron_eagle.checkpoint.files import find_latest, read_description
    from megatron_eagle.data.build.dataset import build_dataset

    folder, demo = options.folder.absolute(), options.demo.absolute()
    for split, samples in (("train", TRAINED), ("heldout", ASKED)):
        if not (folder / "data" / split).exists():
            build_dataset(generate(folder / "raw" / split, split, samples), folder / "data" / split)
    runs = folder / f"runs-{options.steps}"
    ways = [(demo.name, False, 0.0)]
    ways += [(f"full-{rate:g}", False, rate) for rate in options.full]
    ways += [(f"lora-{rate:g}", True, rate) for rate in options.lora]
    for name, lora, rate in ways:
        path = recipe(folder, demo, options.steps, name, lora, rate)
        base = name == demo.name
        home = demo.parent if base else runs
        if not base:
            _command("train", path, "--stage", STAGE, "--runs", runs, "--processes", 1)
        scores = runs / "scores" / name
        new = accuracy(path, home, folder / "data" / "heldout", scores / "new")
        old = accuracy(path, home, demo / "data" / "heldout", demo / "evaluation" if base else scores / "old")
        if base:
            yield Outcome("base", new, old, 0, 0)
            continue
        checkpoint = find_latest(runs / name / "checkpoints" / STAGE)
        assert checkpoint is not None
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        yield Outcome(name, new, old, read_description(checkpoint).trainable_parameters, size)


def main(say: Callable[[str], None] = print) -> None:
    """Trains, scores, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the demo's folder, trained")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--full", type=float, nargs="+", default=[5e-4], help="learning rates of all weights")
    parser.add_argument("--lora", type=float, nargs="+", default=[5e-3], help="learning rates of adapters")
    rows = [
        f"| {one.name} | {one.new:.1%} | {one.old:.1%} | {one.trained:,} | {one.size:,} |"
        for one in outcomes(parser.parse_args())
    ]
    say("| | new task | old tasks | parameters trained | bytes of the checkpoint |\n|---|---|---|---|---|")
    say("\n".join(rows))


if __name__ == "__main__":
    main()
