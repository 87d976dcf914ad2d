"""Eagle 2's published hours, and the length of samples at which the planner would arrive at them.

The Eagle 2 paper (arXiv 2501.14818) gives samples and hours of each stage, but not tokens per sample, and the released
code trains with DeepSpeed's ZeRO-3, which this project does not have: every GPU holds a part of the weights and all of
them are gathered for each pack, forward and backward, and their gradients scattered. That is added here to the plan of
the same stage without any other parallelism and with recomputation of whole layers, as the released scripts set it.
"""

from dataclasses import dataclass, replace

from megatron_eagle.layout import Layout
from megatron_eagle.planning.hardware import Hardware
from megatron_eagle.planning.memory import BYTES
from megatron_eagle.planning.parameters import encoder_copy, stage_weights
from megatron_eagle.planning.plan import StagePlan, plan_stage
from megatron_eagle.planning.samples import Mix
from megatron_eagle.planning.search import with_layout
from megatron_eagle.recipe import Recipe, Stage

HIDDEN = 0.5  # of ZeRO-3's traffic, behind computation; an assumption between none and all
BRACKET = (1500, 4000)  # tokens of a sample that are taken to be plausible


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


def as_published(recipe: Recipe, stage: Stage, hardware: Hardware, mix: Mix, hidden: float = HIDDEN) -> float:
    """Hours of a published stage with ZeRO-3 for samples as in ``mix``; hidden: share of its traffic that is free."""
    published = PUBLISHED[stage.name]
    plan = _plan(recipe, stage, hardware, mix)
    config = recipe.model.eagle()
    weights = sum(weight.elements for weight in stage_weights(config, Layout(), 0)[0])
    frozen = 0 if "language" in stage.trainable else weights - sum(w.elements for w in encoder_copy(config))
    gathered = weights * BYTES[recipe.precision] * 2
    scattered = (weights - frozen) * BYTES[recipe.precision]
    packs = stage.batch / published.gpus
    link = hardware.outside_bytes_per_second * hardware.link_share
    seconds = plan.seconds + packs * (gathered + scattered) / link * (1 - hidden)
    return published.samples / plan.samples * seconds / 3600


def matching_tokens(recipe: Recipe, stage: Stage, hardware: Hardware, hidden: float = HIDDEN) -> float | None:
    """Tokens per sample at which ``as_published`` takes the published hours; None between 500 and 8000."""
    target = PUBLISHED[stage.name].hours
    low, high = 500.0, 8000.0
    if not as_published(recipe, stage, hardware, Mix(low), hidden) < target:
        return None
    if not as_published(recipe, stage, hardware, Mix(high), hidden) > target:
        return None
    while high - low > 50:
        middle = (low + high) / 2
        if as_published(recipe, stage, hardware, Mix(middle), hidden) < target:
            low = middle
        else:
            high = middle
    return round((low + high) / 2, -1)


def _plan(recipe: Recipe, stage: Stage, hardware: Hardware, mix: Mix) -> StagePlan:
    variant = with_layout(recipe, stage, Layout(), "full")
    own = replace(variant.stage(stage.name), gpus=PUBLISHED[stage.name].gpus)
    return plan_stage(variant, own, PUBLISHED[stage.name].gpus, hardware, mix)
