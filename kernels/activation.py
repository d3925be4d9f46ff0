"""Activations and BatchNorm with the factor of their pull-back, in one pass.

    activation_factor: y = f(x),            factor = [y > 0] (sign(x) f'(x) + f'(|x|))
    activation_share:  y = f(x),            factor = f(x) / x
    affine_factor:     y = gain x + shift,  factor = sign(x) gain + |gain|

Followed by a ReLU the last cuts y to [0, cap] and multiplies the factor by 2 [y > 0]. The first multiplies it by
``|gain| (1 + sign(x - shift))`` where x is a BatchNorm's output.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.ops.activation import SHARES, laid_out, number_of

BLOCK = 1024
WARPS = 4

ROOT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
ROOT_TWO_OVER_PI: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))
INVERSE_ROOT_TWO_PI: tl.constexpr = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def activation_factor_kernel(
    x_ptr,  # [elements]
    gain_ptr,  # [CHANNELS], innermost in x
    shift_ptr,  # [CHANNELS]
    y_ptr,  # [elements]
    factor_ptr,  # [elements]
    elements,
    FUNCTION: tl.constexpr,  # its place in ops.activation.FUNCTIONS
    FACTOR: tl.constexpr,  # whether there is one
    CHANNELS: tl.constexpr,  # 0: no gain
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    u = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    # Of functions whose slope is even nothing is left below zero, and half at zero.
    even = tl.where(u > 0, 2.0, tl.where(u == 0, 1.0, 0.0))
    if FUNCTION == 0:
        share = 0.5 * (1 + tl.erf(u * ROOT_HALF))
        density = INVERSE_ROOT_TWO_PI * tl.exp(-0.5 * u * u)
    elif FUNCTION == 1:
        # (1 + tanh(z)) / 2 is the logistic function of 2 z, which does not cancel for negative z.
        z = ROOT_TWO_OVER_PI * (u + 0.044715 * u * u * u)
        share = 1 / (1 + tl.exp(-2 * z))
        density = 2 * share * (1 - share) * ROOT_TWO_OVER_PI * (1 + 0.134145 * u * u)
    elif FUNCTION == 2 or FUNCTION == 4:
        share = 1 / (1 + tl.exp(-u))
        density = share * (1 / (1 + tl.exp(u)))
    else:
        share = tl.minimum(tl.maximum(u + 3, 0.0), 6.0) / 6
        share = tl.where(u != u, u, share)
        density = tl.where(tl.abs(u) < 3, 1 / 6, 0.0)
    if FUNCTION < 4:
        y = u * share
        # Where the density has vanished u may be infinite: 0, not NaN.
        factor = tl.where(y > 0, 2 * (share + tl.where(density > 0, u * density, 0.0)), 0.0)
    else:
        y = share
        factor = even * density
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    if FACTOR:
        if CHANNELS > 0:
            # In 32 bits: a remainder of 64 takes registers that are not there.
            start = (tl.program_id(0).to(tl.int64) * BLOCK % CHANNELS).to(tl.int32)
            channel = (start + tl.arange(0, BLOCK)) % CHANNELS
            shift = tl.load(shift_ptr + channel).to(tl.float32)
            side = tl.where(u > shift, 2.0, tl.where(u == shift, 1.0, 0.0))
            factor *= tl.abs(tl.load(gain_ptr + channel).to(tl.float32)) * side
        tl.store(factor_ptr + place, factor.to(factor_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_share_kernel(
    x_ptr,  # [elements]
    y_ptr,  # [elements]
    factor_ptr,  # [elements]
    elements,
    FUNCTION: tl.constexpr,  # its place in ops.activation.SHARES
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    u = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if FUNCTION == 0:
        share = 0.5 * (1 + tl.erf(u * ROOT_HALF))
    elif FUNCTION == 1:
        z = ROOT_TWO_OVER_PI * (u + 0.044715 * u * u * u)
        share = 1 / (1 + tl.exp(-2 * z))
    elif FUNCTION == 2:
        share = 1 / (1 + tl.exp(-u))
    else:
        share = tl.minimum(tl.maximum(u + 3, 0.0), 6.0) / 6
        share = tl.where(u != u, u, share)
    factor = tl.where(u == 0, 0.0, share)
    tl.store(y_ptr + place, (u * share).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(factor_ptr + place, factor.to(factor_ptr.dtype.element_ty), mask=inside)


@triton.jit
def affine_factor_kernel(
    x_ptr,  # [B, C, INNER], or [B, INNER, C] in memory with INNER 1
    gain_ptr,  # [C]
    shift_ptr,  # [C]
    y_ptr,  # as x
    factor_ptr,  # as x
    elements,
    cap,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    channel = place // INNER % CHANNELS
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + channel).to(tl.float32)
    y = gain * x + tl.load(shift_ptr + channel).to(tl.float32)
    factor = tl.where(x > 0, gain, tl.where(x < 0, -gain, 0.0)) + tl.abs(gain)
    if RELU:
        factor = tl.where(y > 0, 2 * factor, 0.0)
        y = tl.where(y != y, y, tl.minimum(tl.maximum(y, 0.0), cap))  # NaN stays NaN
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(factor_ptr + place, factor.to(factor_ptr.dtype.element_ty), mask=inside)


def activation_factor(
    x: Tensor, function: str, dtype: torch.dtype | None, gain: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``ramp_fast::activation_factor`` for x of any shape, with a gain [B, C, H, W]."""
    number = number_of(function)
    x = laid_out(x, gain)
    y, factor = torch.empty_like(x), x.new_empty(0) if dtype is None else torch.empty_like(x, dtype=dtype)
    if x.numel():
        size, offset = (x if t is None else t.contiguous() for t in (gain, shift))
        with torch.cuda.device_of(x):
            activation_factor_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                *(x, size, offset, y, factor, x.numel()),
                FUNCTION=number,
                FACTOR=dtype is not None,
                CHANNELS=0 if gain is None else x.shape[1],
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return y, factor


def activation_share(x: Tensor, function: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``ramp_fast::activation_share`` for x of any shape; channels-last memory of images is kept."""
    x = laid_out(x, None)
    y, factor = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    number = number_of(function, SHARES)
    if x.numel():
        with torch.cuda.device_of(x):
            activation_share_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                *(x, y, factor, x.numel()), FUNCTION=number, BLOCK=BLOCK, num_warps=WARPS
            )
    return y, factor


def affine_factor(
    x: Tensor, gain: Tensor, shift: Tensor, relu: bool, cap: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``ramp_fast::affine_factor`` for x [B, C, ...], gain and shift [C]; channels-last memory is kept."""
    if x.ndim < 2 or gain.shape != x.shape[1:2] or shift.shape != gain.shape:
        raise ValueError(f"x {list(x.shape)} must be [B, C, ...], gain {list(gain.shape)} and shift [C]")
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if not last:
        x = x.contiguous()
    y, factor = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            affine_factor_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                *(x, gain.contiguous(), shift.contiguous(), y, factor, x.numel(), cap),
                CHANNELS=x.shape[1],
                INNER=1 if last else x[0, 0].numel(),
                RELU=relu,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return y, factor
