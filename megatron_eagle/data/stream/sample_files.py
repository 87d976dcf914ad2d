"""The files of single samples, read at random out of shards on disk or in an object store, by Energon's index.

What lies together is read together: record and images of a sample are neighbours in a shard, so that a sample is one
read, and one request to a store. Videos are not read, only their places. An index is a file that stays open; of more
data sets than MOST_OPEN those that were used last stay so.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.compat.energon import ShardIndex
from megatron_eagle.data.media.file_slice import VIDEO_ENDINGS, FileSlice
from megatron_eagle.data.storage.location import Location, openable, read_stretch
from megatron_eagle.data.storage.object_store import local_copy
from megatron_eagle.data.storage.shards import INDEX_FILE, Entry, shard_counts

MOST_OPEN = 256  # data sets
NEIGHBOURS = 1 << 16  # bytes between two files that are read along rather than asked for apart

Place = tuple[str, int, int]  # name ending, first byte in the shard, bytes


@dataclass(frozen=True)
class _Opened:
    index: ShardIndex
    shards: tuple[str, ...]


class SampleFiles:
    """Samples of any number of data sets."""

    def __init__(self) -> None:
        self._opened: OrderedDict[Location, _Opened] = OrderedDict()

    def read(self, path: Location, key: str) -> Entry:
        """The files of the sample ``key`` of the data set at ``path``, by name ending.

        Raises KeyError if it has no such sample; OSError or sqlite3.Error if it cannot be read; UnreachableStore.
        """
        opened = self._open(path)
        number, places = opened.index.files(key)
        shard = path / opened.shards[number]
        entry: Entry = {}
        others = []
        for ending, (begin, size) in places.items():
            if ending.rpartition(".")[2] in VIDEO_ENDINGS:
                entry[ending] = FileSlice(openable(shard), begin, size)
            else:
                others.append((ending, begin, size))
        for together in _neighbours(others):
            first, (_, last, size) = together[0][1], together[-1]
            data = read_stretch(shard, first, last + size - first)
            entry |= {ending: data[begin - first : begin - first + size] for ending, begin, size in together}
        return entry

    def shard_of(self, path: Location, key: str) -> str:
        """Name of the shard that holds a sample; raises as ``read``."""
        opened = self._open(path)
        return opened.shards[opened.index.files(key)[0]]

    def _open(self, path: Location) -> _Opened:
        if path in self._opened:
            self._opened.move_to_end(path)
            return self._opened[path]
        file = path / INDEX_FILE
        opened = _Opened(ShardIndex(file if isinstance(file, Path) else local_copy(file)), tuple(shard_counts(path)))
        self._opened[path] = opened
        if len(self._opened) > MOST_OPEN:
            _, oldest = self._opened.popitem(last=False)
            oldest.index.close()
        return opened


def _neighbours(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Files of a shard, in its order, in groups that are read at once."""
    together: list[Place] = []
    for place in places:
        if together and place[1] - sum(together[-1][1:]) > NEIGHBOURS:
            yield together
            together = []
        together.append(place)
    if together:
        yield together
