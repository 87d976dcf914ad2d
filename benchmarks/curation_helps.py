"""Does curation help? The demo's model on data with 30 % planted faults, and on the same data curated.

    python benchmarks/curation_helps.py FOLDER --seeds 1 2 3 [--steps 200]

Of each seed: the embedded data set is generated, faults are planted into 30 % of its samples (``plant``, which knows
nothing of the rules: its faulty texts are those of ``tests/curation/planted.py``, which was committed before them), the
result is curated, and both are trained from the same weights with the same recipe, tokenizer and number of steps. What
``data build`` refuses by itself, such as a marker without its image, is in neither. Held-out questions are clean, and
the same for all. Given again it continues: runs that are done are kept.

It is the demo's model and main stage made as small as it still learns, for cores that are shared: the tasks 'shape' and
'text' alone, one tile a picture, packs of 512 tokens.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import yaml
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests" / "curation"))
from planted import EXCHANGES, KINDS

FAULTY = 0.3
SAMPLES = 2500
ASKED = 90  # held-out conversations
TASKS = ("shape", "text")
RULES = (
    {"use": "turn_order"}, {"use": "empty"}, {"use": "refusal"}, {"use": "mentioned_images"},
    {"use": "image_size", "least_side": 56}, {"use": "language", "languages": ["en"]}, {"use": "choices"},
    {"use": "yes_no"}, {"use": "counting"}, {"use": "leak"}, {"use": "repetition"}, {"use": "decimals"},
)  # fmt: skip
HINTS = ("{} (Answer: {})", "{} Hint: the answer is {}.", "{}\nAnswer: {}", "{}\nThe correct answer is {}.")


def plant(record: dict, kind: str, folder: Path, rng: random.Random) -> bool:
    """Plants a fault of this kind into a record of the embedded set; False, and nothing done, if it does not fit there.

    Answers become faulty and questions stay, where the kind is one of answers; pictures are drawn anew in another size.
    """
    turns = record["conversations"]
    at = 2 * rng.randrange(len(turns) // 2)
    question, answer = turns[at], turns[at + 1]
    images = [record["image"]] if isinstance(record.get("image"), str) else list(record.get("image", ()))
    asked, told = EXCHANGES[kind](rng) if kind in EXCHANGES else ("", "")
    needs: dict[str, bool] = {
        "decimals": answer["value"].isdigit(), "yes_no_number": answer["value"] in ("yes", "no"),
        "count_in_words": record["task"] == "count" and answer["value"].isdigit(),
        **dict.fromkeys(("small_image", "extreme_aspect", "unshown_image", "missing_image"), bool(images)),
    }  # fmt: skip
    if not needs.get(kind, True):
        return False
    if kind == "no_such_option":
        markers = "<image>\n" * question["value"].count("<image>")
        question["value"], answer["value"] = markers + asked, told
    elif kind == "leak":
        question["value"] = rng.choice(HINTS).format(question["value"], answer["value"])
    elif kind == "repeated_lines":
        answer["value"] = "\n".join([answer["value"]] * rng.randint(4, 12))
    elif kind in EXCHANGES:
        answer["value"] = told
    elif kind == "role_order":
        extra = rng.choice(
            ({"from": "human", "value": "Please look closely."}, {"from": "gpt", "value": "Let me see."})
        )
        turns.insert(at + 1, extra)
    elif kind in ("small_image", "extreme_aspect"):
        number = rng.randrange(len(images))
        images[number] = _redrawn(folder, images[number], kind, rng)
    elif kind == "unshown_image":
        images += images[:1]
    else:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    if images:
        record["image"] = images
    return True


def _redrawn(folder: Path, name: str, kind: str, rng: random.Random) -> str:
    if kind == "small_image":
        short = rng.randint(4, 48)
        size = (short, short + rng.randint(0, 70))
    else:
        short = rng.randint(60, 80)
        size = (short * rng.randint(18, 40), short)
    new = f"images/{kind}-{Path(name).name}"
    Image.open(folder / name).resize(size).save(folder / new)
    return new


def plant_all(folder: Path, rng: random.Random) -> dict[str, int]:
    """Writes ``folder/faulty.jsonl`` beside ``samples.jsonl``; returns how many samples got which fault."""
    planted = dict.fromkeys(KINDS, 0)
    with open(folder / "faulty.jsonl", "w", encoding="utf-8") as file:
        for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if rng.random() < FAULTY:
                kind = rng.choice(KINDS)
                while not plant(record, kind, folder, rng):
                    kind = rng.choice(KINDS)
                planted[kind] += 1
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return planted


def prepare(folder: Path, seed: int) -> None:
    """Data sets ``faulty`` and ``curated`` of a seed in ``folder/data``, and a tokenizer of the clean texts."""
    from megatron_eagle.config.presets import PRESETS
    from megatron_eagle.curation.engine import curate
    from megatron_eagle.curation.plan import load_plan
    from megatron_eagle.data.build.dataset import build_dataset
    from megatron_eagle.data.sample.tokenizer import train_sentencepiece
    from megatron_eagle.demo import dataset
    from megatron_eagle.demo.dataset import generate

    raw = folder / "raw"
    dataset.TASK_SHARES["broad"] = dict.fromkeys(TASKS, 1.0)
    clean = generate(raw, split="train", samples=SAMPLES, seed=seed)
    planted = plant_all(raw, random.Random(f"faults/{seed}"))
    plan = {
        "name": "helps",
        "sources": [{"name": "faulty", "path": str(raw / "faulty.jsonl")}],
        "operators": list(RULES),
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    summary = curate(load_plan(folder / "plan.yaml"), folder / "curation", build=True)
    (folder / "data").mkdir()
    (folder / "data" / "curated").symlink_to((folder / "curation" / "shards" / "faulty").absolute())
    build_dataset(raw / "faulty.jsonl", folder / "data" / "faulty", max_rejected=SAMPLES)
    lines = (json.loads(line) for line in clean.read_text(encoding="utf-8").splitlines())
    texts = [turn["value"].replace("<image>", "") for one in lines for turn in one["conversations"]]
    train_sentencepiece(
        ["user\n", "assistant\n", *texts], folder / "tokenizer.model", PRESETS["tiny"].language.vocab_size
    )
    counts = {"planted": planted, "read": summary.total("read"), "used": summary.total("used")}
    (folder / "prepared.json").write_text(json.dumps(counts), encoding="utf-8")


def recipe(folder: Path, name: str, seed: int, steps: int) -> Path:
    """The demo's main stage alone, in one process, on one of the two data sets."""
    from megatron_eagle.config.shipped import shipped_recipes

    raw = yaml.safe_load(shipped_recipes()["tiny"].read_text(encoding="utf-8"))
    (stage,) = (one for one in raw["stages"] if one["name"] == "stage1.5")
    stage |= {
        "steps": steps,
        "pack_length": 512,
        "blend": [{"path": str(folder / "data" / name)}],
        "checkpoint_every": steps,
    }
    raw |= {"name": name, "seed": seed, "layout": {}, "stages": [stage]}
    raw["reading"]["max_tiles"] = 1
    raw["tokenizer"]["path"] = str(folder / "tokenizer.model")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def accuracy(folder: Path, name: str, seed: int, steps: int, heldout: Path) -> float:
    """Trains and answers; the share of held-out questions that are answered rightly."""
    path = recipe(folder, name, seed, steps)
    runs = folder / f"runs-{steps}"
    out = runs / name / "evaluation"
    for words in (
        ["train", str(path), "--stage", "stage1.5", "--runs", str(runs), "--processes", "1"],
        [
            "evaluate",
            str(path),
            "--data",
            str(heldout),
            "--runs",
            str(runs),
            "--processes",
            "1",
            "--answer-tokens",
            "8",
        ],
    ):
        if not (out / "accuracy.json").exists():
            _command(words)
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    return mean(one["prediction"].strip() == one["answer"].strip() for one in answers)


