"""Masks of objects that are given as boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ramp_fast._checks import positive
from ramp_fast.errors import InputError

__all__ = ["boxes_to_masks"]


def boxes_to_masks(boxes: Tensor | Sequence[Tensor], height: int, width: int) -> Tensor:
    """Masks of objects given as boxes.

    Parameters
    ----------
    boxes : Tensor [N, 4], Tensor [N, B, 4] or sequence of N Tensors [B_n, 4]
        One box, B boxes or any number of them (none as well) for each image: ``x0, y0, x1, y1``, left, top, right and
        bottom edge in pixels of the images as the model gets them, ``x`` to the right from 0 to ``width``. A box covers
        the pixels whose centres ``(column + 0.5, row + 0.5)`` it has: for integers, columns x0 to x1 - 1. What lies
        outside of the image is ignored, and a box without area covers nothing.
    height, width : int
        Of the images.

    Returns
    -------
    bool Tensor [N, 1, height, width]
        True inside of any of the image's boxes, on the boxes' device.

    Raises
    ------
    InputError
        A box is not finite, or ends before it begins; boxes have another shape; a size is not a positive integer.
    """
    for what, size in (("height", height), ("width", width)):
        positive("boxes_to_masks", what, size)
    edges = _padded(boxes)
    if not bool(edges.isfinite().all()):
        raise InputError("boxes_to_masks: boxes must be finite numbers x0, y0, x1, y1")
    backwards = (edges[..., 2:] < edges[..., :2]).any(-1)
    if bool(backwards.any()):
        raise InputError(
            f"boxes_to_masks: boxes are x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got {edges[backwards][0].tolist()}"
        )
    left, top, right, bottom = edges.unsqueeze(-1).unbind(-2)
    x = torch.arange(width, dtype=edges.dtype, device=edges.device) + 0.5
    y = torch.arange(height, dtype=edges.dtype, device=edges.device) + 0.5
    columns = ((left <= x) & (x < right)).float()  # [N, B, W]
    rows = ((top <= y) & (y < bottom)).float()  # [N, B, H]
    covered = rows.mT @ columns  # by how many boxes, [N, H, W]
    return (covered > 0).unsqueeze(1)


def _padded(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """``[N, B, 4]`` in float64; an image with fewer boxes gets some without area."""
    expected = "boxes_to_masks: boxes must be a Tensor [N, 4] or [N, B, 4], or a Tensor [B, 4] for each image"
    if isinstance(boxes, Tensor):
        if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4 or boxes.shape[0] == 0:
            raise InputError(f"{expected}; got {list(boxes.shape)}")
        return (boxes if boxes.dim() == 3 else boxes.unsqueeze(1)).double()
    if not isinstance(boxes, Sequence) or not boxes:
        raise InputError(f"{expected}; got {type(boxes).__name__}")
    for number, image in enumerate(boxes):
        if not isinstance(image, Tensor) or image.dim() != 2 or image.shape[1] != 4:
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise InputError(f"{expected}; got {found} for image {number}")
    return torch.nn.utils.rnn.pad_sequence([image.double() for image in boxes], batch_first=True)
