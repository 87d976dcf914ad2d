"""The state of Energon's loader as plain data: what ``save_state_rank`` returns, as JSON's types and back.

Energon hands out a tree of its own classes and leaves it to ``torch.save``, so restoring it means unpickling, which
runs whatever a file asks for. Here the tree is written as JSON, every class by its name, and read back by a list of the
few classes that may stand in it; nothing else is ever made. A value of any other type is refused when it is saved.

Leaned on, in ``megatron.energon``: that a state holds nothing but ``savable_loader.SavableDataLoaderState``,
``SavableDatasetCheckpoint`` and ``SavableDatasetState``, ``rng.SystemRngState``, ``state.FlexState`` and the
``SliceState`` of ``flavors.webdataset.sample_loader``, which are dataclasses or a dict, and Python's plain values.

JSON's own types stand for themselves; anything else is an object with one key, ``{"bytes": "aGk="}``.
"""

import base64
from dataclasses import fields
from typing import Any

import numpy
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

_PLAIN = (type(None), bool, int, float, str)
_MAPPINGS: dict[str, type] = {"dict": dict, "FlexState": FlexState}
_DATACLASSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SystemRngState, SliceState)
}
_NUMBERS = ("uint8", "uint32")  # of torch's and of numpy's random state


def encode_state(state: SavableDataLoaderState) -> Any:
    """``state`` as what ``json.dumps`` takes; TypeError, with the name, for a type that is not known here."""
    return _encode(state)


def decode_state(data: Any) -> SavableDataLoaderState:
    """The state that ``data``, parsed JSON from anywhere, stands for; ValueError if it stands for none."""
    try:
        state = _decode(data)
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"no state of Energon's loader: {type(error).__name__}: {error}") from None
    if not isinstance(state, SavableDataLoaderState):
        raise ValueError(f"no state of Energon's loader, but a {type(state).__name__}")
    return state


def _encode(value: Any) -> Any:
    kind = type(value)  # exactly: what a subclass adds would be lost
    name = kind.__name__
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_encode(item) for item in value]
    if kind is tuple:
        return {"tuple": [_encode(item) for item in value]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind is torch.Tensor:
        return {"Tensor": _encode(value.numpy())}
    if kind is numpy.ndarray and value.dtype.name in _NUMBERS and value.ndim == 1:
        return {"ndarray": [value.dtype.name, _encode(value.tobytes())]}
    if kind is _MAPPINGS.get(name) and all(type(key) is str for key in value):
        return {name: {key: _encode(item) for key, item in value.items()}}
    if kind is _DATACLASSES.get(name):
        return {name: {field.name: _encode(getattr(value, field.name)) for field in fields(kind)}}
    raise TypeError(f"Energon's state holds a {kind.__module__}.{kind.__qualname__}, which has no plain form here")


def _decode(data: Any) -> Any:
    if type(data) in _PLAIN:
        return data
    if type(data) is list:
        return [_decode(item) for item in data]
    ((name, content),) = data.items()
    if name == "tuple":
        return tuple(_decode(item) for item in content)
    if name == "bytes":
        return base64.b64decode(content, validate=True)
    if name == "Tensor":
        return torch.from_numpy(_decode(content))
    if name == "ndarray":
        return _array(*content)
    if name in _MAPPINGS:
        return _MAPPINGS[name]({key: _decode(item) for key, item in content.items()})
    if name in _DATACLASSES:
        return _DATACLASSES[name](**{key: _decode(item) for key, item in content.items()})
    raise ValueError(f"no state of Energon's loader: it names a {str(name)[:60]!r}")


def _array(dtype: str, content: Any) -> Any:
    if dtype not in _NUMBERS:
        raise ValueError(f"no state of Energon's loader: it names numbers of type {str(dtype)[:60]!r}")
    return numpy.frombuffer(bytearray(_decode(content)), dtype=dtype)
