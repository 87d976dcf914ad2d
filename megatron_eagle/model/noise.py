"""NEFTune: noise on the embeddings of the text while a model is fine-tuned (Jain et al. 2023, arXiv:2310.05914).

Algorithm 1 of the paper: with L tokens of d channels, each number of a sample's embeddings gets alpha / sqrt(L d) times
its own draw, uniform in [-1, 1]. Here L is the length of the sample, not of its pack, and features of tiles take the
places of embeddings afterwards, so that they get none.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_eagle.data.sample.packed_batch import PackedBatch


@dataclass(frozen=True)
class EmbeddingNoise:
    """The noise of one step. seed: the recipe's. step: how many were made before it."""

    alpha: float
    seed: int
    step: int

    def of(self, batch: PackedBatch, held: Tensor, embeddings: Tensor) -> Tensor:
        """Noise for ``embeddings`` [l, 1, d] of the positions ``held`` [l] of a pack; padding gets none.

        A sample's is drawn whole from the seed, the step and its id, wherever the sample lies and whatever part of it
        this process holds, so that it is the same in every layout; on another kind of device it is another.
        """
        width, device = embeddings.shape[-1], embeddings.device
        noise = torch.zeros((batch.length, width), dtype=embeddings.dtype, device=device)
        for identity, (start, stop) in zip(batch.sample_ids, pairwise(batch.borders), strict=False):
            size = self.alpha / ((stop - start) * width) ** 0.5
            noise[start:stop] = self.draw(identity, stop - start, width, device) * size
        return noise[held][:, None]

    def draw(self, identity: str, length: int, width: int, device: torch.device) -> Tensor:
        """float32 [length, width], uniform in [-1, 1], of one sample."""
        digest = hashlib.sha256(f"neftune/{self.seed}/{self.step}/{identity}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand((length, width), generator=generator, device=device) * 2 - 1
