"""Junctions ``z = a + b``: ``c_a = 2 [a > 0] c``, ``c_b = 2 [b > 0] c`` and the masses of both.

The masses are taken before the coefficients are rounded to the dtype they are stored in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ramp_fast.ops._common import affine_factor_from, compute_dtype, mass_equation, rescale_equation
from ramp_fast.ops._layout import same_layout
from ramp_fast.ops._registry import operator

Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # c_a, c_b, mass_a, mass_b


def _split_equation(
    c: Tensor, a: Tensor, b: Tensor, contrast: bool, a_dtype: torch.dtype, b_dtype: torch.dtype, relu: bool
) -> Parts:
    dtype = c.dtype
    if relu:
        c = torch.where(a.to(dtype) + b.to(dtype) > 0, 2 * c, torch.zeros((), dtype=dtype, device=c.device))
    c_a = torch.where(a > 0, 2 * c, torch.zeros((), dtype=dtype, device=c.device))
    c_b = torch.where(b > 0, 2 * c, torch.zeros((), dtype=dtype, device=c.device))
    mass_a = mass_equation(a.to(dtype), c_a, contrast)
    mass_b = mass_equation(b.to(dtype), c_b, contrast)
    return c_a.to(a_dtype), c_b.to(b_dtype), mass_a, mass_b


def _parts(c: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype, mass_dtype: torch.dtype) -> Parts:
    """Outputs, not written yet."""
    return (
        torch.empty_like(c, dtype=a_dtype),
        torch.empty_like(c, dtype=b_dtype),
        torch.empty(c.shape[:2], dtype=mass_dtype, device=c.device),
        torch.empty(c.shape[:2], dtype=mass_dtype, device=c.device),
    )


def _junction_outputs(
    c: Tensor, a: Tensor, b: Tensor, contrast: bool, b_dtype: torch.dtype | None, relu: bool
) -> Parts:
    return _parts(c, c.dtype, b_dtype or c.dtype, compute_dtype(c, a, b))


@operator(outputs=_junction_outputs, coefficients=("c",), samples=("a", "b"), triton="junction:junction")
def junction(
    c: Tensor, a: Tensor, b: Tensor, contrast: bool, b_dtype: torch.dtype | None = None, relu: bool = False
) -> Parts:
    """Split coefficients at ``z = a + b``.

    Parameters
    ----------
    c : Tensor [T, B, ...]
    a, b : Tensor [B, ...]
    contrast : bool
    b_dtype : torch.dtype, optional
        What c_b is stored in; that of c by default.
    relu : bool
        The sum goes through a ReLU first: ``2 [a + b > 0] c`` is what is split.

    Returns
    -------
    c_a, c_b : Tensor [T, B, ...]
        ``2 [a > 0] c`` and ``2 [b > 0] c``.
    mass_a, mass_b : Tensor [T, B]
        As :func:`ramp_fast.ops.mass` of (a, c_a) and (b, c_b).
    """
    c, a, b = same_layout((c,), (a, b))
    return _split_equation(c.to(compute_dtype(c, a, b)), a, b, contrast, c.dtype, b_dtype or c.dtype, relu)


def _merge_junction_outputs(*args: Any) -> Parts:
    first, _, second, _, _, _, _, b_dtype, _ = args
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    return _parts(first, out_dtype, b_dtype or out_dtype, compute_dtype(*args[:6]))


@operator(
    outputs=_merge_junction_outputs,
    coefficients=("first", "second"),
    samples=("a", "b"),
    triton="junction:merge_junction",
)
def merge_junction(
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    a: Tensor,
    b: Tensor,
    contrast: bool,
    b_dtype: torch.dtype | None = None,
    relu: bool = False,
) -> Parts:
    """Merge two branches and split at the next junction: ``junction(merge(...), a, b)`` in one pass over memory.

    Parameters
    ----------
    first, second : Tensor [T, B, ...]
    first_scale, second_scale : Tensor [T, B]
    a, b : Tensor [B, ...]
    contrast : bool
    b_dtype : torch.dtype, optional
        What c_b is stored in; the promoted dtype of first and second by default, which is that of c_a.
    relu : bool
        As for :func:`junction`.

    Returns
    -------
    c_a, c_b : Tensor [T, B, ...]
    mass_a, mass_b : Tensor [T, B]
    """
    dtype = compute_dtype(first, first_scale, second, second_scale, a, b)
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    first, second, a, b = same_layout((first, second), (a, b))
    c = rescale_equation(first.to(dtype), first_scale.to(dtype), contrast)
    c = c + rescale_equation(second.to(dtype), second_scale.to(dtype), contrast)
    c = torch.empty_like(first, dtype=dtype).copy_(c)  # in the layout of its operands
    return _split_equation(c, a, b, contrast, out_dtype, b_dtype or out_dtype, relu)


def _residual_outputs(*args: Any) -> Parts:
    first, _, second, *_, x_dtype = args
    out = first.dtype if second is None else torch.promote_types(first.dtype, second.dtype)
    return _parts(first, x_dtype or out, out, compute_dtype(*args[:8]))


@operator(outputs=_residual_outputs)
def residual_pullback(
    first: Tensor,
    first_scale: Tensor | None,
    second: Tensor | None,
    second_scale: Tensor | None,
    z: Tensor,
    b: Tensor,
    gain: Tensor,
    shift: Tensor,
    contrast: bool,
    x_dtype: torch.dtype | None = None,
) -> Parts:
    """Pull coefficients through ``z = relu(y + b)`` with a BatchNorm ``y = gain x + shift``, from z and b alone.

    :func:`junction` with its ReLU, then :func:`ramp_fast.ops.affine_pullback` at y. Where z is positive y is ``z - b``;
    elsewhere nothing is pulled back.

    Parameters
    ----------
    first, second : Tensor [T, B, ..., C]
        Coefficients of z from its one or two readers, channels innermost; None if there is no second one.
    first_scale, second_scale : Tensor [T, B] or None
        As for :func:`merge_junction`; None without second.
    z, b : Tensor [B, ..., C]
    gain, shift : Tensor [C]
    contrast : bool
    x_dtype : torch.dtype, optional
        What c_x is stored in; the promoted dtype of first and second by default, which is that of c_b.

    Returns
    -------
    c_x, c_b : Tensor [T, B, ..., C]
        Coefficients of the BatchNorm's input and of b.
    mass_y, mass_b : Tensor [T, B]
        Masses of y and b.
    """
    dtype = compute_dtype(first, first_scale, second, second_scale, z, b, gain, shift)
    c = first.to(dtype)
    if second is not None and first_scale is not None and second_scale is not None:
        c = rescale_equation(c, first_scale.to(dtype), contrast)
        c = c + rescale_equation(second.to(dtype), second_scale.to(dtype), contrast)
    z, b = z.to(dtype), b.to(dtype)
    y = z - b
    zero = torch.zeros((), dtype=dtype, device=c.device)
    c_y, c_b = (torch.where((z > 0) & (x > 0), 4 * c, zero) for x in (y, b))
    c_x = c_y * affine_factor_from(y, gain.to(dtype), shift.to(dtype), False)
    mass_y, mass_b = mass_equation(y, c_y, contrast), mass_equation(b, c_b, contrast)
    out = first.dtype if second is None else torch.promote_types(first.dtype, second.dtype)
    return c_x.to(x_dtype or out).contiguous(), c_b.to(out).contiguous(), mass_y, mass_b
