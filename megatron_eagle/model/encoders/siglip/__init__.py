"""SigLIP, the vision transformer of Eagle 2 and 2.5."""

from megatron_eagle.config.encoders import EncoderSpec
from megatron_eagle.model.encoders.siglip.config import Config

SPEC = EncoderSpec("siglip", "a SigLIP", Config, __name__)
