"""One source of a plan, of which only the samples that are asked for are looked at.

Its index is opened when it is needed and not held: a thousand sources would hold eight thousand files open, and pages
of all of them in memory. What is not on this machine's disk (an object store, a folder that cannot be written) is held,
as finding it again would be reading all of it again.
"""

from dataclasses import dataclass

import numpy as np

from megatron_eagle.config.data import DataSettings
from megatron_eagle.data.order.lengths import Lengths, lengths_of
from megatron_eagle.data.order.measuring import open_sample_index, text_tokens
from megatron_eagle.data.order.sample_index import Ints, Names, SampleIndex, count_mapped
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.location import is_mapped, locate_dataset
from megatron_eagle.data.storage.shards import dataset_identity
from megatron_eagle.errors import UserError

FIRST_LOOK = 64  # samples that are looked at for one that can be used; then twice as many, and so on


@dataclass(frozen=True)
class DrawnSamples:
    """Samples of one source in the order asked for: their names, and their lengths with who is rejected, by place."""

    keys: Names
    ids: Names
    lengths: Lengths


class SourceSamples:
    """The samples of the data set at ``path``; UserError if there is none or it is empty."""

    def __init__(self, path: str, settings: DataSettings, tokenizer: Tokenizer) -> None:
        self._system, self._tokenizer = settings.reading.system, tokenizer
        self._planner = VisualPlanner(settings, tokenizer)
        self._held: SampleIndex | None = None
        self._text: Ints | None = None
        self.path, self.identity = locate_dataset(path), dataset_identity(path)
        samples = count_mapped(path)
        if samples is None:
            index = open_sample_index(path)
            samples, self._held = len(index), None if is_mapped(index.first_image) else index
        self._samples = samples
        if not samples:
            raise UserError(f"{path}: the data set holds no samples")

    def __len__(self) -> int:
        return self._samples

    def index(self) -> SampleIndex:
        """All that is known of the samples. UserError if other shards lie there by now."""
        if self._held is not None:
            return self._held
        index = open_sample_index(self.path)
        if index.identity != self.identity:
            raise UserError(f"{self.path}: is another data set by now, its shards were built again")
        return index

    def draw(self, samples: Ints) -> DrawnSamples:
        """What is known of the samples of these numbers."""
        index = self.index()
        lengths = lengths_of(index, self._all_text(index), samples, self._planner)
        return DrawnSamples(index.keys.take(samples), index.ids.take(samples), lengths)

    def first_reason(self) -> str | None:
        """Why the first sample cannot be used if no sample can, else None; only as many are looked at as it takes."""
        index, begin, size, reason = self.index(), 0, FIRST_LOOK, ""
        text = self._all_text(index)
        while begin < len(self):
            looked_at = np.arange(begin, min(begin + size, len(self)))
            lengths = lengths_of(index, text, looked_at, self._planner)
            if lengths.tokens.any():
                return None
            reason = reason or lengths.rejected[0]
            begin, size = begin + size, 2 * size
        return reason

    def _all_text(self, index: SampleIndex) -> Ints:
        if self._text is not None:
            return self._text
        text = text_tokens(index, self._tokenizer, self._system)
        if not is_mapped(text):
            self._text = text
        return text
