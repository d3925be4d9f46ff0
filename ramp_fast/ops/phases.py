"""Sub-pixel (polyphase) transposed convolutions: ``select_phases``.

A convolution of stride s whose input has both signs is pulled back as a convolution of stride one, with W+ and with W-,
whose s x s groups of outputs are the phases: the pixels of one cell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ramp_fast.ops._registry import operator


def _outputs(acc: Tensor, x: Tensor, *_: Any) -> Tensor:
    return acc.new_empty((acc.shape[0], *x.shape))


@operator(outputs=_outputs)
def select_phases(acc: Tensor, x: Tensor, top: int, left: int) -> Tensor:
    """Put phases where their pixels are, each from the half of the weights that the sign of the input asks for.

    Parameters
    ----------
    acc : Tensor [T, B, rows, columns, s, s, 2, C]
        By cell and phase, of W+ and of W-, channels innermost.
    x : Tensor [B, H, W, C]
        The convolution's input.
    top, left : int
        The cell of acc that the first input lies in.

    Returns
    -------
    Tensor [T, B, H, W, C] in the dtype of acc
        That of W+ where x is positive, that of W- where it is negative, 0 where it is 0.
    """
    height, width = x.shape[1:3]
    # [T, B, rows, s, columns, s, half, C]
    lines = acc.permute(0, 1, 2, 4, 3, 5, 6, 7).flatten(2, 3).flatten(3, 4)
    first, second = top * acc.shape[4], left * acc.shape[5]
    positive, negative = lines[:, :, first : first + height, second : second + width].unbind(-2)
    zero = torch.zeros((), dtype=acc.dtype, device=acc.device)
    return torch.where(x > 0, positive, torch.where(x < 0, negative, zero)).contiguous()
