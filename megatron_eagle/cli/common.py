"""What the verbs share: how one is declared, the arguments of everything that trains, starting processes."""

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from megatron_eagle.config.numbers import Range, shown
from megatron_eagle.config.schema import meant
from megatron_eagle.errors import UserError
from megatron_eagle.importing import importing
from megatron_eagle.text import folded

if TYPE_CHECKING:
    from megatron_eagle.compat.platform import Platform
    from megatron_eagle.serving.answerer import Answerer
    from megatron_eagle.serving.limits import Limits


# shtab.FILE, written out because every verb's --help would wait for the import.
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


class Parser(argparse.ArgumentParser):
    """Options are written out, and a wrong one is said in one line; those of the verbs are of this class as well.

    below: the parsers of its verbs. default_verb: that of them which is meant where none is named.
    """

    def __init__(self, **settings: Any) -> None:
        self.below: dict[str, Parser] = {}
        self.default_verb: str | None = None
        super().__init__(**{"allow_abbrev": False, **settings})

    def add_subparsers(self, **settings: Any) -> Any:
        """As argparse's; the parsers made of the result are ``below`` this one."""
        verbs = super().add_subparsers(**settings)
        self.below = verbs.choices
        return verbs

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As argparse's; a shell completes files where a path is meant (cli/completion.py)."""
        action = super().add_argument(*names, **settings)
        if action.type is Path:
            action.complete = FILES  # type: ignore[attr-defined] # where shtab looks for it
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with ``default_verb`` put before arguments that begin with none.

        A verb that does not exist ends with what was meant, or with those there are.
        """
        args = sys.argv[1:] if args is None else list(args)
        if self.default_verb is not None and args and args[0] not in (*self.below, "-h", "--help"):
            args = [self.default_verb, *args]
        if self.below and args and not args[0].startswith("-") and args[0] not in self.below:
            hint = meant(args[0], self.below) or f"; there are {', '.join(self.below)}"
            self.error(f"there is no verb {shown(args[0])}{hint}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with 2 after one line."""
        print_once(f"{self.prog}: {message} (see --help)")
        sys.exit(2)


class Number:
    """The ``type`` of an option that takes a number: what ``Range`` is given says which."""

    def __init__(self, low: float, high: float = math.inf, *, above: bool = False, whole: bool = False) -> None:
        self.range = Range(low, high, above=above, whole=whole)

    def __call__(self, text: str) -> int | float:
        """The number; argparse's own error with the range."""
        try:
            number = _read(text, whole=self.range.whole)
            if number is None:
                raise ValueError(self.range.refusal(text))
            return self.range(number)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


def _read(text: str, *, whole: bool) -> int | float | None:
    """The number that is written there; None if it is none, or one with a leading zero, where it should be whole."""
    if whole:
        return int(text) if re.fullmatch(r"[-+]?(0|[1-9](_?[0-9]){0,99})", text, re.ASCII) else None
    try:
        return float(text)
    except ValueError:
        return None


positive_int = Number(1, whole=True)
count = Number(0, whole=True)
tokens = Number(1, 1e9)  # of a sample
not_negative = Number(0)
fraction = Number(0, 1)
part = Number(0, 1, above=True)
seconds = Number(0, 1e7, above=True)  # four months; waiting longer overflows somewhere
minutes = Number(0, 1e5, above=True)


class Verbs(Protocol):
    """What ``ArgumentParser.add_subparsers`` returns; argparse has no public name for it."""

    def add_parser(self, name: str, **settings: Any) -> argparse.ArgumentParser: ...


