"""DINOv2, a vision transformer that was trained on images alone."""

from megatron_eagle.config.encoders import EncoderSpec
from megatron_eagle.model.encoders.dinov2.config import Config

SPEC = EncoderSpec("dinov2", "a DINOv2", Config, __name__)
