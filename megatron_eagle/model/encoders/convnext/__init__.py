"""ConvNeXt, the convolutional encoder of Eagle 2 9B and 34B."""

from megatron_eagle.config.encoders import EncoderSpec
from megatron_eagle.model.encoders.convnext.config import Config

SPEC = EncoderSpec("convnext", "a ConvNeXt", Config, __name__)
