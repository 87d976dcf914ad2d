"""``megatron-eagle data``: build and check data sets."""

import argparse
from pathlib import Path

from megatron_eagle.cli.common import Verbs, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "data",
        "build and check data sets",
        "Turns conversation JSONL into Energon shards, and checks shards.",
        "  megatron-eagle data build samples.jsonl data/train\n  megatron-eagle data check data/train\n",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    build = verb(
        actions,
        "build",
        "conversation JSONL to Energon shards",
        "Each line is one sample in the LLaVA/ShareGPT form\n"
        '{"id", "image": path or list of paths, "conversations": [{"from", "value"}]}.\n'
        "Image paths are relative to the JSONL's folder. Bad samples are listed in OUT/rejected.jsonl with line, id\n"
        "and reason; the good ones are kept.",
        "  megatron-eagle data build samples.jsonl data/train --max-rejected 10\n",
    )
    build.add_argument("samples", type=Path, metavar="SAMPLES.jsonl")
    build.add_argument("out", type=Path, metavar="OUT")
    build.add_argument("--media-root", type=Path, default=None, help="folder of the images (default: the JSONL's)")
    build.add_argument(
        "--max-rejected", type=int, default=0, help="fail when more samples than this are bad (default: 0)"
    )
    build.add_argument("--samples-per-shard", type=int, default=1000, help="samples in one tar file (default: 1000)")
    build.set_defaults(run=_data_build)
    check = verb(
        actions,
        "check",
        "open a built data set and count it",
        "Opens every shard through Energon, reads every sample and compares the counts with the index.",
        "  megatron-eagle data check data/train\n",
    )
    check.add_argument("folder", type=Path, metavar="FOLDER")
    check.set_defaults(run=_data_check)


def _data_build(options: argparse.Namespace) -> None:
    from megatron_eagle.data.build import build_dataset

    report = build_dataset(
        options.samples,
        options.out,
        media_root=options.media_root,
        max_rejected=options.max_rejected,
        samples_per_shard=options.samples_per_shard,
    )
    print(f"{options.out}: {report.read} samples read, {report.written} written, {report.rejected} rejected")


def _data_check(options: argparse.Namespace) -> None:
    from megatron_eagle.data.build import check_dataset

    print(f"{options.folder}: {check_dataset(options.folder)} samples, all readable")
