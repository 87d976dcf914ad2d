"""The encoders a mixture can be made of: ``kind: name`` in a recipe is the module ``name`` of this package.

A further encoder is one new file here and one line of recipe. The file holds

- ``Config``: a frozen pydantic dataclass (names of Hugging Face where there are any, unknown keys refused) with the
  properties ``output_tokens`` and ``output_channels`` (per tile) and two checks that raise ValueError with the numbers,
  ``check_tile_size(tile_size)`` and ``check_tensor_parallel(tp)``;
- ``Encoder(config, build)``: a MegatronModule from uint8 tiles [n, 3, s, s] to features [n, output_tokens,
  output_channels]. It owns its resize, its pixel normalisation and its downsampling, so that encoders can differ in all
  of them.
"""

import importlib
from typing import Any, Protocol

from megatron.core.transformer.module import MegatronModule
from pydantic import TypeAdapter, ValidationError

from megatron_eagle.model.build_context import BuildContext


class EncoderConfig(Protocol):
    """What the mixture and the checks need to know of any encoder's numbers."""

    @property
    def output_tokens(self) -> int: ...

    @property
    def output_channels(self) -> int: ...

    def check_tile_size(self, tile_size: int) -> None: ...

    def check_tensor_parallel(self, tp: int) -> None: ...


def encoder_config(settings: dict[str, Any]) -> EncoderConfig:
    """The checked numbers of one encoder, ``settings`` being its entry in the recipe; ValueError if they are wrong."""
    kind, numbers = _split(settings)
    try:
        return TypeAdapter(_module(kind).Config).validate_python(numbers)
    except ValidationError as error:
        found = (f"{'.'.join(map(str, item['loc'])) or kind}: {item['msg']}" for item in error.errors())
        raise ValueError(f"encoder '{kind}': {'; '.join(found)}") from None


def build_encoder(settings: dict[str, Any], build: BuildContext) -> MegatronModule:
    """The encoder of one recipe entry, with memory for its weights."""
    return _module(_split(settings)[0]).Encoder(encoder_config(settings), build)


def _split(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    numbers = dict(settings)
    kind = numbers.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(f"an encoder needs its kind, got the keys {', '.join(settings) or 'none'}")
    return kind, numbers


def _module(kind: str) -> Any:
    name = f"{__name__}.{kind}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # the encoder exists and lacks something itself
            raise
        raise ValueError(f"encoder kind '{kind}' does not exist: there is no module {name}") from None