def print_once(line: str) -> None:
    """Print to stderr from the first process only: every process of a job meets the same bad recipe."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def verb(
    verbs: Verbs, name: str, summary: str, text: str, example: str, *, progress: bool = False, details: str = ""
) -> argparse.ArgumentParser:
    """Declare a verb (or an action of one) with what it does and a worked example.

    progress: it shows how far it is, and has --quiet. details: what it shows with --verbose, if it has that
    (``cli.main`` obeys both).
    """
    parser = verbs.add_parser(
        name,
        help=summary,
        description=folded(re.sub(r"(?<!\n)\n(?![\s-])", " ", text), ""),
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    much = parser.add_mutually_exclusive_group() if details else parser  # argparse cannot show one that is empty
    if progress:
        much.add_argument("--quiet", action="store_true", help="do not show how far it is")
    if details:
        much.add_argument("--verbose", action="store_true", help=details)
    return parser


def add_recipe_arguments(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """RECIPE, KEY=VALUE overrides and the folder of the runs. needed: whether RECIPE is."""
    parser.add_argument(
        "recipe",
        type=Path,
        nargs=None if needed else "?",
        metavar="RECIPE",
        help="YAML file, or the name of one that comes along: eagle2-9b, tiny, ...",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values to change, e.g. layout.tp=2 stages.stage1.steps=10"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder that holds the run folders (default: runs)"
    )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """How the processes of a run are started and watched."""
    parser.add_argument(
        "--processes",
        type=positive_int,
        default=None,
        metavar="N",
        help="start N processes on this machine; without it this is one process, or one of torchrun's or srun's",
    )
    parser.add_argument(
        "--trace-platform", action="store_true", help="list what was redirected to run Megatron-Core without a GPU"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how it is loaded."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported folder, checkpoint, stage or run")
    parser.add_argument("--tokenizer", type=Path, default=None, help="of a checkpoint that does not carry its own")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--trust-code", action="store_true", help="run the code of MODEL even if it is not what this version exports"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, seed: str) -> None:
    """How tokens are drawn. seed: what stands for it by default, in words."""
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, help="0: the likeliest token each time (default: 0)"
    )
    parser.add_argument(
        "--top-p",
        type=part,
        default=None,
        metavar="P",
        help="with --temperature: draw from the likeliest tokens that together reach P (default: 1)",
    )
    parser.add_argument(
        "--seed", type=count, default=None, metavar="N", help=f"with --temperature: of the draws (default: {seed})"
    )


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """temperature, top_p and, if it is given, seed; raises UserError for what would be without effect."""
    given = {name: getattr(options, name) for name in ("top_p", "seed") if getattr(options, name) is not None}
    if given and not options.temperature:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is for a --temperature above 0: nothing is drawn")
    return {"temperature": float(options.temperature), **given}


def open_answerer(
    options: argparse.Namespace, model: Path, *, name: str | None = None, limits: "Limits | None" = None
) -> "tuple[Answerer, Path]":
    """The model of ``add_model_arguments`` ready to answer, and the exported folder that it was loaded from."""
    from megatron_eagle.serving.model_folder import exported_folder

    folder = exported_folder(model, print_once, tokenizer=options.tokenizer)
    with importing():
        from megatron_eagle.serving.loading import load_answerer

    answerer = load_answerer(
        folder, name=name or model.resolve().name, device=options.device, limits=limits, trust=options.trust_code
    )
    return answerer, folder


def open_platform(options: argparse.Namespace) -> "Platform":
    """The platform of this process; launchers say in LOCAL_RANK which of the host's GPUs is its own."""
    with importing():
        from megatron_eagle.compat.platform import install

    return install(trace=options.trace_platform, local_rank=int(os.environ.get("LOCAL_RANK", "0")))


def become_part_of_a_run(processes: int | None, *, saves: bool = False) -> None:
    """Return in a process that trains: one that a launcher started, or this one alone if ``processes`` is 1 or None.

    Otherwise start this very command ``processes`` times on this machine, wait, and exit with its code. saves: whether
    the processes save their work when they are asked to stop.
    """
    if "RANK" in os.environ:
        return
    from megatron_eagle.parallel.launch import launch, process_variables

    if processes is None or processes == 1:
        os.environ |= process_variables(rank=0, processes=1)
    else:
        sys.exit(launch(processes, sys.argv[1:], saves=saves))


def part_of(text: str) -> tuple[int, int]:
    """I/N."""
    number, _, parts = text.partition("/")
    if not (number and parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 3/16")
    return int(positive_int(number)), int(positive_int(parts))
