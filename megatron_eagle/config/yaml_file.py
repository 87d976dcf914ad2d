"""Reading YAML so that a file means what it says: the one loader of recipes, overrides and profiles.

PyYAML's SafeLoader follows YAML 1.1, which takes ``010`` for 8, ``1:30`` for 90, ``no`` for false and a date for no
text, and of a key that is given twice it keeps the last. Here these stay texts, which a number's type then refuses, and
a repeated key is an error. All else is read as PyYAML reads it, merge keys and anchors included; nothing becomes a
number that is a text for PyYAML, so what it writes is read back.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_eagle.config.numbers import shown
from megatron_eagle.errors import UserError

_TAG = "tag:yaml.org,2002:"
_KEY_OF_MERGE = "<<"
_DEEPEST, _LARGEST = 40, 100_000


class YamlError(ValueError):
    """What is wrong with a text that should be YAML, in one line without the name of the file."""


class _Loader(yaml.SafeLoader):
    """Plain data only: mappings with texts for keys, lists, texts, numbers, flags and nothing."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  filled below
    yaml_constructors = {  # noqa: RUF012  the class's own, as PyYAML wants it
        tag and _TAG + tag: yaml.SafeLoader.yaml_constructors[tag and _TAG + tag]
        for tag in ("null", "bool", "int", "float", "str", "seq", "map", None)
    }

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """As PyYAML's, but a scalar whose tag is written out (``!!int 010``) must be what its tag says."""
        plain = isinstance(node, ScalarNode) and self.resolve(ScalarNode, node.value, (True, False))
        if plain and plain != node.tag and node.tag in (f"{_TAG}{tag}" for tag in ("null", "bool", "int", "float")):
            raise YamlError(f"{_line(node)}: {shown(node.value)} is no {node.tag.removeprefix(_TAG)}")
        return super().construct_object(node, deep)


for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9](_?[0-9])*|0x[0-9a-fA-F]+|0b[01]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", _KEY_OF_MERGE, "<"),
):
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_form})$"), list(_first))


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """The mapping that the file holds; UserError says what is wrong with it. kind: what messages call it."""
    try:
        raw = parse_yaml(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
    except YamlError as error:
        raise UserError(f"{path}: {error}") from None
    if raw is None:
        raise UserError(f"{path} is empty; a {kind} is a mapping of keys")
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of keys, it holds a {type(raw).__name__}")
    return raw


def parse_yaml(text: str) -> Any:
    """One document as plain data, nothing in it shared; YamlError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check().look(node, ())
        return _apart(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        words = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        tabs = " (indent with spaces)" if r"'\t'" in words else ""
        raise YamlError(f"not YAML: {place}{words[:150]}{tabs}") from None
    except yaml.YAMLError as error:
        raise YamlError(f"not YAML: {' '.join(str(error).split())[:150]}") from None
    except (RecursionError, ValueError, OverflowError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"not YAML: {' '.join(str(error).split())[:150]}") from None


def _apart(value: Any) -> Any:
    """A copy in which nothing is shared, as aliases are: an override changes one place only."""
    if isinstance(value, dict):
        return {key: _apart(part) for key, part in value.items()}
    return [_apart(part) for part in value] if isinstance(value, list) else value


def _line(node: Node) -> str:
    return f"line {node.start_mark.line + 1}"


@dataclass
class _Check:
    """Looks at a document before anything is made of it. values: how many there were, aliases written out."""

    values: int = 0

    def look(self, node: Node, where: tuple[str, ...], above: tuple[Node, ...] = ()) -> None:
        """where: the keys above ``node``; above: the nodes."""
        self.values += 1
        if node in above:
            raise YamlError(f"{_line(node)}: {'.'.join(where)} is an alias of what it is in")
        if len(above) > _DEEPEST:
            raise YamlError(f"{_line(node)}: nested more than {_DEEPEST} deep")
        if self.values > _LARGEST:
            raise YamlError(f"{_line(node)}: more than {_LARGEST} values, aliases written out")
        if isinstance(node, MappingNode):
            self._keys(node, where)
            for key, value in node.value:
                self.look(value, where if key.value == _KEY_OF_MERGE else (*where, key.value), (*above, node))
        elif isinstance(node, SequenceNode):
            for number, item in enumerate(node.value):
                self.look(item, (*where, _name(item) or str(number)), (*above, node))
        elif re.search("[\0\ud800-\udfff]", node.value):
            raise YamlError(f"{_line(node)}: {shown(node.value)} cannot be written to a file")

    def _keys(self, node: MappingNode, where: tuple[str, ...]) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                written = shown(key.value) if isinstance(key, ScalarNode) else f"a {key.id}"
                raise YamlError(f"{_line(key)}: the key {written} is no text: put it in quotes")
            line = key.start_mark.line + 1
            if key.value in lines:
                path = ".".join(part[:40] for part in (*where, key.value))
                raise YamlError(f"{path} is given twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line


def _name(item: Node) -> str | None:
    """What a mapping of a list is called by its ``name``."""
    if isinstance(item, MappingNode):
        for key, value in item.value:
            if key.value == "name" and isinstance(value, ScalarNode):
                return str(value.value)
    return None
