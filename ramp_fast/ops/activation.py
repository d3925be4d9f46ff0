"""Activations and BatchNorm: ``activation_factor``, ``activation_share``, ``affine_factor``. All in float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C, affine_factor_from, compute_dtype
from ramp_fast.ops._registry import operator

# Slopes are 1 from here on. In their formulas infinity, or the square of a large number, would meet a zero.
_SATURATED = 100.0

# The functions of activation_factor; kernels have their numbers. activation_share has the first four, which are 0 at 0.
FUNCTIONS = ("gelu", "gelu_tanh", "silu", "hardswish", "sigmoid", "hardsigmoid")
SHARES = FUNCTIONS[:4]


def number_of(function: str, functions: tuple[str, ...] = FUNCTIONS) -> int:
    if function not in functions:
        raise ValueError(f"unknown function {function!r}; supported: {', '.join(functions)}")
    return functions.index(function)


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def laid_out(x: Tensor, gain: Tensor | None) -> Tensor:
    """``x`` contiguous, or channels last: images that are so already, and images with a gain."""
    last = _channels_last(x) or (x.ndim == 4 and gain is not None)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _with_factor(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Outputs for an ``x`` as :func:`laid_out` has it."""
    return torch.empty_like(x), x.new_empty(0) if dtype is None else torch.empty_like(x, dtype=dtype)


