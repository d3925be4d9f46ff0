"""Convolutions whose input has both signs, pulled back in phases: ``select_phases``."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C
from ramp_fast.ops._registry import register


def _select_phases_reference(acc: Tensor, x: Tensor, top: int, left: int) -> Tensor:
    height, width = x.shape[1:3]
    # [T, B, rows, s, columns, s, half, C]
    lines = acc.permute(0, 1, 2, 4, 3, 5, 6, 7).flatten(2, 3).flatten(3, 4)
    first, second = top * acc.shape[4], left * acc.shape[5]
    positive, negative = lines[:, :, first : first + height, second : second + width].unbind(-2)
    zero = torch.zeros((), dtype=acc.dtype, device=acc.device)
    return torch.where(x > 0, positive, torch.where(x < 0, negative, zero)).contiguous()


def _select_phases_fake(acc: Tensor, x: Tensor, top: int, left: int) -> Tensor:
    return acc.new_empty((acc.shape[0], *x.shape))


def _select_phases_cpu(acc: Tensor, x: Tensor, top: int, left: int) -> Tensor:
    out = _select_phases_fake(acc, x, top, left)
    C.select_phases(acc.contiguous(), x.contiguous(), top, left, out, get_num_threads())
    return out


_select_phases = register(
    "select_phases(Tensor acc, Tensor x, int top, int left) -> Tensor",
    reference=_select_phases_reference,
    fake=_select_phases_fake,
    cpu=_select_phases_cpu,
)


def select_phases(acc: Tensor, x: Tensor, top: int, left: int) -> Tensor:
    """The coefficient that belongs to the sign of every input, put where the input is.

    A convolution of stride s is pulled back as one of stride one, whose outputs are the s x s inputs of a cell
    (phases), with W+ and with W-.

    Parameters
    ----------
    acc : Tensor [T, B, rows, columns, s, s, 2, C]
        Of W+ and of W-, channels innermost.
    x : Tensor [B, H, W, C]
        The convolution's input.
    top, left : int
        The cell of acc that the first input lies in.

    Returns
    -------
    Tensor [T, B, H, W, C] in the dtype of acc
        That of W+ where x is positive, that of W- where it is negative, 0 where it is 0.
    """
    return _select_phases(acc, x, top, left)  # type: ignore[no-any-return]
