"""The smallest encoder there is: the mean colour of every horizontal stripe of a tile, through one linear layer."""

from megatron_eagle.config.encoders import EncoderSpec
from stripes.config import Config

SPEC = EncoderSpec("stripes", "a Stripes", Config, __name__)
