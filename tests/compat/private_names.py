"""Finds private names of other libraries in a source file, by its syntax and, for base classes, by the library itself.

A private name begins with one underscore. It is another library's if it is reached through something imported from
there, if a class derived from one of its classes overrides or uses it, or if no file of ours defines it. So the search
can miss a private name that is also one of ours, on an object whose class cannot be read off the source.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

# Documented in spite of their names.
DOCUMENTED = {"os._exit", "sys._getframe"}
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@dataclass
class Source:
    """One file. foreign, ours: what its imports bind, by the local name; classes: those it defines."""

    path: Path
    nodes: list[ast.AST]
    foreign: dict[str, str] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)

    @staticmethod
    def of(path: Path, text: str, own_packages: Iterable[str]) -> "Source":
        source = Source(path, list(ast.walk(ast.parse(text))))
        for node in source.nodes:
            bound: dict[str, str] = {}
            if isinstance(node, ast.Import):
                bound = {
                    n.asname or n.name.partition(".")[0]: n.name if n.asname else n.name.partition(".")[0]
                    for n in node.names
                }
            elif isinstance(node, ast.ImportFrom):
                bound = {n.asname or n.name: f"{node.module}.{n.name}" for n in node.names}
            elif isinstance(node, ast.ClassDef):
                source.classes[node.name] = node
            for name, target in bound.items():
                kind = source.ours if target.partition(".")[0] in own_packages else source.foreign
                kind[name] = target
        return source

    def dotted(self, node: ast.expr) -> str | None:
        """``torch.nn.Module`` for an expression that names something imported from elsewhere, None for any other."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.foreign:
            return None
        return ".".join([self.foreign[node.id], *reversed(names)])


def own_names(sources: Iterable[Source]) -> set[str]:
    """Every private name that one of ``sources`` defines: functions, classes, variables, attributes of ``self``."""
    found: set[str] = set()
    for source in sources:
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                found.add(node.attr)
    return {name for name in found if is_private(name)}


def findings(source: Source, own: set[str], all_sources: Iterable[Source]) -> Iterator[tuple[int, str]]:
    """(line, what) of every private name of another library in ``source``."""
    for node in source.nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in _imported(node, source))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            path = source.dotted(node)
            if path not in DOCUMENTED and (path or node.attr not in own):
                yield node.lineno, path or ast.unparse(node)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, name) for name in _by_name(node, source, own))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "._" in node.value:
            yield from ((node.lineno, name) for name in _in_text(node.value, source))
    classes = {name: (each, node) for each in all_sources for name, node in each.classes.items()}
    for node in source.classes.values():
        yield from _on_bases(node, source, classes)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _imported(node: ast.Import | ast.ImportFrom, source: Source) -> Iterator[str]:
    foreign = set(source.foreign.values())
    for name in node.names:
        path = f"{node.module}.{name.name}" if isinstance(node, ast.ImportFrom) else name.name
        known = path in foreign or path.partition(".")[0] in foreign
        if known and any(map(is_private, path.split("."))) and path not in DOCUMENTED:
            yield path


def _by_name(call: ast.Call, source: Source, own: set[str]) -> Iterator[str]:
    """getattr(x, "_name"), monkeypatch.setattr(x, "_name", ...) and their like."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name not in BY_NAME or len(call.args) < 2 or not isinstance(call.args[1], ast.Constant):
        return
    attribute = call.args[1].value
    if isinstance(attribute, str) and is_private(attribute):
        path = source.dotted(call.args[0])
        if path or attribute not in own:
            yield f"{path or ast.unparse(call.args[0])}.{attribute}"


def _in_text(text: str, source: Source) -> Iterator[str]:
    """Annotations in quotes."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and (path := source.dotted(node)):
            yield path


def _on_bases(
    node: ast.ClassDef, source: Source, classes: dict[str, tuple[Source, ast.ClassDef]]
) -> Iterator[tuple[int, str]]:
    used = _names_of_self(node)
    for base in _foreign_bases(node, source, classes):
        private = _private_names_of(base) if used else set()
        yield from ((line, f"{base}.{name}") for name, line in sorted(used.items()) if name in private)


def _names_of_self(node: ast.ClassDef) -> dict[str, int]:
    """Private names that a class defines or uses of itself, with a line."""
    found: dict[str, int] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef) and inner in node.body:
            found[inner.name] = inner.lineno
        elif isinstance(inner, ast.Assign | ast.AnnAssign) and inner in node.body:
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            found |= {target.id: inner.lineno for target in targets if isinstance(target, ast.Name)}
        elif isinstance(inner, ast.Attribute) and (_is_self(inner.value) or ast.unparse(inner.value) == "super()"):
            found[inner.attr] = inner.lineno
    return {name: line for name, line in found.items() if is_private(name)}


def _foreign_bases(
    node: ast.ClassDef, source: Source, classes: dict[str, tuple[Source, ast.ClassDef]]
) -> Iterator[str]:
    """Classes of other libraries that a class derives from, directly or through classes of ours."""
    for base in node.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        if path := source.dotted(base):
            yield path
        elif isinstance(base, ast.Name) and base.id in classes and base.id != node.name:
            where, parent = classes[base.id]
            yield from _foreign_bases(parent, where, classes)


@lru_cache
def _private_names_of(path: str) -> frozenset[str]:
    """Every private name that the class ``path`` or one above it defines, its instances' attributes included."""
    found: set[str] = set()
    for above in getattr(_load(path), "__mro__", ()):
        if above.__module__ == "builtins":
            continue
        found |= set(vars(above)) | set(vars(above).get("__annotations__", {}))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(above)))
        except (OSError, TypeError, SyntaxError):  # written in C, or made by a decorator
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                found.add(node.attr)
    return frozenset(filter(is_private, found))


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        return importlib.import_module(path)
    try:
        return getattr(_load(module), name)
    except AttributeError:
        return importlib.import_module(path)
