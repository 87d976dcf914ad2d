"""Passes of generation through the model in any layout: prompts as a pack, then one token of every question at a time.

All processes of a replica call the same methods with the same questions. The last pipeline stage chooses the tokens and
the others are told, so that everybody knows what was said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.prompt import Prompt
from megatron_eagle.evaluation.sampling import Sampling
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.key_value_cache import CachedRows, KeyValueCache
from megatron_eagle.parallel.groups import Groups

Encode = Callable[[Tensor], Tensor]  # uint8 tiles [n, 3, s, s] -> features [n, tokens_per_tile, hidden_size]


@dataclass(frozen=True)
class Question:
    """A prompt in a slot of the cache, with the tokens of its answer so far."""

    prompt: Prompt
    slot: int
    said: list[int]


class Decoder:
    """The model with its cache.

    model: this process's part in eval mode (one pipeline chunk). encode: what makes features on the first stage; None
        for the encoders in ``model``. pad: token that stands where nothing is asked.
    """

    def __init__(
        self,
        model: EagleModel | Float16Module,
        groups: Groups,
        device: torch.device,
        *,
        pad: int,
        sampling: Sampling,
        encode: Encode | None = None,
    ) -> None:
        eagle: EagleModel = model.module if isinstance(model, Float16Module) else model
        if eagle.layout.vpp:
            raise UserError(
                f"answers are generated without virtual pipeline stages, this layout has vpp={eagle.layout.vpp}"
            )
        self.model, self.groups, self.device, self.pad, self.sampling = model, groups, device, pad, sampling
        self.encode = encode or eagle.encode
        self.cache = KeyValueCache()
        # What rows of a pass must divide by.
        self.multiple = eagle.layout.tp if eagle.layout.sequence_parallel else 1
        self._cut_by_context = eagle.layout.cp

    def read(self, questions: Sequence[Question]) -> list[int]:
        """Prompts into the cache, their tiles through the encoders; the first token of each answer."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts: list[int] = []
        borders = [0]
        for question in questions:
            prompt = question.prompt
            starts += [borders[-1] + start for start in prompt.tile_starts]
            tokens += list(prompt.tokens)
            positions += range(len(prompt.tokens))
            slots += [question.slot] * len(prompt.tokens)
            borders.append(borders[-1] + len(prompt.tokens))
        written = len(tokens)
        if padding := -written % self.multiple:
            tokens += [self.pad] * padding
            positions += range(padding)
            borders.append(len(tokens))
        tiles = torch.cat([question.prompt.tiles for question in questions])
        batch = self._batch(tokens, positions, borders, tiles, starts)
        ends = [border - 1 for border in borders[1 : len(questions) + 1]]
        wanted = ends + [0] * (-len(ends) % self.multiple)
        features = self.encode(batch.tiles) if len(tiles) and self.groups.is_first_stage else None
        rows = CachedRows(self.cache, *self._on_device(slots, positions[:written], wanted))
        return self._run(batch, features, rows, [(question.prompt.identity, 0) for question in questions])

    def go_on(self, questions: Sequence[Question]) -> list[int]:
        """The next token of each question, in order; all that are in the cache."""
        tokens, positions = [self.pad] * self.cache.slots, [0] * self.cache.slots
        for question in questions:
            tokens[question.slot] = question.said[-1]
            positions[question.slot] = len(question.prompt.tokens) + len(question.said) - 1
        every = range(self.cache.slots)
        batch = self._batch(tokens, positions, range(self.cache.slots + 1), torch.empty(0, 3, 1, 1), [])
        wanted = [question.slot for question in questions]
        wanted += [0] * (-len(wanted) % self.multiple)
        rows = CachedRows(self.cache, *self._on_device(every, positions, wanted), longest=max(positions) + 1)
        return self._run(batch, None, rows, [(one.prompt.identity, len(one.said)) for one in questions])

    def _run(
        self, batch: PackedBatch, features: Tensor | None, rows: CachedRows, places: Sequence[tuple[str, int]]
    ) -> list[int]:
        """Through the pipeline, like a microbatch; the tokens chosen for ``places``, on all processes."""

        def forward(_: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
            return chunk(batch, features=features, compute_loss=False, cached=rows), partial(self._choose, places)

        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(()),
            model=self.model,
            num_microbatches=1,
            # Megatron divides what stages send by the context-parallel size; here each process has the whole.
            seq_length=batch.length * self._cut_by_context,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if self.groups.is_last_stage:
            chosen: Tensor = results[0]
        else:
            chosen = torch.empty(len(places), dtype=torch.int64, device=self.device)
        if self.groups.pp_size > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(chosen, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        return list(map(int, chosen.tolist()))

    def _choose(self, places: Sequence[tuple[str, int]], logits: Tensor, non_loss_data: bool) -> Tensor:
        assert non_loss_data, "generation never computes a loss"
        whole = gather_from_tensor_model_parallel_region(logits.reshape(-1, logits.shape[-1])[: len(places)])
        return self.sampling.choose(whole, places)

    def _batch(
        self, tokens: Sequence[int], positions: Sequence[int], borders: Sequence[int], tiles: Tensor, starts: list[int]
    ) -> PackedBatch:
        length = len(tokens)
        batch = PackedBatch(
            tokens=torch.tensor(tokens),
            labels=torch.full((length,), IGNORE_LABEL),
            loss_weights=torch.zeros(length),
            position_ids=torch.tensor(positions),
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            tiles=tiles,
            tile_slots=torch.tensor(starts, dtype=torch.int64),
            sample_ids=[],
            useful_tokens=length,
        )
        return batch.to(self.device)

    def _on_device(self, *numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        slots, positions, wanted = (torch.tensor(list(one), dtype=torch.int64, device=self.device) for one in numbers)
        return slots, positions, wanted
