"""A new Eagle from its parts: a Qwen2.5, one or several vision encoders, and a fresh connector.

The parts keep their own tensor names and are joined into one ``TensorSource``, so that a new model goes through the
same conversion and the same proof as a released one. What is computed here:

- what an encoder needs otherwise at the new tile size, e.g. position embeddings of another grid (its ``hf_names.fit``);
- the embedding gets a row for each of the tokenizer's ids, up to the largest. Rows of added tokens in the *output*
  matrix are the mean of all others (NVlabs/Eagle does so); in an untied input embedding they keep what Qwen2.5 has
  there, and are the mean as well where it has no such row;
- the connector is drawn like any fresh weight (standard deviation fan_in^-1/2).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.config.encoders import encoder_config, encoder_spec
from megatron_eagle.config.model import EagleConfig, QwenConfig, encoder_configs, mixture_channels
from megatron_eagle.conversion.released import (
    Dialect,
    convertible_kinds,
    describe_encoder,
    find_encoders,
    qwen_config,
    read_config,
    tower_prefix,
)
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.conversion.tensors import Finite, TensorInfo, TensorSource
from megatron_eagle.conversion.tokenizer_files import Vocabulary
from megatron_eagle.errors import UserError
from megatron_eagle.model.encoders import encoder_hf_names

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class Assembled:
    """Tensors under the names of a released Eagle, read from several sources or computed when asked for."""

    def __init__(self) -> None:
        self.encoder_sources: list[Path] = []  # in the order of channels
        self.left_out: dict[str, str] = {}  # name in its source -> why it is not part of the new model
        self._infos: dict[str, TensorInfo] = {}
        self._make: dict[str, Callable[[], Tensor]] = {}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        return self._make[name]()

    def drop(self, name: str, reason: str) -> None:
        del self._infos[name], self._make[name]
        self.left_out[name] = reason

    def replace(self, name: str, info: TensorInfo, change: Callable[[Tensor], Tensor]) -> None:
        """Give a tensor that is there already another shape, made by ``change`` when it is read."""
        make = self._make[name]
        self.add(name, info, lambda: change(make()))

    def add(self, name: str, info: TensorInfo, make: Callable[[], Tensor]) -> None:
        self._infos[name], self._make[name] = info, make

    def take(self, source: TensorSource, old: str, new: str) -> None:
        """All tensors of ``source`` whose name starts with ``old``, under names that start with ``new``."""
        for name, info in source.infos.items():
            if name.startswith(old):
                self.add(new + name.removeprefix(old), info, partial(source.read, name))
            else:
                self.left_out[name] = f"not below {old!r}: another part of a model of which only this one is taken"


def assemble(
    parts: Sequence[Path], vocabulary: Vocabulary, *, tile_size: int, seed: int
) -> tuple[Assembled, EagleConfig, Dialect]:
    """The new model's tensors, its numbers, and how they are named; ``parts`` in any order."""
    sources = {path: Finite(SafetensorsFolder(path)) for path in parts}
    made = Assembled()
    qwen = _one(sources, _is_qwen, "a Qwen2.5 (model.embed_tokens.weight without an encoder)")
    language = _add_language(made, qwen, sources[qwen], vocabulary)
    encoders: list[dict[str, Any]] = []
    prefixes: list[str] = []
    used = {qwen}
    for kind in convertible_kinds():
        having = [path for path in parts if path != qwen and _prefixes(sources[path], kind)]
        title = encoder_spec(kind).title
        if len(having) > 1:
            raise UserError(f"{len(having)} of the sources have {title}: {', '.join(map(str, having))}")
        if not having:
            continue
        used.add(having[0])
        source = sources[having[0]]
        old = _prefixes(source, kind)
        if len(old) > 1:
            raise UserError(f"{having[0]} has {title} {len(old)} times: at {', '.join(old)}")
        prefixes.append(tower_prefix(len(prefixes), kind))
        made.take(source, old[0], prefixes[-1])
        settings = describe_encoder(kind, made.infos, prefixes[-1], _vision_config(having[0]), str(having[0]))
        made.encoder_sources.append(having[0])
        encoders.append(_fit(made, prefixes[-1], settings, tile_size))
    titles = [encoder_spec(kind).title for kind in convertible_kinds()]
    if not encoders:
        raise UserError(f"none of the sources holds {', '.join(titles[:-1])} or {titles[-1]}")
    if left := [path for path in parts if path not in used]:
        raise UserError(f"{', '.join(map(str, left))} holds none of: {', '.join(titles)}")
    config = EagleConfig(tile_size=tile_size, encoders=tuple(encoders), language=language)
    tokens = {encoder.output_tokens for encoder in encoder_configs(config)}
    if len(tokens) > 1:
        raise UserError(
            f"the encoders give {sorted(tokens)} tokens per tile; they are joined by channel, so as many each"
        )
    _add_connector(made, config, made.infos["language_model.model.norm.weight"].dtype, seed)
    scale = "gamma" if any(name.endswith(".gamma") for name in made.infos) else "weight"
    return made, config, Dialect("A", tuple(prefixes), layer_scale=scale)


