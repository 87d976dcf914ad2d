"""``megatron-eagle data``: build and check data sets, and look at the stream that comes of them."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli import data_build
from megatron_eagle.cli.common import Verbs, count, not_negative, part_of, positive_int, verb

if TYPE_CHECKING:
    from megatron_eagle.config.recipe import Recipe, Stage


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "data",
        "build and check data sets, look at their packs",
        "Turns conversations and media into Energon shards, checks shards, and shows the stream of packs made of them.",
        "  megatron-eagle data build samples.jsonl data/train\n  megatron-eagle data check data/train\n"
        "  megatron-eagle data pack-report tiny --plot packs.png\n",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    data_build.add(actions)
    _add_tokenizer(actions)
    _add_measure(actions)
    _add_inspect(actions)
    _add_digest(actions)
    _add_pack_report(actions)


def _add_tokenizer(actions: Verbs) -> None:
    parser = verb(
        actions,
        "tokenizer",
        "train a small recipe's tokenizer on its data sets",
        "Trains the SentencePiece model that a recipe names as its tokenizer, on the texts of all its data sets, as\n"
        "large as the model's vocabulary at the most. Does nothing if it is there. Released models bring their own.",
        "  megatron-eagle data tokenizer own-pictures\n",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file, or the name of one")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the recipe to change")
    parser.set_defaults(run=_data_tokenizer)


def _add_measure(actions: Verbs) -> None:
    parser = verb(
        actions,
        "measure",
        "count the tokens of a recipe's data sets",
        "Counts tokens and sizes of images and videos of every data set of a recipe and keeps them beside the shards,\n"
        "so that no training process has to. Prints what is shown whole, degraded or dropped at the recipe's pack\n"
        "length. Only shards that were not counted before are read: a new data set, or new shards of one that another\n"
        "program extended. After a kill, the same command goes on where it was. Many machines can share the work,\n"
        "each with its --part; without it what is there is put together, and what is missing is counted.",
        "  megatron-eagle data measure tiny\n"
        "  sbatch --array=1-16 --wrap 'megatron-eagle data measure big.yaml --part $SLURM_ARRAY_TASK_ID/16'\n",
        progress=True,
    )
    _add_recipe(parser)
    parser.add_argument(
        "--workers", type=positive_int, default=1, help="processes that read, a shard each (default: 1)"
    )
    parser.add_argument("--part", type=part_of, metavar="I/N", help="count only part I of N; then without it")
    parser.set_defaults(run=_data_measure, kept=lambda options: "shards that were counted stay counted")


def _add_inspect(actions: Verbs) -> None:
    parser = verb(
        actions,
        "inspect",
        "a page that shows what the model will see",
        "Writes OUT/index.html and OUT/lengths.png: tokens, tiles, aspect ratios and padding by data set, what is\n"
        "rejected and why, and samples with tiles in their grid and questions and answers apart, decoded from the\n"
        "tokens that are trained on; they can be searched.",
        "  megatron-eagle data inspect tiny --out runs/demo/inspect\n",
    )
    _add_recipe(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT")
    parser.add_argument("--shown", type=count, default=12, metavar="N", help="samples to show (default: 12)")
    parser.set_defaults(run=_data_inspect)


def _add_digest(actions: Verbs) -> None:
    parser = verb(
        actions,
        "digest",
        "a fingerprint of the first packs",
        "Reads the first packs of a stage as N data-parallel ranks would and prints a sha256 over their sample ids.\n"
        "It is the same for every number of ranks and of reader processes.",
        "  megatron-eagle data digest tiny --dp 2 --packs 100\n",
    )
    _add_recipe(parser)
    parser.add_argument("--dp", type=positive_int, default=1, metavar="N", help="data-parallel ranks (default: 1)")
    parser.add_argument("--packs", type=positive_int, default=100, metavar="K", help="packs to read (default: 100)")
    parser.add_argument("--workers", type=count, default=0, help="reader processes of a rank (default: 0)")
    parser.set_defaults(run=_data_digest)


def _add_pack_report(actions: Verbs) -> None:
    parser = verb(
        actions,
        "pack-report",
        "padding and balance of every packing rule",
        "Packs the same samples by every rule: padding, packs an epoch, CPU seconds, and how much longer the\n"
        "slowest rank of a step computes than the mean one, for packs in order and packs dealt by cost.",
        "  megatron-eagle data pack-report tiny --plot packs.png\n"
        "  megatron-eagle data pack-report tiny --samples 1000000 --pack-length 16384\n"
        "  megatron-eagle data pack-report --lognormal 700 1.0 --pack-length 16384\n",
    )
    _add_recipe(parser, nargs="?")
    parser.add_argument(
        "--lognormal",
        type=not_negative,
        nargs=2,
        metavar=("MEDIAN", "SIGMA"),
        help="lengths drawn from this, not a recipe's",
    )
    parser.add_argument(
        "--samples", type=positive_int, help="draw so many, with replacement (default: an epoch; lognormal: 10^6)"
    )
    parser.add_argument(
        "--pack-length", type=positive_int, help="tokens of a pack (default: the stage's; lognormal: 16384)"
    )
    parser.add_argument("--ranks", type=positive_int, default=64, help="data-parallel ranks (default: 64)")
    parser.add_argument(
        "--attention-parity", type=positive_int, help="see docs/data.md (default: the recipe's, or 65000)"
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="also draw it")
    parser.set_defaults(run=_data_pack_report)


def _add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", nargs=nargs, help="YAML file, or the name of one")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the recipe to change")
    parser.add_argument("--stage", help="name of the stage (default: the first)")


def _load(options: argparse.Namespace) -> "tuple[Recipe, Stage]":
    from megatron_eagle.config.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    return recipe, recipe.stage(options.stage) if options.stage else recipe.stages[0]


def _data_tokenizer(options: argparse.Namespace) -> None:
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.data.build.vocabulary import make_tokenizer

    recipe = load_recipe(options.recipe, options.overrides)
    there = " (it was there already)" if Path(recipe.tokenizer.path).exists() else ""
    print(f"{recipe.tokenizer.path}: {make_tokenizer(recipe)} pieces{there}")


def _data_measure(options: argparse.Namespace) -> None:
    from megatron_eagle.data.build.measure import measure_shards
    from megatron_eagle.data.build.part import Part
    from megatron_eagle.data.order.lengths import dataset_lengths
    from megatron_eagle.data.order.measuring import TextOf, open_sample_index
    from megatron_eagle.data.sample.budget import degrade_report
    from megatron_eagle.data.sample.tokenizer import recipe_tokenizer
    from megatron_eagle.data.storage.location import REMOTE

    recipe, chosen = _load(options)
    tokenizer = recipe_tokenizer(recipe)
    stages = [chosen] if options.stage else recipe.stages
    paths = [source.path for stage in stages for source in recipe.data_settings(stage).sources]
    local = [path for path in paths if not path.startswith(REMOTE)]
    part = Part(*options.part) if options.part else None
    report = measure_shards(local, TextOf(tokenizer, recipe.reading.system), part=part, workers=options.workers)
    if part is not None:
        print(f"part {part.number}/{part.parts}: {report.own} of {report.due} shards, {report.now} of them read now")
        print(f"when all {part.parts} parts are done: megatron-eagle data measure {options.recipe}, without --part")
        return
    print(f"{report.due} shards were due, {report.due - report.now} of them measured before, {report.now} read now")
    for stage in stages:
        settings = recipe.data_settings(stage)
        for source in settings.sources:
            lengths = dataset_lengths(open_sample_index(source.path), tokenizer, settings)
            used = len(lengths.tokens) - len(lengths.rejected)
            print(
                f"{stage.name}: {source.path}: {len(lengths.tokens)} samples = {used} used + {len(lengths.rejected)} "
                f"rejected, {int(lengths.tokens.sum())} tokens, {int(lengths.tiles.sum())} tiles, "
                f"{int(lengths.frames.sum())} frames"
            )
            print(f"  {degrade_report({'shown': lengths.outcomes})[0]}")
            for reason in list(lengths.rejected.values())[:5]:
                print(f"  {reason}")


def _data_inspect(options: argparse.Namespace) -> None:
    from megatron_eagle.data.order.plan import open_stage_plan
    from megatron_eagle.data.reports.inspection import HEADS, write_page
    from megatron_eagle.data.sample.budget import degrade_report

    recipe, stage = _load(options)
    views = write_page(open_stage_plan(recipe, stage), options.out, options.shown)
    print(" | ".join(HEADS))
    for view in views:
        print(" | ".join(view.row()))
    print("degraded or dropped, by source")
    for line in degrade_report({view.name: view.outcomes for view in views}):
        print(f"  {line}")
    print(options.out / "index.html")


def _data_digest(options: argparse.Namespace) -> None:
    from megatron_eagle.data.stream.digest import read_digest
    from megatron_eagle.data.stream.streams import open_stage_stream
    from megatron_eagle.errors import UserError

    recipe, stage = _load(options)
    recipe = replace(recipe, reading=replace(recipe.reading, workers=options.workers))
    if stage.batch % options.dp:
        raise UserError(
            f"batch={stage.batch} packs cannot be shared out evenly to {options.dp} data-parallel ranks; the digest "
            f"does not depend on it: add stages.{stage.name}.batch={options.dp}"
        )
    opened = partial(open_stage_stream, recipe, stage, world_size=options.dp)
    digest = read_digest(opened, options.dp, options.packs, stage.batch)
    print(f"{digest.sha256}  {digest.packs} packs, {digest.samples} samples used, {digest.rejected} rejected")


def _data_pack_report(options: argparse.Namespace) -> None:
    import numpy as np

    from megatron_eagle.config.data import BlendSource, DataSettings
    from megatron_eagle.data.order.plan import epoch_lengths, open_stage_plan
    from megatron_eagle.data.reports.pack_report import Bounds, compare_packings, lognormal_lengths, plot, table
    from megatron_eagle.data.sample.budget import degrade_report
    from megatron_eagle.errors import UserError

    if (options.recipe is None) == (options.lognormal is None):
        raise UserError("pack-report needs a RECIPE or --lognormal MEDIAN SIGMA, one of them")
    degraded: list[str] = []
    if options.lognormal:
        median, sigma = options.lognormal
        length = options.pack_length or 16384
        settings = DataSettings(sources=(BlendSource("lognormal"),), pack_length=length, tokens_per_tile=1)
        tokens = lognormal_lengths(options.samples or 1_000_000, median, sigma, length)
        tiles = np.zeros_like(tokens)
        title = f"lognormal lengths, median {median:g}, sigma {sigma:g}"
    else:
        recipe, stage = _load(options)
        settings = recipe.data_settings(stage)
        plan = open_stage_plan(recipe, stage)
        tokens, tiles = epoch_lengths(plan)
        by_source = zip(settings.sources, plan.lengths, strict=True)
        degraded = degrade_report({source.path: lengths.outcomes for source, lengths in by_source})
        if options.samples:
            drawn = np.random.default_rng(0).integers(len(tokens), size=options.samples)
            tokens, tiles = tokens[drawn], tiles[drawn]
        title = f"{options.recipe}, {stage.name}"
    length = options.pack_length or settings.pack_length
    bounds = Bounds(
        length=length,
        max_tiles=settings.reading.max_tiles_per_pack,
        spare=settings.reading.spare_packs(int(tokens.sum()) // length),
        attention_parity=options.attention_parity or settings.attention_parity,
        tile_cost=settings.tile_cost,
    )
    title += f": {len(tokens)} samples, {tokens.mean():.0f} tokens on average, packs of {length}"
    longer = int((tokens > length).sum())
    if longer == len(tokens):
        raise UserError(
            f"none of {longer} samples fits into a pack of {length} tokens, the shortest has {tokens.min()}"
        )
    print(f"{title}, attention parity {bounds.attention_parity}, {bounds.tile_cost:.4g} tokens a tile")
    if longer:
        print(f"{longer} samples are longer than a pack and left out")
    results = compare_packings(tokens, tiles, bounds, options.ranks)
    print(table(results, options.ranks))
    if degraded:
        print("\n  ".join([f"degraded or dropped, by source, in packs of {settings.pack_length}", *degraded]))
    if options.plot:
        plot(results, tokens, title, options.plot)
        print(options.plot)
