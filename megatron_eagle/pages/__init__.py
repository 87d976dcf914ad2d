"""How HTML pages of this project are made: one look, light and dark, on a wide screen and a narrow one.

A page is one file that links to nothing. Its template lies in the package that writes it and begins with
``{% extends "megatron_eagle.pages:base.html.j2" %}``; ``charts.html.j2`` has the macros of ``charts.py``.
"""

import base64
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_eagle.errors import UserError


def render(template: str, **values: Any) -> str:
    """The page of ``package:file.html.j2``. Values are escaped; one that the template lacks is an error."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        loader=jinja2.FunctionLoader(_source),
    )
    return environment.get_template(template).render(**values)


def write(page: str, out: Path) -> None:
    """Write a page, and the folders above it; UserError if the disk refuses it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error


def data_uri(kind: str, content: bytes) -> Markup:
    """``content`` of a media type as an address that holds it, so that a page is one file."""
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode()}")


def _source(template: str) -> str:
    package, file = template.split(":")
    return resources.files(package).joinpath(file).read_text("utf-8")
