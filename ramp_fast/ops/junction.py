"""Junctions ``z = a + b``: ``c_a = 2 [a > 0] c``, ``c_b = 2 [b > 0] c`` and the masses of both.

The masses are taken before the coefficients are rounded to the dtype they are stored in.
"""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import (
    C,
    affine_factor_from,
    compute_dtype,
    mass_equation,
    rescale_equation,
    same_layout,
)
from ramp_fast.ops._registry import register

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


def _junction_reference(
    c: Tensor, a: Tensor, b: Tensor, contrast: bool, b_dtype: torch.dtype | None = None, relu: bool = False
) -> Parts:
    c, a, b = same_layout((c,), (a, b))
    return _split_equation(c.to(compute_dtype(c, a, b)), a, b, contrast, c.dtype, b_dtype or c.dtype, relu)


def _junction_fake(
    c: Tensor, a: Tensor, b: Tensor, contrast: bool, b_dtype: torch.dtype | None = None, relu: bool = False
) -> Parts:
    c, a, b = same_layout((c,), (a, b))
    return _parts(c, c.dtype, b_dtype or c.dtype, compute_dtype(c, a, b))


def _junction_cpu(
    c: Tensor, a: Tensor, b: Tensor, contrast: bool, b_dtype: torch.dtype | None = None, relu: bool = False
) -> Parts:
    c, a, b = same_layout((c,), (a, b))
    parts = _parts(c, c.dtype, b_dtype or c.dtype, compute_dtype(c, a, b))
    C.junction(c, a, b, *parts, contrast, relu, get_num_threads())
    return parts


_junction = register(
    "junction(Tensor c, Tensor a, Tensor b, bool contrast, ScalarType? b_dtype=None, bool relu=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_junction_reference,
    fake=_junction_fake,
    cpu=_junction_cpu,
    triton="junction:junction",
)


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
    return _junction(c, a, b, contrast, b_dtype, relu)  # type: ignore[no-any-return]


def _merge_junction_reference(
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
    dtype = compute_dtype(first, first_scale, second, second_scale, a, b)
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    first, second, a, b = same_layout((first, second), (a, b))
    c = rescale_equation(first.to(dtype), first_scale.to(dtype), contrast)
    c = c + rescale_equation(second.to(dtype), second_scale.to(dtype), contrast)
    c = torch.empty_like(first, dtype=dtype).copy_(c)  # in the layout of its operands
    return _split_equation(c, a, b, contrast, out_dtype, b_dtype or out_dtype, relu)


def _merge_junction_fake(
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
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    mass_dtype = compute_dtype(first, first_scale, second, second_scale, a, b)
    first, second, a, b = same_layout((first, second), (a, b))
    return _parts(first, out_dtype, b_dtype or out_dtype, mass_dtype)


def _merge_junction_cpu(
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
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    mass_dtype = compute_dtype(first, first_scale, second, second_scale, a, b)
    first, second, a, b = same_layout((first, second), (a, b))
    parts = _parts(first, out_dtype, b_dtype or out_dtype, mass_dtype)
    scales = first_scale.contiguous(), second_scale.contiguous()
    C.merge_junction(first, scales[0], second, scales[1], a, b, *parts, contrast, relu, get_num_threads())
    return parts


_merge_junction = register(
    "merge_junction(Tensor first, Tensor first_scale, Tensor second, Tensor second_scale, Tensor a, Tensor b,"
    " bool contrast, ScalarType? b_dtype=None, bool relu=False) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_merge_junction_reference,
    fake=_merge_junction_fake,
    cpu=_merge_junction_cpu,
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
    return _merge_junction(  # type: ignore[no-any-return]
        first, first_scale, second, second_scale, a, b, contrast, b_dtype, relu
    )


def _residual_pullback_reference(
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


def _residual_pullback_fake(
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
    mass_dtype = compute_dtype(first, first_scale, second, second_scale, z, b, gain, shift)
    out = first.dtype if second is None else torch.promote_types(first.dtype, second.dtype)
    return _parts(first.contiguous(), x_dtype or out, out, mass_dtype)


def _residual_pullback_cpu(
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
    def dense(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous()

    parts = _residual_pullback_fake(first, first_scale, second, second_scale, z, b, gain, shift, contrast, x_dtype)
    readers = first.contiguous(), dense(first_scale), dense(second), dense(second_scale)
    operands = z.contiguous(), b.contiguous(), gain.contiguous(), shift.contiguous()
    C.residual_pullback(*readers, *operands, *parts, contrast, get_num_threads())
    return parts


_residual_pullback = register(
    "residual_pullback(Tensor first, Tensor? first_scale, Tensor? second, Tensor? second_scale, Tensor z, Tensor b,"
    " Tensor gain, Tensor shift, bool contrast, ScalarType? x_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_residual_pullback_reference,
    fake=_residual_pullback_fake,
    cpu=_residual_pullback_cpu,
)


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

    ``junction`` with its ReLU, then :func:`ramp_fast.ops.affine_pullback` at y, which is ``z - b`` wherever z is
    positive and nothing elsewhere.

    Parameters
    ----------
    first, second : Tensor [T, B, ..., C]
        What one or two readers of z say, channels innermost; None: there is no second one.
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
    return _residual_pullback(  # type: ignore[no-any-return]
        first, first_scale, second, second_scale, z, b, gain, shift, contrast, x_dtype
    )
