"""What a vision transformer costs on one tile."""

from megatron_eagle.model.cost import EncoderRun, Flops, Held
from megatron_eagle.model.vit.config import VitConfig

PIXEL_COPIES = 2  # in float32, while a tile is normalised


def operations(vit: VitConfig) -> tuple[Flops, Flops]:
    """(the patches' product, the layers), trained."""
    tokens, hidden = vit.tokens, vit.hidden_size
    patches = 2.0 * vit.patches * hidden * 3 * vit.patch_size**2
    products = 2.0 * tokens * (4 * hidden * hidden + 2 * hidden * vit.intermediate_size)
    attention = 4.0 * tokens**2 * hidden
    layer = Flops(products + attention, products + 2 * attention, products)
    return Flops(patches, 0.0, patches), layer * vit.num_hidden_layers


def activations(vit: VitConfig, run: EncoderRun, scaled: int = 0) -> Held:
    """From pixels to the last norm. scaled: activations as wide as a token that a layer saves beside Megatron's."""
    tokens, hidden, tp = vit.tokens, vit.hidden_size, run.tp
    inner, heads = vit.intermediate_size / tp, hidden / tp
    pixels = run.pixels(3 * vit.image_size**2, PIXEL_COPIES)
    core = (3 * heads + heads) * run.number + 4 * vit.num_attention_heads / tp
    norm = 2 * hidden * run.number + 8
    scaled *= not run.adapters
    layer = tokens * (2 * norm + core + (heads + 2 * inner + scaled * hidden) * run.number)
    moment = tokens * ((2 + run.adapters) * inner + hidden) * run.number
    kept = tokens * hidden * run.number if run.repeats_layers else layer
    if not run.trains:
        return Held(0.0, max(pixels.saved + pixels.forward, tokens * (3 * hidden + 3 * inner) * run.number))
    again = layer - kept
    around = tokens * hidden * run.number  # the last norm's input; with adapters the first one's is not saved
    layers = Held(kept * vit.num_hidden_layers + around * (not run.adapters), again, again + moment)
    return pixels.then(layers)


def layers(vit: VitConfig) -> int:
    """Layers that are launched one after another."""
    return vit.num_hidden_layers
