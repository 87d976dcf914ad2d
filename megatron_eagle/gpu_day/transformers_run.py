"""The same model made of transformers' modules, trained as its users train: what a speed has to be held against.

The samples of a pack either padded to the longest (one row a sample, as a collator does it) or packed in one row, with
FlashAttention where it is installed. Weights and Adam's moments are bf16 and nothing is recomputed, so it needs less
memory than a trainer with float32 weights beside bf16's; its numbers are those of transformers, not of a tuned trainer.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.gpu_day.alone import now, peak_bytes
from megatron_eagle.verification.reference import ReferenceEagle


@dataclass(frozen=True)
class Rows:
    """Samples of a pack as rows [b, l]: tokens, labels (shifted), loss weights, positions, attended (None: all).

    slots: of each tile's first token, counted through all rows.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    attended: Tensor | None
    tiles: Tensor
    slots: Tensor

    def to(self, device: torch.device) -> "Rows":
        """The same on ``device``."""
        moved: dict[str, Any] = {name: part if part is None else part.to(device) for name, part in vars(self).items()}
        return Rows(**moved)


@dataclass(frozen=True)
class Run:
    """losses, seconds: of each step. peak_bytes: None on a CPU."""

    losses: list[float]
    seconds: list[float]
    peak_bytes: int | None


def packed_attention() -> str:
    """What transformers attends with over packed rows here: FlashAttention, or PyTorch's with a mask of l x l."""
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def packed_rows(pack: PackedBatch) -> Rows:
    """One row, without the padding; transformers finds the samples by positions that begin again."""
    end = pack.useful_tokens
    return Rows(
        tokens=pack.tokens[None, :end],
        labels=pack.labels[None, :end],
        weights=pack.loss_weights[None, :end],
        positions=pack.position_ids[None, :end],
        attended=None,
        tiles=pack.tiles,
        slots=pack.tile_slots,
    )


def padded_rows(pack: PackedBatch) -> Rows:
    """A row for each sample, the shorter ones padded behind."""
    borders = [border for border in pack.borders if border <= pack.useful_tokens]
    spans = list(zip(borders[:-1], borders[1:], strict=True))
    longest = max(end - start for start, end in spans)

    def rows(values: Tensor, filler: float) -> Tensor:
        return torch.stack([F.pad(values[a:b], (0, longest - (b - a)), value=filler) for a, b in spans])

    number = torch.bucketize(pack.tile_slots, torch.tensor(borders[1:]), right=True)
    return Rows(
        tokens=rows(pack.tokens, 0),
        labels=rows(pack.labels, IGNORE_LABEL),
        weights=rows(pack.loss_weights, 0.0),
        positions=rows(pack.position_ids, 0),
        attended=rows(torch.ones_like(pack.tokens), 0),
        tiles=pack.tiles,
        slots=pack.tile_slots - torch.tensor(borders)[number] + number * longest,
    )


def weighted_loss(model: ReferenceEagle, rows: Rows) -> Tensor:
    """sum of weights times cross entropies, float32."""
    embeddings = F.embedding(rows.tokens, model.get_parameter("language.model.embed_tokens.weight"))
    if len(rows.tiles):
        features = model.visual(rows.tiles)
        places = (rows.slots[:, None] + torch.arange(features.shape[1], device=rows.slots.device)).flatten()
        flat = embeddings.flatten(0, 1).index_copy(0, places, features.flatten(0, 1))
        embeddings = flat.view_as(embeddings)
    known = {} if rows.attended is None else {"attention_mask": rows.attended}
    logits = model.language(inputs_embeds=embeddings, position_ids=rows.positions, use_cache=False, **known).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), rows.labels.flatten(), reduction="none")
    return (losses * rows.weights.flatten()).sum()


def train(model: ReferenceEagle, steps: Sequence[Sequence[Rows]], learning_rate: float) -> Run:
    """AdamW on ``steps``, the gradients of a step's rows summed; the model is on the device of the rows."""
    device = steps[0][0].tokens.device
    adam = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=device.type == "cuda")
    losses, seconds = [], []
    with peak_bytes(device) as peaks:
        for rows in steps:
            started = now(device)
            total = sum(float(one.weights.sum()) for one in rows)
            parts = []
            for one in rows:
                part = weighted_loss(model, one) / total
                part.backward()
                parts.append(part.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            losses.append(float(torch.stack(parts).sum()))
            seconds.append(now(device) - started)
    return Run(losses, seconds, peaks[0] if peaks else None)
