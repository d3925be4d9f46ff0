"""Max-pooling: the largest input of a window gets the window's relevance."""

from __future__ import annotations

import torch
from torch import Tensor

from ramp_fast.ops._common import compute_dtype
from ramp_fast.ops._registry import operator


@operator(outputs=lambda c, x, *_: c.new_empty((c.shape[0], *x.shape)), triton="max_pool:max_pool_pullback")
def max_pool_pullback(c: Tensor, x: Tensor, kernel_height: int, kernel_width: int, divided: bool) -> Tensor:
    """Pull coefficients through a max-pooling whose stride is its window and that has no padding.

    Parameters
    ----------
    c : Tensor [T, B, h, w, C]
        Channels innermost, as everything here.
    x : Tensor [B, H, W, C]
        The pooling's input; ``h = H // kernel_height``, ``w = W // kernel_width``.
    kernel_height, kernel_width : int
    divided : bool
        Send ``c``; otherwise ``c`` times the maximum.

    Returns
    -------
    Tensor [T, B, H, W, C] in the dtype of c
    """
    dtype = compute_dtype(c, x)
    rows, columns = c.shape[2] * kernel_height, c.shape[3] * kernel_width
    split = (c.shape[2], kernel_height, c.shape[3], kernel_width, x.shape[-1])
    # [B, h, w, C, window]
    windows = x[:, :rows, :columns].to(dtype).reshape(x.shape[0], *split).permute(0, 1, 3, 5, 2, 4).flatten(-2)
    best, winner = windows.max(-1)
    value = c.to(dtype) if divided else c.to(dtype) * best
    taps = torch.arange(windows.shape[-1], device=x.device)
    # the first of equals, which torch.max does not promise
    first = torch.where((windows == best.unsqueeze(-1)) | windows.isnan(), taps, len(taps)).amin(-1)
    chosen = taps == torch.where(first < len(taps), first, winner).unsqueeze(-1)
    spread = torch.where(chosen, value.unsqueeze(-1), torch.zeros((), dtype=dtype, device=x.device))
    spread = spread.unflatten(-1, (kernel_height, kernel_width)).permute(0, 1, 2, 5, 3, 6, 4)
    out = torch.zeros((c.shape[0], *x.shape), dtype=c.dtype, device=c.device)
    out[:, :, :rows, :columns] = spread.reshape(*c.shape[:2], rows, columns, c.shape[-1]).to(c.dtype)
    return out


Pair = list[int]  # rows and columns


@operator(outputs=lambda c, _, height, width, *__: c.new_empty((*c.shape[:2], height, width, c.shape[-1])))
def unpool(c: Tensor, indices: Tensor, height: int, width: int, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Pull coefficients through a max-pooling whose windows may overlap, from where their largest inputs are.

    Parameters
    ----------
    c : Tensor [T, B, h, w, C]
        Channels innermost.
    indices : Tensor [B, h, w, C]
        int32: the largest input of a window lies at row ``i // width``, column ``i % width``, as
        :func:`torch.nn.functional.max_pool2d` with ``return_indices`` says.
    height, width : int
        Of the input.
    kernel, stride, padding : list of two int
        Windows are not dilated.

    Returns
    -------
    Tensor [T, B, height, width, C] in the dtype of c
        Sums over the windows of an input.
    """
    dtype = compute_dtype(c)
    out = torch.zeros((*c.shape[:2], height * width, c.shape[-1]), dtype=dtype, device=c.device)
    # One window after the other for every input, in the kernel's order, which fixes the rounding of the sums.
    where = indices.long().flatten(1, 2).expand(*c.shape[:2], -1, -1)
    for window in range(where.shape[2]):
        out.scatter_add_(2, where[:, :, window : window + 1], c.flatten(2, 3)[:, :, window : window + 1].to(dtype))
    return out.view(*out.shape[:2], height, width, out.shape[-1]).to(c.dtype)
