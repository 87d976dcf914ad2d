"""Megatron-Core without a GPU: what it asks of CUDA lands on the CPU, without editing a file of it.

Leaned on: Megatron-Core has no CPU mode; it writes ``device="cuda"``, ``torch.cuda.current_device()`` and
``"torch.cuda.FloatTensor"`` into its code, and there is no switch. ``redirect`` therefore does three things:

- every ``megatron.core`` module gets a stand-in for its global name ``torch``. It answers like torch, except that the
  factories put tensors asked for on CUDA on the CPU and that ``torch.cuda`` is a CPU that is always in order. No other
  module sees it, so ``torch.zeros`` of ordinary code stays torch's own, at no cost;
- two methods of tensors, which have no such seam, ask who calls: ``Tensor.cuda()`` and ``Tensor.type()`` behave
  differently for callers inside ``megatron.core`` only;
- the names in ``REPLACED`` become ours: two random-state helpers, the Adam class and the flags beside it, all private
  to Megatron. That is why only known versions of megatron-core are taken (``versions.py``).

Modules imported before ``redirect`` are treated at once, later ones as they are imported: the order does not matter.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from megatron_eagle.compat.adam import FusedAdam
from megatron_eagle.compat.platform import Platform

_MEGATRON = "megatron.core"
_CPU = torch.device("cpu")
FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


def redirect(*, trace: bool) -> Platform:
    """Make Megatron-Core of this process run on the CPU, once; trace: count what is redirected from now on."""
    redirection = next((finder for finder in sys.meta_path if isinstance(finder, Redirection)), None)
    if redirection is None:
        redirection = Redirection()
    redirection.trace = redirection.trace or trace
    return redirection.platform


class Redirection(MetaPathFinder):
    """Stands first in ``sys.meta_path`` and treats each ``megatron.core`` module once its code has run."""

    def __init__(self) -> None:
        self.platform = Platform(_CPU, "gloo")
        self.trace = False
        self._torch = _stand_in(torch, {name: self._factory(getattr(torch, name)) for name in FACTORIES})
        self._torch.cuda = _stand_in(torch.cuda, self._cuda())  # type: ignore[attr-defined]
        self._redirect_tensor_methods()
        for module in [module for name, module in sys.modules.items() if _inside_megatron(name)]:
            self._treat(module)
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if not _inside_megatron(fullname):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_treat(module: ModuleType) -> None:
                run(module)
                self._treat(module)

            spec.loader.exec_module = run_and_treat  # type: ignore[method-assign]
        return spec

    def _treat(self, module: ModuleType) -> None:
        if vars(module).get("torch") is torch:
            module.torch = self._torch  # type: ignore[attr-defined]
        for name, replacement in REPLACED.get(module.__name__, {}).items():
            if not hasattr(module, name):
                raise RuntimeError(f"{module.__name__} has no {name}, which running without a GPU replaces")
            setattr(module, name, replacement)

    def _note(self, what: str) -> None:
        """Count a redirected call; two frames up is the caller in megatron.core."""
        if self.trace:
            frame = sys._getframe(2)
            where = frame.f_code.co_filename.replace("\\", "/").rpartition("megatron/core/")[2]
            self.platform.redirected[what, f"{where}:{frame.f_lineno}"] += 1

    def _factory(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
            if str(kwargs.get("device")).startswith("cuda"):
                self._note(f"torch.{make.__name__}(device='cuda')")
                kwargs["device"] = _CPU
            return make(*args, **kwargs)

        return on_cpu

    def _cuda(self) -> dict[str, Any]:
        """What replaces names of ``torch.cuda``: one device, whose work is always done."""

        def answer(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def answered(*args: Any, **kwargs: Any) -> Any:
                self._note(f"torch.cuda.{name}()")
                return function(*args, **kwargs)

            return answered

        answers: dict[str, Callable[..., Any]] = {
            "current_device": lambda: _CPU,
            "get_rng_state": _get_rng_state,
            "set_rng_state": _set_rng_state,
            "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
            "stream": lambda stream: contextlib.nullcontext(),
        }
        answers |= dict.fromkeys(("synchronize", "empty_cache", "set_device"), lambda *args, **kwargs: None)
        answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *args: 0)
        answers |= dict.fromkeys(
            ("Stream", "Event", "current_stream", "default_stream"), lambda *args, **kwargs: _Done()
        )
        redirected = {name: answer(name, function) for name, function in answers.items()}
        return redirected | {"random": SimpleNamespace(get_rng_state=redirected["get_rng_state"])}

    def _redirect_tensor_methods(self) -> None:
        to_cuda, type_of = torch.Tensor.cuda, torch.Tensor.type

        @functools.wraps(to_cuda)
        def cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not _inside_megatron(sys._getframe(1).f_globals.get("__name__", "")):
                return to_cuda(tensor, *args, **kwargs)
            self._note("Tensor.cuda()")
            return tensor

        @functools.wraps(type_of)
        def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or not _inside_megatron(sys._getframe(1).f_globals.get("__name__", "")):
                return type_of(tensor, *args, **kwargs)
            self._note("Tensor.type()")  # the optimizers sort parameters by this string, also those without memory
            return type_of(tensor).replace("torch.", "torch.cuda.", 1).replace(".meta.", ".", 1)

        torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]
        torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


class _Done:
    """A CUDA stream or event on a CPU: everything asked of it has already happened."""

    def __getattr__(self, name: str) -> Callable[..., "_Done"]:
        return lambda *args, **kwargs: self


def _stand_in(module: ModuleType, replaced: dict[str, Any]) -> ModuleType:
    """A module that answers with ``replaced`` and, for every other name, with ``module``'s own."""
    stand_in = ModuleType(module.__name__)
    vars(stand_in).update(replaced, __getattr__=functools.partial(getattr, module))
    return stand_in


def _inside_megatron(name: str) -> bool:
    return name == _MEGATRON or name.startswith(_MEGATRON + ".")


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


# Module -> private name -> what stands there without a GPU. Megatron's own random-state helpers queue their work until
# CUDA starts, which is never; the flags beside Adam tell the optimizers which checkpoint contract it follows; its fuser
# is ``torch.compile``, whose import takes two seconds and 70 MB.
REPLACED: dict[str, dict[str, Any]] = {
    "megatron.core.jit": {"jit_fuser": _as_it_is},
    "megatron.core.tensor_parallel.random": {
        "_get_cuda_rng_state": _get_rng_state,
        "_set_cuda_rng_state": _set_rng_state,
    },
    "megatron.core.optimizer": {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False},
    "megatron.core.optimizer.distrib_optimizer": {
        "Adam": FusedAdam,
        "HAVE_APEX_OR_TE": True,
        "USING_APEX_OPTIMIZER": True,
    },
}
