"""``megatron-eagle job``: what the batch script of ``slurm/train.sbatch`` asks before and after each start."""

import argparse
import sys
from pathlib import Path

from megatron_eagle.cli.common import Number, Verbs, count, positive_int, verb


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "job",
        "for batch scripts: note a start or an end of a stage's job, and say what to do",
        "Writes to the run's events.jsonl. The last line that it prints is for the script: before a start 'go' with\n"
        "the start's number, or 'stop' if the stage has used up its restarts; after it 'complete', 'stop',\n"
        "'superseded' by a newer start, or 'requeue' with the nodes to leave out.",
        "  megatron-eagle job begin --run runs/demo --stage stage1 --job 17 --log slurm-17.out --nodes 'n[1-2]'\n",
    )
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="FOLDER", help="the run folder")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--job", required=True, metavar="ID", help="Slurm's number of the job")
    parser.add_argument("--log", type=Path, required=True, help="the job's log, where causes are looked for")
    parser.add_argument("--nodes", default="", help="begin: Slurm's list of the nodes")
    parser.add_argument(
        "--reads-only", action="store_true", help="begin: this job writes nothing of the run, so no other start ends"
    )
    parser.add_argument("--start", type=positive_int, metavar="N", help="end: the number that 'begin' said")
    parser.add_argument("--code", type=Number(-255, 255, whole=True), default=0, help="end: exit code of the srun")
    parser.add_argument("--asked", action="store_true", help="end: the job had been asked to stop")
    parser.add_argument("--stacks", type=Path, default=Path(), metavar="FOLDER", help="end: where hung processes wrote")
    parser.add_argument("--failures", type=count, default=10, metavar="N", help="restarts allowed after failures")
    parser.add_argument(
        "--without-progress", type=positive_int, default=3, metavar="N", help="idle starts allowed in a row"
    )
    parser.set_defaults(run=_job)


def _job(options: argparse.Namespace) -> None:
    from megatron_eagle.cluster import supervisor

    budget = supervisor.Budget(options.failures, options.without_progress)
    run, stage, job = options.run_folder, options.stage, options.job
    if options.moment == "begin":
        verdict = supervisor.begin(
            run,
            stage,
            job=job,
            nodes=options.nodes,
            log=options.log,
            budget=budget,
            writes=not options.reads_only,
        )
        if verdict.action == "stop":
            print(f"megatron-eagle: not starting {stage} again: {verdict.reason}", file=sys.stderr, flush=True)
        print(verdict.action, verdict.start or "")
        return
    verdict = supervisor.end(
        run,
        stage,
        job=job,
        code=options.code,
        asked=options.asked,
        log=options.log,
        stacks=options.stacks,
        budget=budget,
        start=options.start,
    )
    print(f"megatron-eagle: {stage}: {verdict.action}: {verdict.reason}", file=sys.stderr, flush=True)
    print(verdict.action, ",".join(verdict.exclude))
