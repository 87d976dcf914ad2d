"""``megatron-eagle data build``, ``join`` and ``check``: from files to a checked data set."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli.common import Verbs, count, part_of, positive_int, verb

if TYPE_CHECKING:
    from megatron_eagle.data.build.dataset import BuildReport

DAMAGED = 1  # exit code of a check that found something


def add(actions: Verbs) -> None:
    """Declare the actions and their arguments."""
    build = verb(
        actions,
        "build",
        "conversations, media with captions, or a WebDataset to Energon shards",
        "SOURCE is one of\n"
        '  a JSONL file or a JSON array, also in gzip, or Parquet; records are conversations {"from", "value"} or\n'
        '    messages {"role", "content"} with images and videos as paths relative to its folder (docs/data.md);\n'
        "  a folder of images and videos, each with a caption in a .txt of the same name, or a .json with a caption\n"
        "    or a whole record, or with Hugging Face's metadata.jsonl;\n"
        "  a tar or tar.gz of such files, or a folder of tar (WebDataset) or of Parquet files.\n"
        "Bad samples are listed in OUT/rejected.jsonl with place, id and reason; the rest is kept. A record with a\n"
        "key that is not understood is bad. Files of a folder or a tar that are not used are counted. After a kill,\n"
        "the same command goes on where it was. Many machines can share the work, each with its --part, and 'data\n"
        "join' makes one data set of it.",
        "  megatron-eagle data build samples.jsonl data/train --max-rejected 10\n"
        "  megatron-eagle data build photographs/ data/photographs --prompt 'What is in the picture?'\n"
        "  sbatch --array=1-16 --wrap 'megatron-eagle data build big.jsonl data/big --part $SLURM_ARRAY_TASK_ID/16'\n",
        progress=True,
    )
    build.add_argument("source", type=Path, metavar="SOURCE")
    build.add_argument("out", type=Path, metavar="OUT")
    build.add_argument("--media-root", type=Path, default=None, help="folder of a JSONL's media (default: its own)")
    build.add_argument("--prompt", help="question that a mere caption answers (default: 'Describe this in detail.')")
    build.add_argument(
        "--ignore-keys",
        type=_keys,
        default=(),
        metavar="A,B",
        help="keys of records to leave out though they are not understood; 'all' for every such key",
    )
    _add_max_rejected(build)
    build.add_argument(
        "--samples-per-shard",
        type=positive_int,
        default=1000,
        help="samples of SOURCE for one tar file (default: 1000)",
    )
    build.add_argument("--workers", type=positive_int, default=1, help="processes that read and decode (default: 1)")
    build.add_argument("--part", type=part_of, metavar="I/N", help="build only part I of N; then 'data join OUT'")
    build.set_defaults(
        run=_data_build,
        kept=lambda options: f"finished shards are kept in {options.out.parent}/.{options.out.name}.partial",
    )
    join = verb(
        actions,
        "join",
        "one data set of parts that were built apart",
        "Indexes and checks the shards that all parts of 'data build SOURCE OUT --part I/N' have made for OUT. The\n"
        "result is byte for byte what one build would have made.",
        "  megatron-eagle data join data/big\n",
    )
    join.add_argument("out", type=Path, metavar="OUT")
    _add_max_rejected(join)
    join.set_defaults(run=_data_join, kept=lambda options: "the parts are kept")
    check = verb(
        actions,
        "check",
        "find what is damaged in a data set",
        "Reads every byte of every shard, compares it with the checksums that the build kept and with the index, and\n"
        "names shard, sample and member of what is cut off, exchanged, changed, missing or too much, a line each.\n"
        "A data set without checksums (built before 2026-11-26, or by another program) is decoded instead: every\n"
        "record and image; of videos every packet is read, the first and the last frame decoded. Exits with 1 if\n"
        "anything is found.",
        "  megatron-eagle data check data/train\n  megatron-eagle data check data/big --workers 8\n",
        progress=True,
    )
    check.add_argument("folder", type=Path, metavar="FOLDER")
    check.add_argument("--workers", type=positive_int, default=1, help="processes that read, a shard each (default: 1)")
    check.set_defaults(run=_data_check, kept=lambda options: "nothing is kept of the check")


def _add_max_rejected(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-rejected", type=count, default=0, help="fail when more samples than this are bad (default: 0)"
    )


def _keys(text: str) -> tuple[str, ...]:
    """A,B,C."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of keys such as a,b")
    return names


def _data_build(options: argparse.Namespace) -> None:
    from megatron_eagle.data.build.dataset import Part, build_dataset
    from megatron_eagle.data.build.sources import DEFAULT_PROMPT

    report = build_dataset(
        options.source,
        options.out,
        media_root=options.media_root,
        prompt=DEFAULT_PROMPT if options.prompt is None else options.prompt,
        max_rejected=options.max_rejected,
        samples_per_shard=options.samples_per_shard,
        workers=options.workers,
        part=Part(*options.part) if options.part else None,
        ignore_keys=options.ignore_keys,
    )
    what = f"{options.out}, part {options.part[0]}/{options.part[1]}" if options.part else options.out
    print(f"{what}: {_counts(report)}")
    _print_rest(report)
    if options.part:
        print(f"when all {options.part[1]} parts are done: megatron-eagle data join {options.out}")


def _data_join(options: argparse.Namespace) -> None:
    from megatron_eagle.data.build.dataset import join_parts

    report = join_parts(options.out, max_rejected=options.max_rejected)
    print(f"{options.out}: {_counts(report)}")
    _print_rest(report)


def _counts(report: "BuildReport") -> str:
    before = f", {report.resumed} of {report.shards} shards were there already" if report.resumed else ""
    return f"{report.read} samples read, {report.written} written, {report.rejected} rejected{before}"


def _print_rest(report: "BuildReport") -> None:
    """What became of the source's files, and of ids that repeat."""
    if report.files is not None:
        files = report.files
        rejected = f" + {files.rejected} in rejected samples" if files.rejected else ""
        left = f": {', '.join(files.reasons)}" if files.left else ""
        print(f"files: {files.total} = {files.used} used{rejected} + {files.left} left{left}")
    if report.renamed:
        first = report.renamed_first[:100]
        print(f"ids: {report.renamed} repeat and were made unique by their place, such as {first!r}")


def _data_check(options: argparse.Namespace) -> None:
    from megatron_eagle.data.reports.damage import check_damage

    report = check_damage(options.folder, workers=options.workers)
    for line in report.lines:
        print(line)
    if report.findings > len(report.lines):
        print(f"... and {report.findings - len(report.lines)} more")
    for line in report.doubtful:
        print(f"doubtful: {line}")
    if report.doubts > len(report.doubtful):
        print(f"doubtful: {report.doubts - len(report.doubtful)} more")
    print(f"{options.folder}: {report.summary}")
    if report.compared < report.shards:
        print(
            f"not compared: no checksums of {report.shards - report.compared} of {report.shards} shards; their records "
            "were parsed and images decoded, all packets of videos read, first and last frames decoded"
        )
    if report.findings:
        sys.exit(DAMAGED)
