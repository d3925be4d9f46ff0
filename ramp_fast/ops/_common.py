"""What the operators share: dtypes, allocation, and the equations of scaling and masses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ramp_fast import _C as C
else:  # None where it is missing; the registry calls no CPU kernel then
    from ramp_fast.ops._registry import extension as C

__all__ = [
    "C",
    "affine_factor_from",
    "compute_dtype",
    "contiguous_like",
    "divide",
    "halves",
    "mass_equation",
    "per_sample",
    "rescale_equation",
]


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of arithmetic and masses: float64 as soon as an operand is, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def contiguous_like(c: Tensor, *_: Any) -> Tensor:
    """A contiguous output of the shape and dtype of an operator's first argument, not written yet."""
    return torch.empty_like(c, memory_format=torch.contiguous_format)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` with 0 where ``b`` is 0: relevance that is zero everywhere stays zero."""
    return (a / b).masked_fill_(b == 0, 0)


def per_sample(scale: Tensor, c: Tensor) -> Tensor:
    """View a scale [T, B] so that it broadcasts over c [T, B, ...]."""
    return scale.reshape(scale.shape + (1,) * (c.ndim - 2))


def halves(c: Tensor, contrast: bool) -> tuple[Tensor, Tensor | None]:
    """Split c into P and D rows; with no contrast there is no D."""
    if not contrast:
        return c, None
    half = c.shape[0] // 2
    return c[:half], c[half:]


def rescale_equation(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    """P <- s_P P, D <- s_N D + (s_P - s_N) P, in the dtype of its arguments.

    Where D is P, N is zero, and D stays P to the last bit: otherwise N would be a rounding error, which later steps
    would scale up to the mass of a map if nothing else of N is left.
    """
    p, d = halves(c, contrast)
    scale_p, scale_n = halves(per_sample(scale, c), contrast)
    if d is None or scale_n is None:
        return scale_p * p
    scaled = scale_p * p
    return torch.cat((scaled, torch.where(d == p, scaled, scale_n * d + (scale_p - scale_n) * p)))


def mass_equation(x: Tensor, c: Tensor, contrast: bool) -> Tensor:
    """Masses: sum |x| |P| and, with contrast, sum |x| |P - D|: [T, B] in the dtype of its arguments."""
    p, d = halves(c, contrast)
    maps = p if d is None else torch.cat((p, p - d))
    return (x.abs() * maps.abs()).unsqueeze(-1).flatten(2).sum(-1, dtype=torch.float64).to(c.dtype)


def affine_factor_from(y: Tensor, gain: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """``|gain| (1 + sign(y - shift))``, with ``relu`` times ``2 [y > 0]``, in the dtype of its arguments."""
    factor = gain.abs() * (1 + (y - shift).sign())
    return torch.where(y > 0, 2 * factor, torch.zeros_like(factor)) if relu else factor
