"""Masses and scalings of coefficients: ``mass``, ``rescale``, ``merge``, ``scale_by``, ``gate``.

With ``contrast`` the leading axis of a coefficient holds T/2 rows P (positive) and then T/2 rows D = P - N, and
that of masses and scales the values of P and then of N.
"""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import (
    C,
    compute_dtype,
    mass_equation,
    rescale_equation,
    same_layout,
)
from ramp_fast.ops._registry import register


def _mass_reference(x: Tensor, c: Tensor, contrast: bool) -> Tensor:
    dtype = compute_dtype(x, c)
    return mass_equation(x.to(dtype), c.to(dtype), contrast)


def _mass_fake(x: Tensor, c: Tensor, contrast: bool) -> Tensor:
    return c.new_empty(c.shape[:2], dtype=compute_dtype(x, c))


def _mass_cpu(x: Tensor, c: Tensor, contrast: bool) -> Tensor:
    c, x = same_layout((c,), (x,))
    out = torch.empty(c.shape[:2], dtype=compute_dtype(x, c))
    C.mass(x, c, out, contrast, get_num_threads())
    return out


_mass = register(
    "mass(Tensor x, Tensor c, bool contrast) -> Tensor",
    reference=_mass_reference,
    fake=_mass_fake,
    cpu=_mass_cpu,
    triton="scaling:mass",
)


def mass(x: Tensor, c: Tensor, contrast: bool) -> Tensor:
    """Relevance masses of each sample: sums of ``|x| |c|``.

    Parameters
    ----------
    x : Tensor [B, ...]
    c : Tensor [T, B, ...]
    contrast : bool

    Returns
    -------
    Tensor [T, B]
        float32, or float64 if an operand is. With contrast the second half is ``sum |x| |P - D|``.
    """
    return _mass(x, c, contrast)  # type: ignore[no-any-return]


def _rescale_reference(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    dtype = compute_dtype(c, scale)
    (c,) = same_layout((c,), ())
    return torch.empty_like(c).copy_(rescale_equation(c.to(dtype), scale.to(dtype), contrast))


def _rescale_fake(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    (c,) = same_layout((c,), ())
    return torch.empty_like(c)


def _rescale_cpu(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    (c,) = same_layout((c,), ())
    out = torch.empty_like(c)
    C.rescale(c, scale.contiguous(), out, contrast, get_num_threads())
    return out


_rescale = register(
    "rescale(Tensor c, Tensor scale, bool contrast) -> Tensor",
    reference=_rescale_reference,
    fake=_rescale_fake,
    cpu=_rescale_cpu,
    triton="scaling:rescale",
)


def rescale(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    """Scale each map of each sample: ``s c``, or with contrast ``P' = s_P P``, ``D' = s_N D + (s_P - s_N) P``.

    Parameters
    ----------
    c : Tensor [T, B, ...]
    scale : Tensor [T, B]
    contrast : bool

    Returns
    -------
    Tensor [T, B, ...] in the dtype of c
    """
    return _rescale(c, scale, contrast)  # type: ignore[no-any-return]


def _merge_reference(
    first: Tensor, first_scale: Tensor, second: Tensor, second_scale: Tensor, contrast: bool
) -> Tensor:
    dtype = compute_dtype(first, first_scale, second, second_scale)
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = same_layout((first, second), ())
    c = rescale_equation(first.to(dtype), first_scale.to(dtype), contrast)
    c = c + rescale_equation(second.to(dtype), second_scale.to(dtype), contrast)
    return torch.empty_like(first, dtype=out_dtype).copy_(c)


def _merge_fake(first: Tensor, first_scale: Tensor, second: Tensor, second_scale: Tensor, contrast: bool) -> Tensor:
    first, second = same_layout((first, second), ())
    return torch.empty_like(first, dtype=torch.promote_types(first.dtype, second.dtype))


def _merge_cpu(first: Tensor, first_scale: Tensor, second: Tensor, second_scale: Tensor, contrast: bool) -> Tensor:
    first, second = same_layout((first, second), ())
    out = torch.empty_like(first, dtype=torch.promote_types(first.dtype, second.dtype))
    C.merge(first, first_scale.contiguous(), second, second_scale.contiguous(), out, contrast, get_num_threads())
    return out


_merge = register(
    "merge(Tensor first, Tensor first_scale, Tensor second, Tensor second_scale, bool contrast) -> Tensor",
    reference=_merge_reference,
    fake=_merge_fake,
    cpu=_merge_cpu,
    triton="scaling:merge",
)


def merge(first: Tensor, first_scale: Tensor, second: Tensor, second_scale: Tensor, contrast: bool) -> Tensor:
    """Add two scaled coefficients where branches meet: ``rescale(first) + rescale(second)``.

    Parameters
    ----------
    first, second : Tensor [T, B, ...]
    first_scale, second_scale : Tensor [T, B]
    contrast : bool

    Returns
    -------
    Tensor [T, B, ...] in the promoted dtype of first and second
    """
    return _merge(first, first_scale, second, second_scale, contrast)  # type: ignore[no-any-return]


def _scale_by_reference(c: Tensor, factor: Tensor) -> Tensor:
    dtype = compute_dtype(c, factor)
    c, factor = same_layout((c,), (factor,))
    return (c.to(dtype) * factor.to(dtype)).to(c.dtype)


def _scale_by_fake(c: Tensor, factor: Tensor) -> Tensor:
    c, factor = same_layout((c,), (factor,))
    return torch.empty_like(c)


def _scale_by_cpu(c: Tensor, factor: Tensor) -> Tensor:
    c, factor = same_layout((c,), (factor,))
    out = torch.empty_like(c)
    C.scale_by(c, factor, out, False, get_num_threads())
    return out


_scale_by = register(
    "scale_by(Tensor c, Tensor factor) -> Tensor",
    reference=_scale_by_reference,
    fake=_scale_by_fake,
    cpu=_scale_by_cpu,
    triton="scaling:scale_by",
)


def scale_by(c: Tensor, factor: Tensor) -> Tensor:
    """Pull coefficients through a diagonal operation: ``c * factor``.

    Parameters
    ----------
    c : Tensor [T, B, ...]
    factor : Tensor [B, ...]

    Returns
    -------
    Tensor [T, B, ...] in the dtype of c
    """
    return _scale_by(c, factor)  # type: ignore[no-any-return]


def _gate_reference(c: Tensor, x: Tensor) -> Tensor:
    c, x = same_layout((c,), (x,))
    return torch.where(x > 0, 2 * c, torch.zeros((), dtype=c.dtype, device=c.device))


def _gate_cpu(c: Tensor, x: Tensor) -> Tensor:
    c, x = same_layout((c,), (x,))
    out = torch.empty_like(c)
    C.scale_by(c, x, out, True, get_num_threads())
    return out


_gate = register(
    "gate(Tensor c, Tensor x) -> Tensor",
    reference=_gate_reference,
    fake=_scale_by_fake,
    cpu=_gate_cpu,
    triton="scaling:gate",
)


def gate(c: Tensor, x: Tensor) -> Tensor:
    """Pull coefficients through a gate (ReLU, a linear layer of weight one): ``2 [x > 0] c``.

    Parameters
    ----------
    c : Tensor [T, B, ...]
    x : Tensor [B, ...]

    Returns
    -------
    Tensor [T, B, ...] in the dtype of c
    """
    return _gate(c, x)  # type: ignore[no-any-return]
