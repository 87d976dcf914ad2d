"""Kinds of vision encoders: finding the one a recipe names, and checking the numbers it is given.

A kind is a folder (docs/encoders.md): ``megatron_eagle/model/encoders/<kind>/``, or the like in any installed package
that names it in the entry-point group ``megatron_eagle.encoders``. Both are found in every process of a job, which a
table filled by hand would not be; and since nothing but what is installed can be named, a checkpoint from elsewhere
cannot have a module of its choice imported.

Only a kind's numbers are loaded here, without torch and Megatron. Its other modules are loaded when they are asked for.
"""

import importlib.util
import pkgutil
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from megatron_eagle.config.findings import Refused, findings_of
from megatron_eagle.config.numbers import shown
from megatron_eagle.config.schema import meant
from megatron_eagle.errors import UserError

BUILT_IN = "megatron_eagle.model.encoders"
ENTRY_POINTS = "megatron_eagle.encoders"
# The modules of a kind's folder beside config.py, and what cannot be done without them.
PARTS = {
    "module": "be built",
    "hf_names": "be read from or written to Hugging Face checkpoints",
    "cost": "be planned",
    "reference": "be verified",
    "exported": "be computed by the code that an export carries",
}

KernelRole = Literal["shuffled", "appended"]


class EncoderConfig(Protocol):
    """The numbers of one encoder: a frozen pydantic dataclass, names of Hugging Face where there are any.

    output_tokens, output_channels: what one tile becomes. The checks raise ValueError with both numbers.

    kernel_role: how this project's kernels can take part, None if they cannot. Of the pixels that ``tile_prepare``
    makes, a ``shuffled`` encoder takes those of the tile's own size, in [-1, 1], and ``pixel_shuffle_concat`` shuffles
    its tokens; an ``appended`` one takes those resized to its ``image_size``, in CLIP's normalisation, and its features
    come behind them.

    One whose layers a stage may freeze or give rates of their own also has ``depth`` and ``layer_of``
    (``config.layers.Layered``).
    """

    kernel_role: ClassVar[KernelRole | None]

    @property
    def output_tokens(self) -> int: ...

    @property
    def output_channels(self) -> int: ...

    def check_tile_size(self, tile_size: int) -> None: ...

    def check_tensor_parallel(self, tp: int) -> None: ...


@dataclass(frozen=True)
class EncoderSpec:
    """One kind of encoder; the ``SPEC`` of its folder.

    kind: its name in recipes, and of its weights. title: its name in messages. config: class of its numbers.
    package: the folder as a dotted name.
    """

    kind: str
    title: str
    config: type
    package: str

    def __post_init__(self) -> None:
        if not self.kind.isidentifier():
            raise ValueError(f"'{self.kind}' cannot name an encoder: its weights are named after it")

    def has(self, name: str) -> bool:
        """Whether the folder has a module of this name."""
        return importlib.util.find_spec(f"{self.package}.{name}") is not None

    def part(self, name: str) -> ModuleType:
        """One module of the folder (``PARTS``); UserError if it does not exist."""
        module = f"{self.package}.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:  # it exists and lacks something itself
                raise
            raise UserError(f"encoder '{self.kind}' cannot {PARTS[name]}: there is no module {module}") from None


def encoder_kinds() -> list[str]:
    """All kinds that can be named here: those that come with this package, then those of installed packages."""
    return [*_built_in(), *sorted({entry.name for entry in _entry_points()} - set(_built_in()))]


@lru_cache
def encoder_spec(kind: str) -> EncoderSpec:
    """The encoder called ``kind``; ValueError if there is none, or more than one."""
    outside = [entry for entry in _entry_points() if entry.name == kind]
    places = [f"{BUILT_IN}.{kind}"] * (kind in _built_in()) + [entry.value for entry in outside]
    if not places:
        names = f"{', '.join(encoder_kinds())}{meant(kind, encoder_kinds())}"
        raise ValueError(f"encoder kind {shown(kind)} does not exist; there are {names}")
    if len(set(places)) > 1:
        raise ValueError(f"encoder kind '{kind}' exists {len(places)} times: {', '.join(places)}")
    found = outside[0].load() if outside else importlib.import_module(places[0]).SPEC
    if not isinstance(found, EncoderSpec) or found.kind != kind:
        raise ValueError(f"{places[0]}, which should be the encoder '{kind}', is {found!r}")
    return found


def encoder_config(settings: dict[str, Any]) -> EncoderConfig:
    """The checked numbers of one encoder, ``settings`` being its entry in the recipe; ValueError if they are wrong."""
    numbers = dict(settings)
    kind = numbers.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(f"an encoder needs its kind, got the keys {', '.join(settings) or 'none'}")
    try:
        return TypeAdapter(encoder_spec(kind).config).validate_python(numbers)
    except ValidationError as error:
        raise Refused(findings_of(error, encoder_spec(kind).config), f"encoder '{kind}'") from None


def _built_in() -> list[str]:
    folder = importlib.import_module(BUILT_IN).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if module.ispkg)


def _entry_points() -> list[EntryPoint]:
    return list(entry_points(group=ENTRY_POINTS))
