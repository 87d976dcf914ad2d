"""Intersection over union of boxes, for RefCOCO and the like.

Rule: lmms-eval's ``tasks/refcoco/utils_rec.py``: the first four numbers in brackets are the box, and none is (0, 0, 0,
0). Two boxes without area, by which the official code divides, have nothing in common: 0.
"""

import re
from collections.abc import Sequence

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\s*\]")

Box = tuple[float, float, float, float]


def read_box(text: str) -> Box:
    """Left, top, right, bottom of the first ``[x, y, x, y]`` in ``text``; zeros if there is none."""
    found = _BOX.search(text)
    if not found:
        return 0.0, 0.0, 0.0, 0.0
    left, top, right, bottom = (float(number) for number in found.groups())
    return left, top, right, bottom


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Shared area over area covered by either, of boxes (left, top, right, bottom) in one unit."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    covered = _area(one) + _area(other) - shared
    return shared / covered if covered else 0.0


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