def _command(words: list[str]) -> None:
    """In this process: importing PyTorch takes as long as thirty steps."""
    from megatron_eagle import cli

    try:
        cli.main(words)
    except SystemExit as end:
        if end.code:
            raise


def main(say: Callable[[str], None] = print) -> None:
    """All seeds; prints the table."""
    from megatron_eagle.data.build.dataset import build_dataset
    from megatron_eagle.demo import dataset
    from megatron_eagle.demo.dataset import generate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    heldout = options.folder.absolute() / "heldout"
    dataset.TASKS = TASKS
    if not heldout.exists():
        build_dataset(generate(options.folder / "raw", split="heldout", samples=ASKED, seed=2026), heldout)
    found: dict[str, list[float]] = {"faulty": [], "curated": []}
    say("| seed | samples | kept | faulty | curated |")
    say("|---|---|---|---|---|")
    for seed in options.seeds:
        folder = options.folder.absolute() / str(seed)
        if not (folder / "prepared.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was ended within it
            prepare(folder, seed)
        counts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        for name, accuracies in found.items():
            accuracies.append(accuracy(folder, name, seed, options.steps, heldout))
        say(
            f"| {seed} | {counts['read']} | {counts['used']} | {found['faulty'][-1]:.1%} | {found['curated'][-1]:.1%} |"
        )
    gains = [after - before for before, after in zip(found["faulty"], found["curated"], strict=True)]
    spread = f", standard deviation {stdev(gains):.1%}" if len(gains) > 1 else ""
    say(f"\nCurated minus faulty: {mean(gains):+.1%} on average{spread}.")


if __name__ == "__main__":
    main()