def _prefixes(source: TensorSource, kind: str) -> list[str]:
    return encoder_hf_names(kind).find(_vision_names(source))


def _vision_names(source: TensorSource) -> dict[str, TensorInfo]:
    """Names outside a text tower, which contrastive models have beside the vision tower."""
    return {name: info for name, info in source.infos.items() if "text" not in name.split(".")[0]}


def _is_qwen(source: TensorSource) -> bool:
    return _EMBEDDING in source.infos and not find_encoders(_vision_names(source))


def _one(sources: Mapping[Path, TensorSource], fits: Callable[[TensorSource], bool], what: str) -> Path:
    found = [path for path, source in sources.items() if fits(source)]
    if len(found) != 1:
        raise UserError(f"exactly one source must be {what}, {len(found)} of {len(sources)} are")
    return found[0]


def _vision_config(path: Path) -> dict[str, Any] | None:
    """What the config.json of a folder, or beside a single file, says of its encoder; None if there is none.

    A model of several parts that leaves its ``vision_config`` out has transformers' own for models of its type.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        return None
    config = read_config(folder)
    if isinstance(config.get("vision_config"), dict):
        return config["vision_config"]
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    usual = getattr(CONFIG_MAPPING[kind](), "vision_config", None) if kind in CONFIG_MAPPING else None
    return config if usual is None or kind == "siglip" else usual.to_dict()


def _add_language(made: Assembled, path: Path, source: TensorSource, vocabulary: Vocabulary) -> QwenConfig:
    made.take(source, "", "language_model.")
    config = read_config(path)
    before = qwen_config(source.infos, "", config, str(path))
    for name, is_output in ((_EMBEDDING, before.tie_word_embeddings), (_OUTPUT, True)):
        if name in source.infos:
            info = source.infos[name]
            change = partial(resize_rows, rows=vocabulary.rows, added=vocabulary.added, all_are_new=is_output)
            made.replace(f"language_model.{name}", TensorInfo((vocabulary.rows, info.shape[1]), info.dtype), change)
    if before.tie_word_embeddings and _OUTPUT in source.infos:
        made.drop(f"language_model.{_OUTPUT}", "the output matrix is the embedding")
    return QwenConfig(**{**vars(before), "vocab_size": vocabulary.rows})


def resize_rows(old: Tensor, rows: int, added: Sequence[int], all_are_new: bool) -> Tensor:
    """A matrix of a vocabulary with other ``rows``: those that are new are the mean of the old ones.

    added: ids of tokens that were added, whose rows do not count in the mean. all_are_new: they are the mean as well
    where ``old`` has rows of these ids already.
    """
    new_ids = torch.tensor(added, dtype=torch.int64)
    kept = torch.ones(min(len(old), rows), dtype=torch.bool)
    kept[new_ids[new_ids < len(kept)]] = False
    total = torch.zeros(old.shape[1], dtype=torch.float64)
    for block, keep in zip(
        old[: len(kept)].split(8192), kept.split(8192), strict=True
    ):  # float64 takes four times as much
        total += block[keep].double().sum(0)
    mean = (total / int(kept.sum())).to(old.dtype)
    new = mean.expand(rows, -1).clone()
    new[: len(kept)] = old[: len(kept)]
    if all_are_new:
        new[new_ids] = mean
    return new


def _fit(made: Assembled, prefix: str, settings: dict[str, Any], tile_size: int) -> dict[str, Any]:
    """An encoder's settings at ``tile_size``, and those of its tensors changed that this changes."""
    numbers, changes = encoder_hf_names(settings["kind"]).fit(made.infos, prefix, settings, tile_size)
    try:
        encoder_config(numbers).check_tile_size(tile_size)
    except ValueError as error:
        raise UserError(
            f"{encoder_spec(settings['kind']).title} cannot see tiles of {tile_size} pixels: {error}"
        ) from None
    for name, (shape, change) in changes.items():
        made.replace(name, TensorInfo(shape, made.infos[name].dtype), change)
    return numbers


def _add_connector(made: Assembled, config: EagleConfig, dtype: torch.dtype, seed: int) -> None:
    width, hidden = mixture_channels(config), config.language.hidden_size
    for name, shape in {
        "0.weight": (width,),
        "0.bias": (width,),
        "1.weight": (hidden, width),
        "1.bias": (hidden,),
        "3.weight": (hidden, hidden),
        "3.bias": (hidden,),
    }.items():
        made.add(f"mlp1.{name}", TensorInfo(shape, dtype), partial(_fresh, f"mlp1.{name}", shape, dtype, seed))


def _fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=dtype)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(dtype)
