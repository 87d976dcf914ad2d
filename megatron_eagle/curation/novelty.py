"""How like a vector is to the most alike of many others: exact, by blocks, whatever their number.

Eagle 2.5 keeps a clip of a candidate film if its largest cosine to any clip that is trained on is below 0.5 (arXiv
2504.15271, section 4.1).
"""

import numpy as np
from numpy.typing import NDArray

from megatron_eagle.curation.similarity import RowsLike

BLOCK = 8192  # rows of either side in memory at a time


def most_alike(
    candidates: RowsLike, others: RowsLike, block: int = BLOCK
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Of each candidate the largest cosine to any of the others and the number of that one; -1 and -1 if there is none.

    Memory: three blocks.
    """
    best = np.full(len(candidates), -1, np.float32)
    where = np.full(len(candidates), -1, np.int64)
    for start in range(0, len(candidates), block):
        own = candidates[start : start + block]
        rows = np.arange(len(own))
        for low in range(0, len(others), block):
            cosines = own @ others[low : low + block].T
            nearest = cosines.argmax(axis=1)
            values = cosines[rows, nearest]
            better = values > best[start : start + block]
            best[start : start + block][better] = values[better]
            where[start : start + block][better] = low + nearest[better]
    return best, where
