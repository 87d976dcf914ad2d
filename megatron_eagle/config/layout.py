"""Layout: how many processes work along each axis. Numbers and checks only, so that every package may read it.

Process groups are made from it in ``parallel/groups.py``; the model turns it into Megatron's TransformerConfig.
"""

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megatron_eagle.config.numbers import Flag, Positive

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Layout:
    """Processes along each axis of a run; ``dp`` follows from the world size.

    tp: tensor parallel size: processes that share each layer.
    pp: pipeline parallel size: processes that hold layers one behind another.
    cp: context parallel size: processes that share the tokens of a pack.
    least_cp: how few of the cp processes may share a pack: each pack of a step then goes to as many of them as balance
        the step, ``least_cp`` times a power of two (docs/context_parallelism.md). None: all share every pack.
    ulysses: how many of the cp processes trade positions for attention heads among themselves; the remaining factor,
        ``ring``, cuts the pack in zigzag (docs/context_parallelism.md).
    vpp: virtual pipeline stages per process (interleaved schedule).
    sequence_parallel: keep the activations between tensor-parallel blocks split along the sequence.
    encoder: ``tensor`` hosts the vision encoders on pipeline stage 0, sharded over its tensor-parallel ranks;
        ``spread`` copies them to every process and shares out the tiles of each step (docs/encoder_placement.md).
    encoder_chunk: for ``spread``, how many tiles a process encodes at a time. Of each chunk only the features are kept,
        and the backward pass encodes it again; None encodes all at once and keeps the activations.
    layers_per_stage: decoder layers of each pipeline stage, by default an even split. The first stage also
        hosts the encoders, so a real layout gives it fewer layers.
    """

    tp: Positive = 1
    pp: Positive = 1
    cp: Positive = 1
    least_cp: Positive | None = None
    ulysses: Positive = 1
    vpp: Positive | None = None
    sequence_parallel: Flag = False
    encoder: Literal["tensor", "spread"] = "tensor"
    encoder_chunk: Positive | None = None
    layers_per_stage: tuple[Positive, ...] | None = None

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel needs tp > 1, this layout has tp=1")
        if self.cp % self.ulysses:
            raise ValueError(f"ulysses={self.ulysses} does not divide cp={self.cp}")
        if self.least_cp is not None:
            self._check_shared_packs(self.least_cp)
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.pp * (self.vpp or 1):
            raise ValueError(
                f"layers_per_stage has {len(self.layers_per_stage)} entries, "
                f"pp={self.pp} x vpp={self.vpp or 1} needs {self.pp * (self.vpp or 1)}"
            )
        if self.encoder_chunk is not None and self.encoder != "spread":
            raise ValueError(
                f"encoder_chunk={self.encoder_chunk} needs encoder: spread, this layout has {self.encoder}"
            )
        if self.vpp is not None and self.pp == 1:
            raise ValueError(f"vpp={self.vpp} needs pp > 1, this layout has pp=1")

    def _check_shared_packs(self, least_cp: int) -> None:
        groups, rest = divmod(self.cp, least_cp)
        if rest or groups < 2 or groups & (groups - 1):
            raise ValueError(f"cp={self.cp} must be least_cp={least_cp} times 2, 4, 8, ...")
        if self.pp > 1:
            raise ValueError(
                f"least_cp={least_cp} needs pp=1, this layout has pp={self.pp}: stages send equal parts of packs"
            )
        if self.ulysses > 1:
            raise ValueError(f"least_cp={least_cp} needs ulysses=1, this layout has ulysses={self.ulysses}")

    @property
    def ring(self) -> int:
        """Processes, or groups of ``ulysses`` of them, that cut a pack in zigzag."""
        return self.cp // self.ulysses

    def check_pack_length(self, length: int) -> None:
        """Raise ValueError unless a pack of ``length`` tokens can be cut as context and sequence parallelism cut it."""
        chunks = 2 * self.ring if self.ring > 1 else 1
        tp = self.tp if self.sequence_parallel else 1
        if length % (chunks * self.ulysses * tp):
            split_by_tp = f" x tp={tp} (sequence_parallel)" if tp > 1 else ""
            raise ValueError(
                f"a pack of {length} tokens cannot be cut into {chunks} chunks (cp={self.cp}) x "
                f"ulysses={self.ulysses}{split_by_tp} = {chunks * self.ulysses * tp} equal parts"
            )

    @property
    def model_parallel_size(self) -> int:
        """Processes that together hold one replica of the model."""
        return self.tp * self.pp * self.cp

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in ``world_size`` processes; raises ValueError if they do not fit evenly."""
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"{world_size} processes cannot be split into replicas of tp={self.tp} x pp={self.pp} x cp={self.cp} "
                f"= {self.model_parallel_size} processes"
            )
        return world_size // self.model_parallel_size
