"""``megatron-eagle VERB``: the command line, one function a verb, each with --help and a worked example.

It only reads arguments, calls the package that does the work, and turns errors that are the user's to mend into one
line. Imports of torch and Megatron stay inside the verbs, so that --help answers at once.
"""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from megatron_eagle import __version__
from megatron_eagle.cli import (
    ask,
    bench,
    cancel,
    compare,
    completion,
    convert,
    curate,
    data,
    demo,
    doctor,
    evaluate,
    gpu_day,
    job,
    page,
    plan,
    recipe,
    runs,
    serve,
    status,
    submit,
    train,
    verify,
)
from megatron_eagle.cli.common import Parser, print_once
from megatron_eagle.cli.interrupts import interruptible
from megatron_eagle.config.schema import meant
from megatron_eagle.errors import LostContact, UserError
from megatron_eagle.progress import quiet, verbose

USER_ERROR = 2
# What these say is meant for the developers of the libraries, not for users of this: what will be removed one day, that
# there is no GPU. docs/decisions.md has what is done about it.
NOISY_MODULES = (r"megatron\.core", r"torch\.distributed", r"torch\.utils\.data")
NOISY_LOGGERS = (
    "megatron.core.dist_checkpointing.strategies",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.models.gpt.gpt_model",
    "torch.utils.cpp_extension",
)
VERBS = (
    data.add,
    curate.add,
    recipe.add,
    plan.add,
    bench.add,
    train.add,
    runs.add,
    compare.add,
    evaluate.add,
    verify.add,
    convert.add,
    ask.add,
    page.add,
    serve.add,
    demo.add,
    gpu_day.add,
    submit.add,
    status.add,
    cancel.add,
    doctor.add,
    job.add,
    completion.add,
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb; exits 0, 2 after a UserError (one line on stderr), 130 after Ctrl-C (``interrupts``)."""
    options = _parse(arguments)
    for module in NOISY_MODULES:
        warnings.filterwarnings("ignore", module=module)
    for logger in NOISY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        with interruptible(options), told(options):
            options.run(options)
    except UserError as error:
        print_once(f"megatron-eagle: {error}")
        sys.exit(USER_ERROR)
    except LostContact:  # already said, by every process that noticed
        sys.exit(1)
    sys.exit(0)


@contextmanager
def told(options: argparse.Namespace) -> Iterator[None]:
    """How much is to be shown, as --quiet and --verbose say."""
    with quiet(getattr(options, "quiet", False)), verbose(getattr(options, "verbose", False)):
        yield


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the verb; KEY=VALUE overrides may stand anywhere among the options, and so may the last argument of
    a verb that names it as ``late``: argparse takes one that may be left out only before the first option."""
    parser = command_line()
    options, rest = parser.parse_known_args(arguments)
    late = getattr(options, "late", None)
    if late and getattr(options, late) is None and len(rest) == 1 and not rest[0].startswith("-"):
        setattr(options, late, rest.pop())
    strange = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if strange or (rest and not hasattr(options, "overrides")):
        first = next(iter(strange), "").partition("=")[0]
        near = meant(first, _option_names(parser) - {first})
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}{near}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _option_names(parser: Parser) -> set[str]:
    """Of a parser and all its verbs."""
    names = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", parser.format_usage()))
    return names.union(*(_option_names(verb) for verb in parser.below.values()))


def command_line() -> Parser:
    """The parser of all verbs."""
    parser = Parser(
        prog="megatron-eagle",
        description="Trains Eagle 2 and Eagle 2.5 vision-language models on Megatron-Core.",
        epilog="'megatron-eagle VERB --help' explains a verb and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-eagle {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add in VERBS:
        add(verbs)
    return parser
