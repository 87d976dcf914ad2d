"""``megatron-eagle verify``: every layout against one plain process."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import Verbs, count, positive_int, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "verify",
        "prove on this machine that every layout computes the same",
        "Trains three steps of a small Eagle in real processes, in many layouts, and compares losses, gradients and\n"
        "weights with one plain float64 process made of transformers' modules. --quick runs a table in which every\n"
        "pair of options occurs; without it, all combinations run, which takes a night and more.",
        "  megatron-eagle verify --quick --out runs/verify\n  megatron-eagle verify --sample 50 --seed 1\n",
        progress=True,
    )
    parser.add_argument("--quick", action="store_true", help="cover every pair of options instead of their product")
    parser.add_argument(
        "--sample", type=positive_int, default=None, metavar="N", help="run N rows of the table, drawn at random"
    )
    parser.add_argument("--seed", type=count, default=0, help="what --sample draws with (default: 0)")
    parser.add_argument(
        "--processes", type=positive_int, default=None, help="largest world (default: 4 quick, 8 otherwise)"
    )
    parser.add_argument(
        "--recipe", type=Path, default=None, help="check this recipe's layouts on its own data, at reduced width"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the recipe to change")
    parser.add_argument("--out", type=Path, default=None, help="folder for verify.json and verify.md")
    parser.add_argument(
        "--kernels",
        choices=("torch", "triton"),
        default="torch",
        help="triton: this project's kernels, interpreted (needs TRITON_INTERPRET=1, slow); default: torch",
    )
    parser.add_argument("--lora", action="store_true", help="train LoRA's adapters, against the PEFT library")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> None:
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.verification.table import verify, verify_recipe

    if options.recipe:
        recipe = load_recipe(options.recipe, options.overrides)
        return verify_recipe(
            recipe, processes=options.processes, out=options.out, kernels=options.kernels, lora=options.lora
        )
    verify(
        quick=options.quick,
        processes=options.processes,
        out=options.out,
        kernels=options.kernels,
        lora=options.lora,
        sample=options.sample,
        seed=options.seed,
    )
