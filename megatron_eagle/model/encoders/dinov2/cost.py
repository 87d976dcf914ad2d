"""What DINOv2 costs on one tile."""

from megatron_eagle.model.cost import EncoderRun, Held, Rate
from megatron_eagle.model.encoders.dinov2.config import Config
from megatron_eagle.model.vit import cost as vit
from megatron_eagle.model.vit.cost import layers, operations

__all__ = ["RATE", "activations", "layers", "operations"]

RATE: Rate = "products"
SCALED = 2  # what LayerScale multiplies: the outputs of the attention and of the MLP


def activations(dinov2: Config, run: EncoderRun) -> Held:
    """A vision transformer's, and what LayerScale needs for the gradients of its scales."""
    return vit.activations(dinov2, run, scaled=SCALED)
