"""``megatron-eagle serve``: an OpenAI-compatible endpoint for an exported model or a run."""

import argparse
import socket

from megatron_eagle.cli.common import Number, Verbs, add_model_arguments, open_answerer, positive_int, verb
from megatron_eagle.errors import UserError

port = Number(0, 65535, whole=True)
CONNECTIONS = 64  # at once, beside those whose questions wait in the queue


def add(verbs: Verbs) -> None:
    """Declare the verb and its arguments."""
    parser = verb(
        verbs,
        "serve",
        "an OpenAI-compatible endpoint for a model",
        "Serves /v1/models, /v1/chat/completions and /v1/files to this machine alone; one question after another, so\n"
        "it is for machines without a GPU and for trying. With a GPU, vllm serve is faster (docs/serving.md).\n"
        "Pictures come as data: URLs or uploads; other URLs are refused unless --allow-url covers them.",
        "  megatron-eagle serve runs/demo/export --port 8000\n",
    )
    add_model_arguments(parser)
    add_address_arguments(parser, default_port=8000)
    parser.add_argument(
        "--allow-url", action="append", default=[], metavar="PREFIX", help="fetch pictures from URLs below PREFIX"
    )
    parser.add_argument("--name", default=None, help="what the model is called (default: the folder's name)")
    parser.add_argument("--max-body", type=positive_int, default=64, metavar="MB", help="largest request (default: 64)")
    parser.add_argument("--max-images", type=positive_int, default=64, help="pictures of a request (default: 64)")
    parser.add_argument("--max-tiles", type=positive_int, default=512, help="tiles of a request (default: 512)")
    parser.set_defaults(run=_serve)


def add_address_arguments(parser: argparse.ArgumentParser, default_port: int) -> None:
    """Where is listened."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=port, default=default_port, help=f"port (default: {default_port}; 0: any)")


def _serve(options: argparse.Namespace) -> None:
    from megatron_eagle.serving.fetching import Fetcher, check_prefix
    from megatron_eagle.serving.limits import Limits

    prefixes = [check_prefix(prefix) for prefix in options.allow_url]
    limits = Limits(body_bytes=options.max_body << 20, images=options.max_images, tiles=options.max_tiles)
    try:
        import uvicorn

        from megatron_eagle.serving.endpoint import build_app
    except ImportError as error:
        raise UserError(f"serve needs the packages of the extra 'serve': {error}") from None
    from megatron_eagle.serving.borders import is_local
    from megatron_eagle.serving.worker import Worker

    with open_port(options.host, options.port) as listener:  # taken, it is said before the model is loaded
        answerer, _ = open_answerer(options, options.model, name=options.name, limits=limits)
        app = build_app(Worker(answerer, limits), Fetcher(prefixes, limits.body_bytes), local=is_local(options.host))
        print(f"{answerer.name}: {address_of(listener)}/v1", flush=True)
        connections = limits.waiting + CONNECTIONS
        config = uvicorn.Config(app, log_level="warning", limit_concurrency=connections)
        uvicorn.Server(config).run([listener])


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens there; UserError if the port is taken or the address is not this machine's."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


def address_of(listener: socket.socket) -> str:
    """http://HOST:PORT"""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
