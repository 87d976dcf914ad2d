"""What SigLIP costs on one tile."""

from megatron_eagle.model.cost import Rate
from megatron_eagle.model.vit.cost import activations, layers, operations

__all__ = ["RATE", "activations", "layers", "operations"]

RATE: Rate = "products"