def _activation_outputs(
    x: Tensor, function: str, dtype: torch.dtype | None, gain: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _with_factor(laid_out(x, gain), dtype)


def _activation_factor_cpu(
    x: Tensor, function: str, dtype: torch.dtype | None, gain: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    number = number_of(function)
    if gain is not None and x.ndim != 4:  # no channels that are innermost
        raise ValueError(f"with a gain x must be [B, C, H, W], got {list(x.shape)}")
    x = laid_out(x, gain)
    y, factor = _with_factor(x, dtype)
    last = gain is not None or not x.is_contiguous()
    rows = [t.permute(0, 2, 3, 1) if last and t.ndim == 4 else t for t in (x, y, factor)]
    size, offset = (None if t is None else t.float().contiguous() for t in (gain, shift))
    C.activation_factor(rows[0], number, size, offset, rows[1], None if dtype is None else rows[2], get_num_threads())
    return y, factor


def _slope(u: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """``f(u)`` and ``f'(u)``."""
    z = u.clamp(max=_SATURATED)
    if function == "gelu":
        cumulative = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        return u * cumulative, cumulative + z * torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    if function == "gelu_tanh":
        tanh = (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh()
        inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
        return 0.5 * u * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * inner_slope
    if function in ("silu", "sigmoid"):
        rising, falling = torch.sigmoid(u), torch.sigmoid(-u)
        return (u * rising, rising * (1 + z * falling)) if function == "silu" else (rising, rising * falling)
    rising, inside = (u + 3).clamp(0, 6) / 6, (u.abs() < 3).to(u.dtype) / 6
    return (u * rising, rising + z * inside) if function == "hardswish" else (rising, inside)


@operator(outputs=_activation_outputs, float64=False, cpu=_activation_factor_cpu, triton="activation:activation_factor")
def activation_factor(
    x: Tensor,
    function: str,
    dtype: torch.dtype | None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """An activation and the factor of its pull-back in one pass.

    Parameters
    ----------
    x : Tensor
        Channels-last memory of images is kept.
    function : {"gelu", "gelu_tanh", "silu", "hardswish", "sigmoid", "hardsigmoid"}
    dtype : torch.dtype or None
        What the factor is stored in. None: there is none.
    gain, shift : Tensor [C], optional
        x ``[B, C, H, W]`` is ``gain z + shift``, a BatchNorm's output: pulled back through both. Memory of the outputs
        is channels last.

    Returns
    -------
    y : Tensor
        ``f(x)`` in the dtype of x.
    factor : Tensor
        ``[y > 0] (sign(x) f'(x) + f'(|x|))``, with a gain times ``|gain| (1 + sign(x - shift))``; without a dtype [0].
    """
    number_of(function)
    u = x.to(compute_dtype(x))
    y, slope = _slope(u, function)
    factor = u.sign() * slope + _slope(u.abs(), function)[1]
    factor = torch.where(y > 0, factor, torch.zeros_like(factor))
    if gain is not None and shift is not None:
        shape = (-1, 1, 1)
        factor = factor * affine_factor_from(u, gain.to(u.dtype).view(shape), shift.to(u.dtype).view(shape), False)
    out, kept = _with_factor(laid_out(x, gain), dtype)
    return out.copy_(y), kept if dtype is None else kept.copy_(factor)


def _activation_share_cpu(x: Tensor, function: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    number = number_of(function, SHARES)
    x = laid_out(x, None)
    y, factor = _with_factor(x, dtype)
    rows = (x, y, factor) if x.is_contiguous() else [t.permute(0, 2, 3, 1) for t in (x, y, factor)]
    C.activation_share(rows[0], number, rows[1], rows[2], get_num_threads())
    return y, factor


def _share_outputs(x: Tensor, function: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _with_factor(laid_out(x, None), dtype)


@operator(outputs=_share_outputs, float64=False, cpu=_activation_share_cpu, triton="activation:activation_share")
def activation_share(x: Tensor, function: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An activation and the factor ``f(x) / x``, by which relevance ``R = x c`` is handed on as it is.

    Parameters
    ----------
    x : Tensor
        Channels-last memory of images is kept.
    function : {"gelu", "gelu_tanh", "silu", "hardswish"}
    dtype : torch.dtype
        What the factor is stored in.

    Returns
    -------
    y : Tensor
        ``f(x)`` in the dtype of x.
    factor : Tensor
        ``f(x) / x``: the normal distribution's cumulative function, its tanh approximation, the logistic function, or
        the hard one; 0 where x is 0.
    """
    u = laid_out(x.to(compute_dtype(x)), None)
    if number_of(function, SHARES) == 0:
        factor = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    elif function == "gelu_tanh":
        factor = torch.sigmoid(math.sqrt(8 / math.pi) * (u + 0.044715 * u**3))  # (1 + tanh z) / 2 of 2 z
    else:
        factor = torch.sigmoid(u) if function == "silu" else (u + 3).clamp(0, 6) / 6
    y = u * factor
    return y.to(x.dtype), torch.where(u == 0, torch.zeros_like(factor), factor).to(dtype)


def _affine_outputs(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=args[-1])


def _affine_factor_cpu(
    x: Tensor, gain: Tensor, shift: Tensor, relu: bool, cap: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if not last:
        x = x.contiguous()
    y, factor = _affine_outputs(x, dtype)
    rows = [t.permute(0, 2, 3, 1) if last else t for t in (x, y, factor)]
    gain, shift = gain.float().contiguous(), shift.float().contiguous()
    C.affine_factor(rows[0], gain, shift, relu, cap, last, rows[1], rows[2], get_num_threads())
    return y, factor


@operator(outputs=_affine_outputs, float64=False, cpu=_affine_factor_cpu, triton="activation:affine_factor")
def affine_factor(
    x: Tensor, gain: Tensor, shift: Tensor, relu: bool, cap: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode, followed by a ReLU if there is one, and the factor of their pull-back.

    Parameters
    ----------
    x : Tensor [B, C, ...]
        Channels-last memory is kept.
    gain, shift : Tensor [C]
        ``y = gain x + shift``: ``weight / sqrt(var + eps)`` and ``bias - mean gain``.
    relu : bool
        Cut y to [0, cap] as well.
    cap : float
        Infinite for ReLU, 6 for ReLU6.
    dtype : torch.dtype
        What the factor is stored in.

    Returns
    -------
    y : Tensor
        In the dtype of x.
    factor : Tensor
        ``sign(x) gain + |gain|``, with ``relu`` times ``2 [y > 0]``.
    """
    wide = compute_dtype(x, gain, shift)
    shape = (-1,) + (1,) * (x.ndim - 2)
    u, g = x.to(wide), gain.to(wide).view(shape)
    y = g * u + shift.to(wide).view(shape)
    factor = u.sign() * g + g.abs()
    if relu:
        factor = torch.where(y > 0, 2 * factor, torch.zeros_like(factor))
        y = y.clamp(0, cap)
    return torch.empty_like(x).copy_(y), torch.empty_like(x, dtype=dtype).copy_(factor)
