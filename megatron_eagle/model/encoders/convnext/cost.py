"""What ConvNeXt costs on one tile."""

from megatron_eagle.model.cost import EncoderRun, Flops, Held, Rate
from megatron_eagle.model.encoders.convnext.config import EXPANSION, KERNEL, STEM, Config

RATE: Rate = "convolutions"
PIXEL_COPIES = 2  # in float32: resized pixels, and what they are made from, counted as large


def operations(convnext: Config) -> tuple[Flops, Flops]:
    """(the stem's product, the stages), trained."""
    side, sizes = convnext.image_size // STEM, convnext.hidden_sizes
    stem = 2.0 * side**2 * sizes[0] * 3 * STEM**2
    rest = 0.0
    for number, (depth, size) in enumerate(zip(convnext.depths, sizes, strict=True)):
        if number:
            side //= 2
            rest += 2.0 * side**2 * size * sizes[number - 1] * 2**2
        rest += depth * 2.0 * side**2 * size * (KERNEL**2 + 2 * EXPANSION * size)
    return Flops(stem, 0.0, stem), Flops(rest, rest, rest)


def activations(convnext: Config, run: EncoderRun) -> Held:
    """From pixels to the last stage's map."""
    side, sizes, again = convnext.image_size // STEM, convnext.hidden_sizes, run.repeats_layers
    pixels = run.pixels(3 * convnext.image_size**2, PIXEL_COPIES)
    # Without gradients of the stem, neither its norm's input nor what is in front of the first products is saved.
    total = pixels.then(
        Held(side**2 * sizes[0] * run.number * (-2 if run.adapters and not again else not run.adapters))
    )
    largest = pixels.saved + pixels.forward
    for number, (depth, size) in enumerate(zip(convnext.depths, sizes, strict=True)):
        if number:  # the norm's input and output
            total = total.then(Held(side**2 * sizes[number - 1] * run.number * (1 if again else 2)))
            side //= 2
        inner = side**2 * EXPANSION * size / run.tp * run.number
        block = side**2 * ((4 - run.adapters) * size * run.number + 8) + 2 * inner  # no gradient of the scale
        largest = max(largest, block + inner)
        # The gradient of the block's output, of its second product's output and of its GELU's output.
        moment = 2 * side**2 * size * run.number + inner * (1 + run.adapters)
        if again:
            kept = side**2 * size * run.number
            total = total.then(Held(depth * kept, block - kept, block - kept + moment))
        else:
            total = total.then(Held(depth * block, inner, moment))
    held = 3 * convnext.image_size**2 * run.number * run.adapters  # the pixels, while the first products run
    return total if run.trains else Held(0.0, largest + held)


def layers(convnext: Config) -> int:
    """Blocks that are launched one after another."""
    return sum(convnext.depths)
