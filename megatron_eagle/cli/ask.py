"""``megatron-eagle ask``: a question about pictures and videos, or a file of them, to an exported model or a run."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli.common import (
    Verbs,
    add_model_arguments,
    add_sampling_arguments,
    open_answerer,
    positive_int,
    sampling_of,
    verb,
)
from megatron_eagle.errors import UserError

if TYPE_CHECKING:
    from megatron_eagle.serving.answerer import Answerer
    from megatron_eagle.serving.conversation import Options


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "ask",
        "ask a model about pictures and videos",
        "MODEL is an exported folder, or a checkpoint, a stage or a run, whose newest checkpoint is exported first.\n"
        'The answer is printed as it comes. --questions answers a JSONL file of {"question", "image", "video", "id",\n'
        '"system"}; given again, it goes on where it was.',
        "  megatron-eagle ask runs/demo/export --image chart.png 'Which bar is the tallest?'\n",
        progress=True,
    )
    add_model_arguments(parser)
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="what is asked about the pictures")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be given again")
    parser.add_argument("--video", type=Path, action="append", default=[], help="a video; may be given again")
    parser.add_argument("--system", default=None, help="system text (default: the one the model was trained with)")
    parser.add_argument(
        "--show", type=Path, default=None, metavar="PNG", help="draw how the pictures were cut into tiles"
    )
    parser.add_argument("--questions", type=Path, default=None, metavar="JSONL", help="a file of questions")
    parser.add_argument("--answers", type=Path, default=None, metavar="JSONL", help="where their answers go")
    parser.add_argument("--batch", type=positive_int, default=8, help="questions of a file at once (default: 8)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=512, help="longest answer (default: 512)")
    add_sampling_arguments(parser, seed="any")
    parser.set_defaults(run=_ask, late="question")


def _ask(options: argparse.Namespace) -> None:
    _check(options)
    from megatron_eagle.serving.conversation import Options
    from megatron_eagle.serving.limits import UNLIMITED

    drawn = Options(max_new_tokens=options.max_new_tokens, **sampling_of(options))
    answerer, folder = open_answerer(options, options.model, limits=UNLIMITED)
    if options.questions:
        _answer_file(options, answerer, drawn, folder)
    else:
        _answer_one(options, answerer, drawn)


def _check(options: argparse.Namespace) -> None:
    if (options.question is None) == (options.questions is None):
        raise UserError("ask needs a QUESTION or --questions, and not both")
    if (options.questions is None) != (options.answers is None):
        raise UserError("--questions and --answers belong together")
    if options.questions and (options.image or options.video or options.show):
        raise UserError(
            "--image, --video and --show belong to a QUESTION; the lines of --questions name their own files"
        )


def _answer_one(options: argparse.Namespace, answerer: "Answerer", drawn: "Options") -> None:
    import threading

    from megatron_eagle.serving.bulk import read_medium
    from megatron_eagle.serving.conversation import Event, Finished, question
    from megatron_eagle.serving.tile_picture import draw_tiles

    media = [read_medium("image", file) for file in options.image]
    media += [read_medium("video", file) for file in options.video]

    def say(event: Event) -> None:
        if isinstance(event, tuple) and options.show:
            try:
                draw_tiles(event).save(options.show)
            except (OSError, ValueError) as error:
                raise UserError(f"{options.show} cannot be written: {error}") from None
        elif isinstance(event, str):
            print(event, end="", flush=True)
        elif isinstance(event, Finished):
            print(flush=True)
            if event.reason == "length":
                print(f"(cut off after {event.answer_tokens} tokens: --max-new-tokens)", file=sys.stderr)

    answerer.answer(question(options.question, media, options.system), drawn, say, threading.Event())


def _answer_file(options: argparse.Namespace, answerer: "Answerer", drawn: "Options", folder: Path) -> None:
    from megatron_eagle.serving.bulk import answer_file
    from megatron_eagle.serving.model_folder import model_digest

    counts = answer_file(
        answerer,
        options.questions,
        options.answers,
        drawn,
        model=model_digest(folder),
        batch=options.batch,
        system=options.system,
    )
    known = f" ({counts.known} of them earlier)" if counts.known else ""
    print(f"{options.answers}: {counts.read} questions{known}, {counts.answered} answered, {counts.failed} failed")
