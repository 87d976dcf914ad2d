"""A perceptual hash of every image, noted for operators that look for near-duplicates."""

from collections.abc import Iterable
from typing import ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.curation.hashing import picture_hash
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.data.media.images import decode_image


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """No settings. What is noted: of each image 64 bits, null if it is flat."""

    on_benchmarks: ClassVar[bool] = True

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """One note, or none without images."""
        if sample.images:
            yield Finding("noted", "", note=[picture_hash(decode_image(image.read())) for image in sample.images])
