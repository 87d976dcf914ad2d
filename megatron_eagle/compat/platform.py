"""The one room that knows Megatron-Core also runs without a GPU.

With a GPU nothing is touched: NCCL and CUDA, as Megatron expects. Without one, Megatron-Core 0.16 has no CPU mode: it
writes ``device="cuda"``, ``torch.cuda.current_device()`` and ``"torch.cuda.FloatTensor"`` into its code. ``install``
makes those land on the CPU, under gloo, without editing a file of Megatron's:

- every ``megatron.core`` module gets a stand-in for its global name ``torch``. It answers like torch, except that the
  factories put tensors asked for on CUDA on the CPU and that ``torch.cuda`` is a CPU that is always in order. No other
  module sees it, so ``torch.zeros`` of ordinary code stays torch's own, at no cost;
- two methods of tensors, which have no such seam, ask who calls: ``Tensor.cuda()`` and ``Tensor.type()`` behave
  differently for callers inside ``megatron.core`` only;
- two random-state helpers and the Adam class, private names of Megatron's, are replaced by ours. That is why any other
  version of megatron-core is refused.

Modules imported before ``install`` are treated at once, later ones as they are imported: the order does not matter.
"""

import contextlib
import functools
import importlib.metadata
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_eagle.errors import UserError

MEGATRON_CORE_VERSION = "0.16.1"
_MEGATRON = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = (
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


@dataclass(frozen=True)
class Platform:
    """Where a process computes, and how processes talk.

    device: the device of this process.
    backend: torch.distributed backend for its collectives.
    redirected: (what Megatron asked for, "file.py:line" inside megatron/core) -> how often; filled while tracing on a
        CPU platform, always empty on CUDA.
    """

    device: torch.device
    backend: Literal["nccl", "gloo"]
    redirected: Counter[tuple[str, str]] = field(default_factory=Counter)

    def report(self) -> str:
        """One line per redirected call site, sorted."""
        return "\n".join(f"{count:8d}  {what:32s} {where}" for (what, where), count in sorted(self.redirected.items()))


def install(*, trace: bool = False, local_rank: int = 0) -> Platform:
    """Choose the platform of this process and, without CUDA, make Megatron-Core run on it. Calling it again is free.

    trace: count every redirected call in ``Platform.redirected`` (slower; for tests and for porting to a new version).
    local_rank: which of the host's GPUs this process uses.

    Raises UserError on a CPU if megatron-core is another version than the one whose private names are known.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl")
    redirection = next((finder for finder in sys.meta_path if isinstance(finder, _Redirection)), None)
    if redirection is None:
        version = importlib.metadata.version("megatron-core")
        if version != MEGATRON_CORE_VERSION:
            raise UserError(
                f"running without a GPU replaces private names of megatron-core {MEGATRON_CORE_VERSION}; "
                f"this installation has {version}"
            )
        redirection = _Redirection()
    redirection.trace = redirection.trace or trace
    return redirection.platform


class _Redirection(MetaPathFinder):
    """Stands first in ``sys.meta_path`` and treats each ``megatron.core`` module once its code has run."""

    def __init__(self) -> None:
        self.platform = Platform(_CPU, "gloo")
        self.trace = False
        self._torch = _stand_in(torch, {name: self._factory(getattr(torch, name)) for name in _FACTORIES})
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
        for name, replacement in _PRIVATE_NAMES.get(module.__name__, {}).items():
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


class FusedAdam(torch.optim.Optimizer):
    """Adam that keeps its step count in the parameter group, as apex's and Transformer Engine's FusedAdam do.

    Megatron's DistributedOptimizer writes and reads checkpoints by that contract; with torch's Adam (a step per
    parameter) they cannot be loaded. Arguments are those of ``apex.optimizers.FusedAdam`` that Megatron passes.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        if not bias_correction:
            raise ValueError(
                "this Adam always corrects the bias of its moments, bias_correction=False is not supported"
            )
        self._update = adamw if adam_w_mode else adam
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            group["step"] = int(group.get("step") or 0) + 1
            for parameter in parameters:
                if "exp_avg" not in self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            self._update(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in parameters],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


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


# Module -> private name -> what stands there without a GPU. Megatron's own random-state helpers queue their work until
# CUDA starts, which is never; the flags beside Adam tell the optimizers which checkpoint contract it follows.
_PRIVATE_NAMES: dict[str, dict[str, Any]] = {
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
