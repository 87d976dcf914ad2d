"""What a tile of stripes costs in operations and bytes, for the planner."""

from megatron_eagle.model.cost import EncoderRun, Flops, Held, Rate
from stripes.config import Config

RATE: Rate = "products"


def operations(config: Config) -> tuple[Flops, Flops]:
    once = 2.0 * config.rows * 3 * config.channels
    return Flops(once, 0.0, once), Flops()


def activations(config: Config, run: EncoderRun) -> Held:
    return Held(config.rows * (3 + config.channels) * run.number * run.trains)


def layers(config: Config) -> int:
    return 1
