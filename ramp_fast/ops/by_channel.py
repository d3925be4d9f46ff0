"""Pull-backs around numbers by channel, as gates and pools have: ``mul_pullback``, ``mul_gradient``, ``spread``."""

from __future__ import annotations

import torch
from torch import Tensor

from ramp_fast.ops._common import compute_dtype, contiguous_like, mass_equation
from ramp_fast.ops._registry import operator


def _mul_outputs(c: Tensor, a: Tensor, b: Tensor, contrast: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(c, a, b)
    return (
        contiguous_like(c),
        c.new_empty((*c.shape[:2], c.shape[3]), dtype=dtype),
        c.new_empty(c.shape[:2], dtype=dtype),
    )


@operator(outputs=_mul_outputs)
def mul_pullback(c: Tensor, a: Tensor, b: Tensor, contrast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pull coefficients through a product with one number by channel.

    Parameters
    ----------
    c : Tensor [T, B, rows, C]
    a : Tensor [B, rows, C]
    b : Tensor [B, C]
        The other factor, of all rows.
    contrast : bool

    Returns
    -------
    c_a : Tensor [T, B, rows, C]
        ``2 |b| [a b > 0] c`` in the dtype of c.
    c_b : Tensor [T, B, C]
        ``2 |a| [a b > 0] c`` summed over the rows; float32, or float64 if an operand is.
    mass : Tensor [T, B]
        Of c_a, as by :func:`mass`.
    """
    dtype = compute_dtype(c, a, b)
    a, b = a.to(dtype), b.to(dtype).unsqueeze(1)
    gated = torch.where(a * b > 0, 2 * c.to(dtype), torch.zeros((), dtype=dtype, device=c.device))
    c_a = gated * b.abs()
    return c_a.to(c.dtype).contiguous(), (gated * a.abs()).sum(2), mass_equation(a, c_a, contrast)


def _gradient_outputs(c: Tensor, a: Tensor, b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    return contiguous_like(c), c.new_empty((*c.shape[:2], c.shape[3]), dtype=compute_dtype(c, a, b))


@operator(outputs=_gradient_outputs)
def mul_gradient(c: Tensor, a: Tensor, b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Pull coefficients through a product with one number by channel, as signed rules do: its gradient, or a share.

    Parameters
    ----------
    c : Tensor [T, B, rows, C]
    a : Tensor [B, rows, C]
    b : Tensor [B, C]
        The other factor, of all rows.
    share : float

    Returns
    -------
    c_a : Tensor [T, B, rows, C]
        ``share b c`` in the dtype of c.
    c_b : Tensor [T, B, C]
        ``share a c`` summed over the rows; float32, or float64 if an operand is.
    """
    dtype = compute_dtype(c, a, b)
    c_a = c.to(dtype) * (share * b.to(dtype).unsqueeze(1))
    c_b = share * (c.to(dtype) * a.to(dtype)).sum(2)
    return c_a.to(c.dtype).contiguous(), c_b


def _spread_outputs(c: Tensor, x: Tensor, contrast: bool) -> tuple[Tensor, Tensor]:
    return c.new_empty((c.shape[0], *x.shape)), c.new_empty(c.shape[:2], dtype=compute_dtype(c, x))


@operator(outputs=_spread_outputs)
def spread(c: Tensor, x: Tensor, contrast: bool) -> tuple[Tensor, Tensor]:
    """Pull coefficients through a sum over rows, a linear layer of weight one.

    Parameters
    ----------
    c : Tensor [T, B, C]
    x : Tensor [B, rows, C]
    contrast : bool

    Returns
    -------
    c_x : Tensor [T, B, rows, C]
        ``2 [x > 0] c`` in the dtype of c.
    mass : Tensor [T, B]
        Of c_x, as by :func:`mass`.
    """
    dtype = compute_dtype(c, x)
    x = x.to(dtype)
    c_x = torch.where(x > 0, 2 * c.to(dtype).unsqueeze(2), torch.zeros((), dtype=dtype, device=c.device))
    return c_x.to(c.dtype).contiguous(), mass_equation(x, c_x, contrast)
