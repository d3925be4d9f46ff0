"""Weights by the sign of an input: ``select_phases``, of sub-pixel (polyphase) transposed convolutions, and ``sides``.

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


def _sides_outputs(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], groups, 2, x.shape[-1] // groups), dtype=dtype)


@operator(outputs=_sides_outputs, float64=False)
def sides(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Positive and negative parts side by side, for one product with the weights of either.

    Parameters
    ----------
    x : Tensor [..., C]
    groups : int
        Of channels: the parts lie side by side in each.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    Tensor [..., groups, 2, C / groups]
        ``max(x, 0)`` and ``min(x, 0)``; NaN is NaN in both.
    """
    x = x.unflatten(-1, (groups, x.shape[-1] // groups))
    return torch.stack([x.clamp_min(0), x.clamp_max(0)], -2).to(dtype).contiguous()
