"""Depthwise convolutions of images and their transposes: ``depthwise``. It computes in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ramp_fast.ops._common import compute_dtype
from ramp_fast.ops._registry import operator

# Taps of a window along an axis that the kernel takes.
MOST_TAPS = 32


def _outputs(
    c: Tensor,
    weight: Tensor,
    bias: Any,
    x: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    size: list[int],
    transposed: Any,
    relu: Any,
    dtype: torch.dtype | None,
) -> Tensor:
    return c.new_empty((*c.shape[:2], *size, c.shape[4]), dtype=dtype)


@operator(outputs=_outputs, float64=False)
def depthwise(
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    transposed: bool,
    relu: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A depthwise convolution of every map, or its transpose.

    Parameters
    ----------
    c : Tensor [T, B, h, w, C]
        Channels innermost.
    weight : Tensor [1 or 2, kh, kw, C]
        Float32. With ``x`` of two halves; of two halves without it the first is for entries of c above zero, the second
        for those below.
    bias : Tensor [C], optional
        Float32.
    x : Tensor [B, H, W, C], optional
        The first half of the weights is for outputs where this is positive, the second for those where it is negative;
        where it is 0 so is the output.
    stride, padding, dilation : list of int
        Of the convolution, along both axes.
    size : list of int
        ``[H, W]`` of the output.
    transposed : bool
        The transpose: ``[H, W]`` is the size of the convolution's input, ``[h, w]`` that of its output.
    relu : bool
        No less than zero; NaN stays.
    dtype : torch.dtype, optional
        Of the output; by default that of c.

    Returns
    -------
    Tensor [T, B, H, W, C]
    """
    wide = compute_dtype(c, weight, bias, x)
    images = c.flatten(0, 1).permute(0, 3, 1, 2).to(wide)
    channels = c.shape[4]
    by_source = x is None and len(weight) == 2
    sides = [images.clamp_min(0), images.clamp_max(0)] if by_source else [images] * len(weight)
    found = []
    for images, half in zip(sides, weight.to(wide).permute(0, 3, 1, 2), strict=True):
        kernel = half.unsqueeze(1)
        if transposed:
            reach = [
                (n - 1) * s - 2 * p + d * (k - 1) + 1
                for n, s, p, d, k in zip(images.shape[2:], stride, padding, dilation, kernel.shape[2:], strict=True)
            ]
            rest = [n - r for n, r in zip(size, reach, strict=True)]
            y = torch.nn.functional.conv_transpose2d(images, kernel, None, stride, padding, rest, channels, dilation)
        else:
            y = torch.nn.functional.conv2d(images, kernel, None, stride, padding, dilation, channels)
        found.append(y.permute(0, 2, 3, 1).unflatten(0, c.shape[:2]))
    out: Tensor = found[0] + found[1] if by_source else found[0]
    if x is not None:
        zero = torch.zeros((), dtype=wide, device=c.device)
        out = torch.where(x > 0, out, torch.where(x < 0, found[1], zero))
    if bias is not None:
        out = out + bias.to(wide)
    if relu:
        out = out.relu()
    return out.to(c.dtype if dtype is None else dtype).contiguous()
