"""LayerNorm: ``norm_pullback``, and ``norm_gradient`` of rules whose coefficients are a gradient.

``sigma(u) = sqrt(var(u) + eps)`` over the row; ``1 / sigma`` is 0 where sigma is 0 (a constant row with eps = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramp_fast.ops._common import compute_dtype, contiguous_like, divide
from ramp_fast.ops._registry import operator


def _sigma(x: Tensor, eps: float) -> Tensor:
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)  # not var(), which warns of empty rows
    return (variance + eps).sqrt()


def inverse_sigma(x: Tensor, eps: float) -> Tensor:
    sigma = _sigma(x, eps)
    return torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))


def norm_factor(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The diagonal of the pull-back, in the dtype of x."""
    w = torch.ones((), dtype=x.dtype, device=x.device) if weight is None else weight.to(x.dtype)
    return x.sign() * w * inverse_sigma(x, eps) + w.abs() * inverse_sigma(x.abs(), eps)


@operator(outputs=contiguous_like, triton="norm:norm_pullback")
def norm_pullback(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Pull coefficients through a LayerNorm: ``c_x = (sign(x) w / sigma(x) + |w| / sigma(|x|)) c``.

    Parameters
    ----------
    c : Tensor [T, B, ..., K]
    x : Tensor [B, ..., K]
        Its input.
    weight : Tensor [K], optional
    eps : float

    Returns
    -------
    Tensor [T, B, ..., K] in the dtype of c
    """
    dtype = compute_dtype(c, x)
    return (norm_factor(x.to(dtype), weight, eps) * c.to(dtype)).to(c.dtype).contiguous()


@operator(outputs=contiguous_like, triton="norm:norm_gradient")
def norm_gradient(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The gradient of a LayerNorm whose deviation is a constant: ``c_x = (w c - mean(w c)) / sigma(x)``.

    Parameters
    ----------
    c : Tensor [T, B, ..., K]
    x : Tensor [B, ..., K]
        Its input.
    weight : Tensor [K], optional
    eps : float

    Returns
    -------
    Tensor [T, B, ..., K] in the dtype of c
    """
    dtype = compute_dtype(c, x)
    sigma, own = _sigma(x.to(dtype), eps), c.to(dtype)
    if weight is not None:
        own = weight.to(dtype) * own
    inverse = divide(torch.ones_like(sigma), sigma)  # NaN where x is
    return ((own - own.mean(-1, keepdim=True)) * inverse).to(c.dtype).contiguous()
