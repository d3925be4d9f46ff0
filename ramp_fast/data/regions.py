"""Where the objects of a photograph are, by its annotation: boxes and segmentations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ramp_fast.data.images import ImageError

__all__ = ["BoxRegion", "inside_boxes"]


def inside_boxes(boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Boxes (left, top, right, bottom), pixels counted from 0, the last ones included."""
    for left, top, right, bottom in boxes:
        if left > right or top > bottom or right < 0 or bottom < 0 or left >= size[1] or top >= size[0]:
            raise ImageError(f"box {left}, {top}, {right}, {bottom} is not in the image ({size[1]} x {size[0]})")
    mask = np.zeros(size, dtype=bool)
    for left, top, right, bottom in boxes:
        mask[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = True
    return mask


@dataclass(frozen=True)
class BoxRegion:
    """Boxes (left, top, right, bottom), pixels counted from 0, the last ones included."""

    boxes: tuple[tuple[int, int, int, int], ...]

    def __call__(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        return inside_boxes(self.boxes, size)
