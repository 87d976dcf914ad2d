"""What a row that is ``tuned`` does beside training: layers frozen, rates that fall by layer, noise on embeddings.

Keys of a stage, and by hand the same for the reference, on transformers' names of the tables' model
(``config.presets.SMALLEST``): eight decoder layers with tied embeddings, a SigLIP of two layers, a ConvNeXt of four
blocks. Embeddings of the SigLIP are frozen and its second layer is not, so that recomputation starts from an input
without a gradient.
"""

import re
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.model.noise import EmbeddingNoise

ALPHA = 5.0
KEYS: dict[str, Any] = {
    "freeze": (
        *("language.embeddings", "language.layers[:2]"),
        *("vision.siglip.embeddings", "vision.siglip.layers[:-1]", "vision.convnext.layers[1:3]"),
    ),
    "layer_decay": {"language": 0.8, "vision": 0.7},
    "neftune_alpha": ALPHA,
}
_RATES: tuple[tuple[str, tuple[float, ...]], ...] = (
    (r"language\.(?:model\.embed_tokens|lm_head)\.()", (0.0,)),
    (r"language\.model\.layers\.(\d)\.", (0.0, 0.0, 0.8**6, 0.8**5, 0.8**4, 0.8**3, 0.8**2, 0.8)),
    (r"encoders\.0\..*embeddings\.()", (0.0,)),
    (r"encoders\.0\..*layers\.(\d)\.", (0.0, 0.7)),
    (r"encoders\.1\..*stages\.(\d)\.", (0.7**4, 0.0, 0.0, 0.7)),
    (r"encoders\.1\..*embeddings\.()", (0.7**5,)),
)


def rate_by_hand(name: str) -> float:
    """What the learning rate of one of the reference's parameters is multiplied by; 0 is frozen."""
    for pattern, rates in _RATES:
        if match := re.match(pattern, name):
            return rates[int(match[1] or 0)]
    return 1.0


def noise_by_hand(seed: int, step: int, identity: str, embeddings: Tensor) -> Tensor:
    """Noise [L, d] on the embeddings of a sample by the paper's formula, of the draws that the model makes."""
    length, width = embeddings.shape
    drawn = EmbeddingNoise(0.0, seed, step).draw(identity, length, width, torch.device("cpu"))
    return drawn.double() * ALPHA / torch.tensor(float(length * width)).double().sqrt()
