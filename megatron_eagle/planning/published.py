"""Eagle 2's published hours, and the length of samples at which the planner arrives at them.

The Eagle 2 paper (arXiv 2501.14818) gives samples and hours of each stage, but not tokens per sample, and the released
code trains with DeepSpeed's ZeRO-3, which this project does not have: every GPU holds a part of the weights and all of
them are gathered for each pack, forward and backward, and their gradients scattered. That is added here to the plan of
the same stage without any other parallelism and with recomputation of whole layers, as the released scripts set it.

Unknown are then the tokens per sample of each stage, and two numbers of the published software: how much of this
planner's achievable rates it reached, and how fast ZeRO-3 moved its weights as far as computing did not hide that.
Three published times cannot fix five numbers; what can be said is which pairs of the last two put the samples of *all*
stages inside the bracket.
"""

from dataclasses import dataclass, replace

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.memory import BYTES
from megatron_eagle.planning.parameters import encoder_copy, stage_weights
from megatron_eagle.planning.plan import plan_stage
from megatron_eagle.planning.samples import Mix
from megatron_eagle.planning.search import with_layout
from megatron_eagle.planning.timing import link_rate, ring_rate

# Tokens of a sample that are plausible. An image costs 256 tokens a tile: a 2 x 2 grid with its thumbnail and a short
# text make 1 500; twelve tiles, the thumbnail and a long text make 4 000, which is also what a pack of stage 1 holds.
REPLICAS = 16  # simulated; with fewer, packs are too few for hours to grow smoothly with samples
BRACKET = (1500.0, 4000.0)


@dataclass(frozen=True)
class Software:
    """What the published runs' software reached.

    efficiency: share of the profile's achievable rates. traffic: bytes a second and GPU at which ZeRO-3's weights and
    gradients moved, counted over the time that computing did not hide; infinite if it hid all of it.
    """

    efficiency: float
    traffic: float


def software(hardware: Hardware) -> list[Software]:
    """From the best to the worst that is tried: rings through all adapters of a node, or through one."""
    through_all, through_one = ring_rate(hardware, 256, stride=1), link_rate(hardware, 256)
    rates = (2 * through_all, through_all, through_all / 2, 2 * through_one, through_one)
    return [Software(efficiency, rate) for efficiency in (1.0, 0.8, 0.6, 0.4) for rate in rates]


@dataclass(frozen=True)
class PublishedStage:
    """Samples, GPUs and hours as published."""

    samples: float
    gpus: int
    hours: float


PUBLISHED = {
    "stage1": PublishedStage(1.2e6, 128, 4),
    "stage1.5": PublishedStage(21.6e6, 256, 28),
    "stage2": PublishedStage(4.6e6, 256, 6),
}


def as_published(
    recipe: Recipe, stage: Stage, hardware: Hardware, tokens: float, used: Software
) -> tuple[float, float]:
    """(hours, utilisation) of a published stage with ZeRO-3, for samples of ``tokens`` tokens."""
    published = PUBLISHED[stage.name]
    shares = ("products", "attention", "convolutions", "memory_share")
    slower = replace(hardware, **{name: getattr(hardware, name) * used.efficiency for name in shares})
    variant = with_layout(recipe, stage, Layout(), "full")
    plan = plan_stage(variant, variant.stage(stage.name), published.gpus, slower, Mix(tokens), simulated=REPLICAS)
    config = recipe.model.eagle()
    weights = sum(weight.elements for weight in stage_weights(config, Layout(), 0)[0])
    frozen = 0 if "language" in stage.trainable else weights - sum(w.elements for w in encoder_copy(config))
    gathered = weights * BYTES[recipe.weight_precision] * 2
    scattered = (weights - frozen) * BYTES[recipe.weight_precision]
    packs = stage.batch / published.gpus
    seconds = plan.seconds + packs * (gathered + scattered) / used.traffic
    return published.samples / plan.samples * seconds / 3600, plan.mfu * plan.seconds / seconds


def matching_tokens(recipe: Recipe, stage: Stage, hardware: Hardware, used: Software) -> float | None:
    """Tokens per sample at which ``as_published`` takes the published hours; None if they do not lie in ``BRACKET``."""
    target = PUBLISHED[stage.name].hours
    low, high = BRACKET
    if not _hours(recipe, stage, hardware, low, used) <= target <= _hours(recipe, stage, hardware, high, used):
        return None
    while high - low > 20:
        middle = (low + high) / 2
        low, high = (middle, high) if _hours(recipe, stage, hardware, middle, used) < target else (low, middle)
    return round((low + high) / 2, -1)


def _hours(recipe: Recipe, stage: Stage, hardware: Hardware, tokens: float, used: Software) -> float:
    return as_published(recipe, stage, hardware, tokens, used)[0]
