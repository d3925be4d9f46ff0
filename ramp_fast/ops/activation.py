"""Activations and BatchNorm: ``gelu_factor``, ``activation_share``, ``affine_factor``. They compute in float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C, compute_dtype
from ramp_fast.ops._registry import operator

# The slope of GELU is 1 from here on. In its formula infinity, or the square of a large number, would meet a zero.
_SATURATED = 30.0


def _with_factor(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = args[-1]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=dtype, device=x.device)


@operator(outputs=_with_factor, float64=False, triton="activation:gelu_factor")
def gelu_factor(x: Tensor, tanh_approx: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """GELU and the factor of its pull-back in one pass.

    Parameters
    ----------
    x : Tensor
    tanh_approx : bool
        The tanh approximation instead of the error function.
    dtype : torch.dtype
        What the factor is stored in.

    Returns
    -------
    y : Tensor
        ``gelu(x)`` in the dtype of x.
    factor : Tensor
        ``2 [y > 0] gelu'(x)``.
    """
    u = x.to(compute_dtype(x)).contiguous()
    z = u.clamp(max=_SATURATED)
    if tanh_approx:
        inner = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
        tanh = inner.tanh()
        y = 0.5 * u * (1 + tanh)
        inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
        slope = 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * inner_slope
    else:
        cumulative = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        y = u * cumulative
        slope = cumulative + z * torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    factor = torch.where(y > 0, 2 * slope, torch.zeros_like(slope))
    return y.to(x.dtype), factor.to(dtype)


# The functions of activation_share; kernels have their numbers.
FUNCTIONS = ("gelu", "gelu_tanh", "silu")


def number_of(function: str) -> int:
    if function not in FUNCTIONS:
        raise ValueError(f"unknown function {function!r}; supported: {', '.join(FUNCTIONS)}")
    return FUNCTIONS.index(function)


def _activation_share_cpu(x: Tensor, function: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y, factor = _with_factor(x, dtype)
    C.activation_share(x, number_of(function), y, factor, get_num_threads())
    return y, factor


@operator(outputs=_with_factor, float64=False, cpu=_activation_share_cpu, triton="activation:activation_share")
def activation_share(x: Tensor, function: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An activation and the factor ``f(x) / x``, by which relevance ``R = x c`` is handed on as it is.

    Parameters
    ----------
    x : Tensor
    function : {"gelu", "gelu_tanh", "silu"}
    dtype : torch.dtype
        What the factor is stored in.

    Returns
    -------
    y : Tensor
        ``f(x)`` in the dtype of x.
    factor : Tensor
        ``f(x) / x``: the normal distribution's cumulative function, its tanh approximation, or the logistic function;
        0 where x is 0.
    """
    u = x.to(compute_dtype(x)).contiguous()
    if number_of(function) == 0:
        factor = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    elif function == "gelu_tanh":
        factor = torch.sigmoid(math.sqrt(8 / math.pi) * (u + 0.044715 * u**3))  # (1 + tanh z) / 2 of 2 z
    else:
        factor = torch.sigmoid(u)
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
