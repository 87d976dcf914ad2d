"""``megatron-eagle page``: a page to ask one model or two side by side."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.cli.common import Verbs, add_model_arguments, not_negative, open_answerer, positive_int, verb
from megatron_eagle.cli.serve import CONNECTIONS, add_address_arguments, address_of, open_port
from megatron_eagle.errors import UserError

if TYPE_CHECKING:
    from megatron_eagle.serving.conversation import Options


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "page",
        "a page to ask a model, or two side by side",
        "Opens no browser: it prints its address. Pictures and videos are dropped into the page; it shows the tiles\n"
        "that the model saw and the answer as it comes. Nothing leaves this machine. Needs the extra 'serve'.",
        "  megatron-eagle page runs/demo/checkpoints/stage1 runs/demo/checkpoints/stage2\n",
    )
    add_model_arguments(parser)
    parser.add_argument("second", type=Path, nargs="?", metavar="MODEL2", help="another model, beside the first")
    add_address_arguments(parser, default_port=7860)
    parser.add_argument("--max-new-tokens", type=positive_int, default=512, help="longest answer (default: 512)")
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, help="0: the likeliest token each time (default: 0)"
    )
    parser.set_defaults(run=_page, late="second")


def _page(options: argparse.Namespace) -> None:
    from megatron_eagle.serving.conversation import Options

    drawn = Options(max_new_tokens=options.max_new_tokens, temperature=float(options.temperature))
    with tempfile.TemporaryDirectory(prefix="megatron-eagle-page-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # the only folder whose files it reads
        _run(options, drawn)


def _run(options: argparse.Namespace, drawn: "Options") -> None:
    try:
        import uvicorn

        from megatron_eagle.serving.page import build_page
    except ImportError as error:
        raise UserError(f"page needs the packages of the extra 'serve': {error}") from None
    from megatron_eagle.serving.borders import is_local
    from megatron_eagle.serving.limits import Limits
    from megatron_eagle.serving.worker import Worker

    models = [Path(model) for model in (options.model, options.second) if model]
    limits = Limits()
    with open_port(options.host, options.port) as listener:  # taken, it is said before a model is loaded
        workers = [Worker(open_answerer(options, model)[0], limits) for model in models]
        app = build_page(workers, drawn, local=is_local(options.host))
        print(address_of(listener), flush=True)
        connections = limits.waiting + CONNECTIONS
        uvicorn.Server(uvicorn.Config(app, log_level="warning", limit_concurrency=connections)).run([listener])
