"""LayerNorm: ``c_x = (sign(x) w / sigma(x) + |w| / sigma(|x|)) c``, ``sigma(u) = sqrt(var(u) + eps)`` over the row.

``1 / sigma`` is 0 where sigma is 0 (a constant row with eps = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C, compute_dtype, mass_equation
from ramp_fast.ops._registry import register


def _inverse_sigma(x: Tensor, eps: float) -> Tensor:
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)  # not var(), which warns of empty rows
    sigma = (variance + eps).sqrt()
    return torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))


def _factor(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The diagonal of the pull-back, in the dtype of x."""
    w = torch.ones((), dtype=x.dtype, device=x.device) if weight is None else weight.to(x.dtype)
    return x.sign() * w * _inverse_sigma(x, eps) + w.abs() * _inverse_sigma(x.abs(), eps)


def _norm_pullback_reference(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    dtype = compute_dtype(c, x)
    return (_factor(x.to(dtype), weight, eps) * c.to(dtype)).to(c.dtype).contiguous()


def _norm_pullback_fake(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(c, memory_format=torch.contiguous_format)


def _norm_pullback_cpu(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = torch.empty(c.shape, dtype=c.dtype)
    weight = None if weight is None else weight.contiguous()
    C.norm_pullback(c.contiguous(), x.contiguous(), weight, eps, out, get_num_threads())
    return out


_norm_pullback = register(
    "norm_pullback(Tensor c, Tensor x, Tensor? weight, float eps) -> Tensor",
    reference=_norm_pullback_reference,
    fake=_norm_pullback_fake,
    cpu=_norm_pullback_cpu,
    triton="norm:norm_pullback",
)


def norm_pullback(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Pull coefficients through a LayerNorm over the last axis.

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
    return _norm_pullback(c, x, weight, eps)  # type: ignore[no-any-return]


def _select_norm_pullback_reference(
    acc: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contrast: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(acc, x)
    x = x.to(dtype)
    n = (x - x.mean(-1, keepdim=True)) * _inverse_sigma(x, eps)
    if weight is not None:
        n = n * weight.to(dtype)
    if bias is not None:
        n = n + bias.to(dtype)
    upper, lower = acc.to(dtype).tensor_split(2, dim=-1)
    zero = torch.zeros((), dtype=dtype, device=x.device)
    c = 2 * torch.where(n > 0, upper, torch.where(n < 0, lower, zero))
    c = (_factor(x, weight, eps) * c).contiguous()
    return c, mass_equation(x, c, contrast)


def _select_outputs(acc: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(acc, x)
    return (
        torch.empty((acc.shape[0], *x.shape), dtype=dtype, device=acc.device),
        torch.empty(acc.shape[:2], dtype=dtype, device=acc.device),
    )


def _select_norm_pullback_fake(
    acc: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contrast: bool
) -> tuple[Tensor, Tensor]:
    return _select_outputs(acc, x)


def _select_norm_pullback_cpu(
    acc: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contrast: bool
) -> tuple[Tensor, Tensor]:
    out, mass = _select_outputs(acc, x)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    C.select_norm_pullback(acc.contiguous(), x.contiguous(), weight, bias, eps, out, mass, contrast, get_num_threads())
    return out, mass


_select_norm_pullback = register(
    "select_norm_pullback(Tensor acc, Tensor x, Tensor? weight, Tensor? bias, float eps, bool contrast)"
    " -> (Tensor, Tensor)",
    reference=_select_norm_pullback_reference,
    fake=_select_norm_pullback_fake,
    cpu=_select_norm_pullback_cpu,
)


def select_norm_pullback(
    acc: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contrast: bool
) -> tuple[Tensor, Tensor]:
    """Finish the pull-back of a linear layer and continue through the LayerNorm that feeds it.

    With n the LayerNorm's output, ``c_n = 2 acc[..., :K]`` where n > 0, ``2 acc[..., K:]`` where n < 0 and 0 where
    n is 0; then :func:`norm_pullback`.

    Parameters
    ----------
    acc : Tensor [T, B, ..., 2 K]
        ``W+^T c`` and ``W-^T c`` side by side.
    x : Tensor [B, ..., K]
        The LayerNorm's input.
    weight, bias : Tensor [K], optional
        The LayerNorm's parameters.
    eps : float
    contrast : bool

    Returns
    -------
    c : Tensor [T, B, ..., K]
        float32, or float64 if an operand is.
    mass : Tensor [T, B]
        As :func:`ramp_fast.ops.mass` of (x, c).
    """
    return _select_norm_pullback(acc, x, weight, bias, eps, contrast)  # type: ignore[no-any-return]
