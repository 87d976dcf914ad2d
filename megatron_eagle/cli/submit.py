"""``megatron-eagle submit``: the stages of a recipe as a chain of Slurm jobs."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli.common import Verbs, add_recipe_arguments, print_once, verb

if TYPE_CHECKING:
    from megatron_eagle.cluster.submit import Chain
    from megatron_eagle.config.recipe import Recipe


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "submit",
        "submit the stages of a recipe to Slurm, as a chain of jobs",
        "Checks the recipe against the cluster, writes one batch script a stage into <runs>/<name>/jobs and submits\n"
        "them so that each starts when the one before has reached its last step; with --export, a last job writes the\n"
        "trained model for Hugging Face. docs/slurm.md says what happens then.",
        "  megatron-eagle submit eagle2-9b --cluster h100 --dry-run\n"
        "  megatron-eagle submit my-eagle.yaml --cluster my-cluster.yaml --export released/my-eagle\n"
        "  megatron-eagle submit my-eagle.yaml --cluster my-cluster.yaml --stages stage1.5,stage2\n",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--stages", default="", metavar="A,B", help="only these stages (default: all)")
    parser.add_argument(
        "--cluster",
        default="cpu",
        metavar="FILE",
        help="cluster profile, or the name of one that comes along: h100, cpu, ... (default: cpu)",
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="last, write the model there for Hugging Face")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the scripts and their order instead of submitting; needs no Slurm"
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="a stage whose newest checkpoint is damaged goes on from its newest that is not; checks all files first",
    )
    parser.set_defaults(run=_submit)


def _submit(options: argparse.Namespace) -> None:
    from megatron_eagle.cluster import slurm
    from megatron_eagle.cluster.partition_limits import check_chain
    from megatron_eagle.cluster.profile import load_profile
    from megatron_eagle.cluster.queueing import submit_chain
    from megatron_eagle.cluster.submit import missing_account, plan_chain
    from megatron_eagle.config.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    profile = load_profile(options.cluster)
    stages = [name for name in options.stages.split(",") if name]
    folders = (options.runs, options.export)
    if options.dry_run:
        chain = plan_chain(recipe, stages, replace(profile, needs_account=False), *folders, fallback=options.fallback)
        _show(chain)
        warn_of_memory(recipe, chain, profile.gpu)
        if missing := missing_account(profile):
            print(f"### not to be submitted as it is: {missing}")
        elif slurm.is_installed():
            slurm.check_environment(os.environ)
            check_chain(chain, profile)
        else:
            print("### Slurm is not installed here: not checked against its partitions")
        return
    slurm.check_environment(os.environ)
    chain = plan_chain(recipe, stages, profile, *folders, fallback=options.fallback)
    check_chain(chain, profile)
    warn_of_memory(recipe, chain, profile.gpu)
    try:
        jobs = submit_chain(chain)
    except KeyboardInterrupt:
        print_once("megatron-eagle: interrupted: what was queued is cancelled")
        raise
    for link, job in zip(chain.links, jobs, strict=True):
        print(f"{link.name}: job {job}, {link.nodes} nodes, {link.processes} processes, log {chain.log(link, job)}")
    print(f"watch it: megatron-eagle status {chain.folder} --watch")


def warn_of_memory(recipe: "Recipe", chain: "Chain", gpu: str | None) -> None:
    """Say on stderr which stages of the chain do not fit by the plan; it may be wrong, so that is no refusal."""
    if gpu is None:
        return
    from megatron_eagle.planning.hardware import load_hardware
    from megatron_eagle.planning.report import too_large

    hardware = load_hardware(gpu)
    for link in chain.links:
        if link.stage and (said := too_large(recipe, link.stage, link.processes, hardware)):
            print(f"megatron-eagle: warning: {said}", file=sys.stderr, flush=True)


def _show(chain: "Chain") -> None:
    """The scripts, then what would be submitted in which order."""
    for link in chain.links:
        print(f"### {chain.script(link)}: {link.nodes} nodes, {link.processes} processes\n{link.text}")
    before = ""
    for link in chain.links:
        print(f"### would submit {link.name}: {link.nodes} nodes, {link.processes} processes{before}")
        before = f", after {link.name} has ended well"
