"""A stand-in for Transformer Engine's compiled module, so that its Python half can be imported and its modules built.

Nothing can be computed with it: what is called says so. It holds for the whole process, so the tests of this folder
run in processes of their own.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

COMPILED = "transformer_engine_torch"


class _Kind(type):
    """A class, enum or function that has every member it is asked for; members are numbers, each another one."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(cls.__members__))
        return vars(cls)[name]

    @property
    def __members__(cls) -> dict[str, int]:  # Transformer Engine compares them with its own enums
        return {name: value for name, value in vars(cls).items() if not name.startswith("__")}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{COMPILED}.{cls.__name__} was called: the stub computes nothing")


class _Compiled(ModuleType):
    def __getattr__(self, name: str) -> _Kind:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Kind(name, (), {}))
        return vars(self)[name]


def install(folder: str | None) -> None:
    """Import ``transformer_engine`` over the stub, before anything else does.

    folder: where the package is, None if it is installed.
    """
    if folder:
        sys.path.append(folder)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine's way to be imported without CUDA's libraries
    compiled = sys.modules[COMPILED] = _Compiled(COMPILED)
    compiled.get_cudnn_version = lambda: 91500  # asked for when attention is built
    with warnings.catch_warnings(action="ignore"):  # that the compiled module is not there
        common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")


@contextmanager
def building() -> Iterator[None]:
    """Modules of Transformer Engine can be built inside: they refuse to be where there is no CUDA."""
    with mock.patch("torch.cuda.is_available", return_value=True), mock.patch("torch.cuda.Stream", mock.Mock):
        yield
