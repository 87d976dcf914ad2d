"""A window of the plan: the samples that are packed together, and their packs, as plain arrays.

It holds all that a rank needs to ask for its packs, names included, so that nobody who has a window opens the index of
a source; and as arrays it can lie in files that all ranks of a machine map into memory.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.data.order.sample_index import Ints, Names
from megatron_eagle.data.storage.location import load_array


@dataclass(frozen=True)
class Window:
    """n samples, g of which can be used and are in p packs.

    sources: int32 [n], number of each sample's source; tokens, tiles: int32 [n], 0 if it cannot be used; keys, ids: n.
    members: int64 [g], places among the n, pack after pack; first_member: int64 [p + 1], where each pack begins.
    costs: float64 [p] (``balance_ranks.pack_costs``). rejected: int64 [n - g], places; reasons: of each of them.
    """

    sources: Ints
    tokens: Ints
    tiles: Ints
    keys: Names
    ids: Names
    members: Ints
    first_member: Ints
    costs: NDArray[np.float64]
    rejected: Ints
    reasons: Names

    def __len__(self) -> int:
        """Packs."""
        return len(self.costs)

    def members_of(self, pack: int) -> list[int]:
        """Places of a pack's samples."""
        return self.members[self.first_member[pack] : self.first_member[pack + 1]].tolist()

    def save(self, folder: Path) -> None:
        """Writes it into a folder that is there; raises OSError."""
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Names):
                np.save(folder / f"{name}.npy", value.text)
                np.save(folder / f"{name}-starts.npy", value.starts)
            else:
                np.save(folder / f"{name}.npy", value)

    @staticmethod
    def load(folder: Path) -> "Window":
        """The one in a folder, mapped into memory; raises OSError or ValueError."""

        def names(name: str) -> Names:
            return Names(array(name), array(f"{name}-starts"))

        def array(name: str) -> NDArray[Any]:
            return load_array(folder / f"{name}.npy")

        return Window(
            sources=array("sources"),
            tokens=array("tokens"),
            tiles=array("tiles"),
            keys=names("keys"),
            ids=names("ids"),
            members=array("members"),
            first_member=array("first_member"),
            costs=array("costs"),
            rejected=array("rejected"),
            reasons=names("reasons"),
        )
