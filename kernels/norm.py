"""LayerNorm's pull-back, and its gradient with a constant deviation.

    norm_pullback:  c_x = (sign(x) w / sigma(x) + |w| / sigma(|x|)) c,    sigma(u) = sqrt(var(u) + eps) over the row
    norm_gradient:  c_x = (w c - mean(w c)) / sigma(x)

One program per row: statistics of x and |x| in two passes (the row stays in cache), then every map.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import compute_dtype

MAX_BLOCK = 4096


@triton.jit
def _inverse(variance, eps):
    sigma = tl.sqrt(variance + eps)
    return tl.where(sigma > 0, 1 / sigma, 0.0)


@triton.jit
def row_statistics(x_row, WIDTH: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Mean, 1 / sigma(x) and 1 / sigma(|x|) of one row, in two passes."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], COMPUTE)
    total_absolute = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, WIDTH, BLOCK):
        inside = start + columns < WIDTH
        x = tl.load(x_row + start + columns, mask=inside, other=0.0).to(COMPUTE)
        total += x
        total_absolute += tl.abs(x)
    mean = tl.sum(total, 0) / WIDTH
    mean_absolute = tl.sum(total_absolute, 0) / WIDTH

    squares = tl.zeros([BLOCK], COMPUTE)
    squares_absolute = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, WIDTH, BLOCK):
        inside = start + columns < WIDTH
        x = tl.load(x_row + start + columns, mask=inside, other=0.0).to(COMPUTE)
        centred = tl.where(inside, x - mean, 0.0)
        centred_absolute = tl.where(inside, tl.abs(x) - mean_absolute, 0.0)
        squares += centred * centred
        squares_absolute += centred_absolute * centred_absolute
    inverse = _inverse(tl.sum(squares, 0) / WIDTH, EPS)
    inverse_absolute = _inverse(tl.sum(squares_absolute, 0) / WIDTH, EPS)
    return mean, inverse, inverse_absolute


@triton.jit(do_not_specialize=["rows"])
def norm_pullback_kernel(
    c_ptr,  # [T, rows, width]
    x_ptr,  # [rows, width]
    weight_ptr,  # [width]; not read unless HAS_WEIGHT
    out_ptr,  # [T, rows, width]
    rows,
    NUM_MAPS: tl.constexpr,  # T; like WIDTH a constant of the model (and an int for Triton 3.6's interpreter)
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,  # a constant, so that float64 does not get a float32 epsilon
    HAS_WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,  # float32 or float64
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x_row = x_ptr + row * WIDTH

    _, inverse, inverse_absolute = row_statistics(x_row, WIDTH, EPS, COMPUTE, BLOCK)
    for start in range(0, WIDTH, BLOCK):
        inside = start + columns < WIDTH
        x = tl.load(x_row + start + columns, mask=inside, other=0.0).to(COMPUTE)
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(COMPUTE)
        else:
            w = tl.full([BLOCK], 1.0, COMPUTE)
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(COMPUTE)
        factor = sign * w * inverse + tl.abs(w) * inverse_absolute
        for t in range(NUM_MAPS):
            offset = (t * rows.to(tl.int64) + row) * WIDTH + start + columns
            c = tl.load(c_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
            tl.store(out_ptr + offset, (factor * c).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weighed(c_row, weight_ptr, place, inside, HAS_WEIGHT: tl.constexpr, COMPUTE: tl.constexpr):
    own = tl.load(c_row + place, mask=inside, other=0.0).to(COMPUTE)
    if HAS_WEIGHT:
        own *= tl.load(weight_ptr + place, mask=inside, other=0.0).to(COMPUTE)
    return own


@triton.jit(do_not_specialize=["rows"])
def norm_gradient_kernel(
    c_ptr,  # as above
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    NUM_MAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mean, inverse, _ = row_statistics(x_ptr + row * WIDTH, WIDTH, EPS, COMPUTE, BLOCK)
    inverse += mean - mean  # NaN where x is, or is not finite
    for t in range(NUM_MAPS):
        first = (t * rows.to(tl.int64) + row) * WIDTH
        total = tl.zeros([BLOCK], COMPUTE)
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            total += _weighed(c_ptr + first, weight_ptr, start + columns, inside, HAS_WEIGHT, COMPUTE)
        mean_own = tl.sum(total, 0) / WIDTH
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            own = _weighed(c_ptr + first, weight_ptr, start + columns, inside, HAS_WEIGHT, COMPUTE)
            c = ((own - mean_own) * inverse).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + first + start + columns, c, mask=inside)


def block_and_warps(width: int) -> tuple[int, int]:
    """Columns of a row in one step, and warps."""
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    return block, 4 if block <= 1024 else 8


def norm_pullback(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``ramp_fast::norm_pullback`` for c [T, B, ..., K], x [B, ..., K], weight [K]."""
    return _launch(norm_pullback_kernel, c, x, weight, eps)


def norm_gradient(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``ramp_fast::norm_gradient`` for c [T, B, ..., K], x [B, ..., K], weight [K]."""
    return _launch(norm_gradient_kernel, c, x, weight, eps)


def _launch(kernel: Any, c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.ndim < 1 or c.shape[1:] != x.shape or (weight is not None and weight.shape != x.shape[-1:]):
        raise ValueError(f"c {list(c.shape)} must be [T, *x.shape] with x {list(x.shape)}, weight [{x.shape[-1]}]")
    c, x = c.contiguous(), x.contiguous()
    weight = None if weight is None else weight.contiguous()
    out = torch.empty_like(c)
    if out.numel() == 0:
        return out
    width = x.shape[-1]
    rows = x.numel() // width
    block, warps = block_and_warps(width)
    with torch.cuda.device_of(c):
        kernel[(rows,)](
            c,
            x,
            x if weight is None else weight,
            out,
            rows,
            NUM_MAPS=c.shape[0],
            WIDTH=width,
            EPS=eps,
            HAS_WEIGHT=weight is not None,
            COMPUTE=compute_dtype(c, x)[1],
            BLOCK=block,
            num_warps=warps,
        )
    return out
