"""An lmms-eval task over local Parquet files, as far as it is data: where the rows are and how they are asked.

``!function`` names code beside the task. It is not run here: such a part is asked in the benchmark's own words, which
is said; ``lmms_eval --model megatron_eagle`` runs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import yaml

from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class Function:
    """The name behind ``!function``."""

    name: str


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: Function(str(node.value)))


@dataclass(frozen=True)
class Task:
    """files: of the split that is tested. text, target: a column, a template, or None for the benchmark's own way."""

    files: tuple[Path, ...]
    text: str | None
    target: str | None
    left_out: tuple[str, ...]


def read_task(path: Path) -> Task:
    """The task in ``path``; raises UserError if its rows are not in local Parquet files."""
    settings = _settings(path)
    if settings.get("dataset_path") != "parquet":
        raise UserError(
            f"{path}: dataset_path is {settings.get('dataset_path')!r}; only tasks over "
            "local files, 'parquet', are read"
        )
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    split = settings.get("test_split")
    if isinstance(files, Mapping):
        files = files.get(split)
    names = [files] if isinstance(files, str) else files
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: dataset_kwargs has no data_files of the test_split {split!r}")
    parts = {
        name: settings.get(name) for name in ("doc_to_text", "doc_to_target", "process_results", "doc_to_messages")
    }
    functions = tuple(f"{name} ({value.name})" for name, value in parts.items() if isinstance(value, Function))
    return Task(
        tuple(_found(path, name) for name in names),
        _words(parts["doc_to_text"]),
        _words(parts["doc_to_target"]),
        functions,
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        read = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506, it is a safe loader
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a task: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(read, dict):
        raise UserError(f"{path}: a task is a mapping, this is a {type(read).__name__}")
    if isinstance(included := read.pop("include", None), str):
        return {**_settings(path.parent / included), **read}
    return read


def _found(task: Path, name: str) -> Path:
    """The file as lmms-eval finds it, from the current folder, or beside the task."""
    for file in (Path(name), task.parent / name):
        if file.is_file():
            return file
    raise UserError(f"{task}: no file {name}, from here or beside the task")


def _words(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def render(words: str, fields: Mapping[str, Any]) -> Any:
    """What a column's name or a template says of a row; raises ValueError if it cannot."""
    if words in fields:
        return fields[words]
    environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(words).render(**fields)
    except jinja2.TemplateError as error:
        raise ValueError(f"the task's {words[:60]!r} cannot be written: {error}") from None
