"""The reference every layout is held against: one process, plain PyTorch, float64, each sample run on its own.

It is put together from transformers' modules and has nothing of Megatron, of packing or of parallelism in it, so that a
mistake in those cannot be in both. float64 leaves all rounding to the side that is being checked.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_eagle.config.encoders import EncoderConfig
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import EagleConfig, encoder_configs, encoder_names, mixture_channels
from megatron_eagle.config.recipe import OptimizerSettings
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.errors import UserError
from megatron_eagle.model import hf_names
from megatron_eagle.model.encoders import EncoderReference, encoder_hf_names, encoder_reference
from megatron_eagle.verification.finetuning import noise_by_hand, rate_by_hand


@dataclass(frozen=True)
class Published:
    """What transformers' config classes are to read of a model that others published, instead of our reading of it.

    language: a Qwen2.5's config.json, or that part of an Eagle's. encoders: folder of each one's config.json; None
    where there is none to read.
    """

    language: Mapping[str, Any]
    encoders: tuple[Path | None, ...]


class ReferenceEagle(nn.Module):
    """An Eagle of transformers' modules; random weights drawn from ``seed``.

    Biases, norms and layer scales are drawn too, so that no parameter can be mixed up with another unseen.
    published: where the model's config.json lies; None takes all numbers from ``config``. dtype, attention: those that
    transformers runs with; the reference is what the defaults make it, others are for holding speeds side by side.
    """

    def __init__(
        self,
        config: EagleConfig,
        seed: int,
        published: Published | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        attention: str = "eager",
    ) -> None:
        super().__init__()
        self.config = config
        numbers = encoder_configs(config)
        parts = [encoder_reference(settings) for settings in config.encoders]
        self._parts = list(zip(parts, numbers, strict=True))
        folders = published.encoders if published else (None,) * len(parts)
        pairs = zip(self._parts, folders, strict=True)
        self.encoders = nn.ModuleList([_build_encoder(part, own, folder) for (part, own), folder in pairs])
        width, hidden = mixture_channels(config), config.language.hidden_size
        norm = nn.LayerNorm(width, eps=config.connector_layer_norm_eps)
        self.mlp1 = nn.Sequential(norm, nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.language = _build_language(config, published.language if published else None, attention)
        self.to(dtype)
        _draw(self, seed)

    def forward(
        self, tokens: Tensor, tiles: Tensor, slots: Tensor, noise: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Logits [n, vocab] of one sample: tokens [n], its tiles, and each tile's first position.

        noise: what is added to the text's embeddings [n, d].
        """
        embeddings = F.embedding(tokens, self.get_parameter("language.model.embed_tokens.weight"))
        if noise:
            embeddings = embeddings + noise(embeddings)
        if len(tiles):
            features = self.visual(tiles)
            places = (slots[:, None] + torch.arange(features.shape[1])).flatten()
            embeddings = embeddings.index_copy(0, places, features.flatten(0, 1))
        return self.language(inputs_embeds=embeddings[None]).logits[0]

    def visual(self, tiles: Tensor) -> Tensor:
        """Embeddings [n, tokens, hidden_size] of tiles: all encoders' features joined by channel, and the connector."""
        pixels = tiles.to(self.get_parameter("mlp1.1.weight").dtype) / 255
        pairs = zip(self._parts, self.encoders, strict=True)
        features = [part.features(numbers, module, pixels) for (part, numbers), module in pairs]
        return cast(Tensor, self.mlp1(torch.cat(features, dim=-1)))

    def add_adapters(self, lora: LoraSettings, seed: int) -> None:
        """Put PEFT's adapters on the layers that ``lora`` wants; drawn from ``seed``, B too, so that A has a gradient.

        Raises UserError where PEFT is not installed.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UserError("adapters are held against PEFT, which is not installed: pip install '.[lora]'") from None
        adapters = hf_names.adapter_sources(self.sources(), lora)
        layers = [
            name.removesuffix(".lora_A.weight")
            for ours, source in adapters.items()
            for name in source.names
            if ours.endswith("lora_a")
        ]
        rank, alpha = lora.rank, lora.alpha
        settings = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=lora.rslora, target_modules=layers)  # type: ignore[arg-type]
        inject_adapter_in_model(settings, self)
        self.to(torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if ".lora_" in name:  # B small, as in training: a large one makes float32's rounding large, too
                    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    size = 0.1 if ".lora_B." in name else 1.0
                    parameter.copy_(drawn * size * parameter.shape[1] ** -0.5)

    def sources(self) -> hf_names.HfNames:
        """Where each of Megatron's parameters comes from in this module's state dict, ``plain_name`` given."""
        sources = hf_names.qwen_sources(self.config.language, "language.") | hf_names.connector_sources("mlp1.")
        encoders = zip(self.config.encoders, self._parts, encoder_names(self.config), strict=True)
        for number, (settings, (_, numbers), name) in enumerate(encoders):
            names = encoder_hf_names(settings["kind"])
            sources |= names.reference_sources(numbers, f"encoders.{number}.", name)
        return sources


@dataclass(frozen=True)
class Expected:
    """What a few steps give: each step's loss, the first gradients and the last weights by name."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def expected_steps(
    config: EagleConfig,
    seed: int,
    steps: Sequence[Sequence[PackedBatch]],
    trainable: Sequence[str],
    optimizer: OptimizerSettings,
    learning_rate: float,
    lora: LoraSettings | None = None,
    tuned_seed: int | None = None,
) -> Expected:
    """Train the reference on ``steps`` (each the packs of one global batch) with AdamW and gradient clipping.

    lora: trains PEFT's adapters of the parts in ``trainable`` instead of their weights. tuned_seed: fine-tunes as
    ``finetuning.py`` says, with noise of that seed.
    """
    model = ReferenceEagle(config, seed)
    if lora:
        model.add_adapters(lora, seed)
    rates = {name: 1.0 if tuned_seed is None else rate_by_hand(name) for name, _ in model.named_parameters()}
    learning = {
        plain_name(name): p
        for name, p in model.named_parameters()
        if part_of(name) in trainable and (lora is None or ".lora_" in name) and rates[name]
    }
    model.requires_grad_(False)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    adam = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": optimizer.weight_decay if p.ndim > 1 else 0.0,
                "lr": learning_rate * rates.get(name, 1.0),
            }
            for name, p in learning.items()
        ],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step, packs in enumerate(steps):
        adam.zero_grad()
        noise = None if tuned_seed is None else partial(noise_by_hand, tuned_seed, step)
        loss = square_root_average(model, packs, noise)
        loss.backward()
        if not gradients:
            gradients = {name: _gradient(p) for name, p in learning.items()}
        nn.utils.clip_grad_norm_(learning.values(), optimizer.clip_grad)
        adam.step()
        losses.append(float(loss.detach()))
    weights = {plain_name(name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Expected(losses, gradients, weights)


def plain_name(name: str) -> str:
    """The name of one of the reference's tensors without what PEFT puts into it."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def square_root_average(
    model: ReferenceEagle, packs: Sequence[PackedBatch], noise: Callable[[str, Tensor], Tensor] | None = None
) -> Tensor:
    """sum_i sqrt(n_i) mean_i / sum_i sqrt(n_i) over all samples of ``packs``, each run alone.

    noise: on the embeddings of a sample, by its id; padding has none.
    """
    top, bottom = torch.zeros((), dtype=torch.float64), 0.0
    ids = [[*pack.sample_ids, ""][: len(pack.borders) - 1] for pack in packs]
    for (tokens, labels, tiles, slots), identity in zip(samples_of(packs), chain.from_iterable(ids), strict=True):
        labelled = labels != IGNORE_LABEL
        count = int(labelled.sum())
        if count:
            logits = model(tokens, tiles, slots, partial(noise, identity) if noise else None)
            mean = F.cross_entropy(logits[labelled], labels[labelled])
            top, bottom = top + count**0.5 * mean, bottom + count**0.5
    return top / bottom


def samples_of(packs: Sequence[PackedBatch]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(tokens, labels, tiles, slots) of every segment, taken out of its pack; labels stay shifted."""
    for pack in packs:
        for start, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True):
            inside = (pack.tile_slots >= start) & (pack.tile_slots < end)
            yield pack.tokens[start:end], pack.labels[start:end], pack.tiles[inside], pack.tile_slots[inside] - start


def part_of(name: str) -> str:
    """The recipe's part a tensor of the reference belongs to."""
    return {"encoders": "vision", "mlp1": "connector", "language": "language"}[name.split(".")[0]]


def with_tied_names(config: EagleConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the output matrix under its own name as well where it is the embedding."""
    named = dict(tensors)
    if config.language.tie_word_embeddings and "language.model.embed_tokens.weight" in named:
        named["language.lm_head.weight"] = named["language.model.embed_tokens.weight"]
    return named


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _build_encoder(part: EncoderReference, config: EncoderConfig, folder: Path | None) -> nn.Module:
    build = getattr(part, "build_published", None)
    built: nn.Module = build(config, folder) if build and folder else part.build(config)
    return built


def _build_language(config: EagleConfig, published: Mapping[str, Any] | None, attention: str) -> nn.Module:
    numbers = config.language
    if published is not None:
        said = Qwen2Config.from_dict(copy.deepcopy(dict(published)), attn_implementation=attention)
        said.vocab_size = numbers.vocab_size  # as many as there are rows, which a new model changes
        said.tie_word_embeddings = numbers.tie_word_embeddings  # both matrices are given, tied or not
        return Qwen2ForCausalLM(said)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=numbers.vocab_size,
            hidden_size=numbers.hidden_size,
            intermediate_size=numbers.intermediate_size,
            num_hidden_layers=numbers.num_hidden_layers,
            num_attention_heads=numbers.num_attention_heads,
            num_key_value_heads=numbers.num_key_value_heads,
            rms_norm_eps=numbers.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": numbers.rope_theta},
            tie_word_embeddings=numbers.tie_word_embeddings,
            attn_implementation=attention,
        )
    )


@torch.no_grad()
def _draw(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
