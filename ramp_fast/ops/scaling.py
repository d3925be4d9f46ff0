"""Masses and scalings of coefficients: ``mass``, ``rescale``, ``rescale_parts``, ``merge``, ``scale_by``, ``gate``.

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


def _rescale_parts_reference(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    dtype = compute_dtype(c, scale)
    # with parts in the place of samples
    by_part = c.movedim(3, 2).flatten(1, 2).to(dtype)
    scaled = rescale_equation(by_part, scale.flatten(1).to(dtype), contrast).to(c.dtype)
    return torch.unflatten(scaled, 1, (c.shape[1], c.shape[3])).movedim(2, 3).contiguous()


def _rescale_parts_fake(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    return torch.empty_like(c, memory_format=torch.contiguous_format)


def _rescale_parts_cpu(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    out = _rescale_parts_fake(c, scale, contrast)
    C.rescale_parts(c.contiguous(), scale.contiguous(), out, contrast, get_num_threads())
    return out


_rescale_parts = register(
    "rescale_parts(Tensor c, Tensor scale, bool contrast) -> Tensor",
    reference=_rescale_parts_reference,
    fake=_rescale_parts_fake,
    cpu=_rescale_parts_cpu,
    triton="scaling:rescale_parts",
)


def rescale_parts(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    """:func:`rescale` for parts that lie side by side, each with its own scale.

    Parameters
    ----------
    c : Tensor [T, B, rows, parts, width]
    scale : Tensor [T, B, parts]
    contrast : bool

    Returns
    -------
    Tensor [T, B, rows, parts, width] in the dtype of c
    """
    return _rescale_parts(c, scale, contrast)  # type: ignore[no-any-return]


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


def _with_n_scaled(c: Tensor, n_scale: Tensor | None) -> Tensor:
    """N times ``n_scale`` on the pair (P, D), P as it is."""
    if n_scale is None:
        return c
    return rescale_equation(c, torch.cat((torch.ones_like(n_scale), n_scale)).to(c.dtype), True)


def _scale_by_reference(c: Tensor, factor: Tensor, n_scale: Tensor | None = None) -> Tensor:
    dtype = compute_dtype(c, factor, n_scale)
    c, factor = same_layout((c,), (factor,))
    out = _with_n_scaled(c.to(dtype), n_scale) * factor.to(dtype)
    return torch.empty_like(c).copy_(out)


def _scale_by_fake(c: Tensor, factor: Tensor, n_scale: Tensor | None = None) -> Tensor:
    c, factor = same_layout((c,), (factor,))
    return torch.empty_like(c)


def _diagonal_cpu(c: Tensor, factor: Tensor, n_scale: Tensor | None, gate: bool) -> Tensor:
    c, factor = same_layout((c,), (factor,))
    out = torch.empty_like(c)
    n_scale = None if n_scale is None else n_scale.contiguous()
    C.scale_by(c, factor, n_scale, out, gate, get_num_threads())
    return out


def _scale_by_cpu(c: Tensor, factor: Tensor, n_scale: Tensor | None = None) -> Tensor:
    return _diagonal_cpu(c, factor, n_scale, False)


_scale_by = register(
    "scale_by(Tensor c, Tensor factor, Tensor? n_scale=None) -> Tensor",
    reference=_scale_by_reference,
    fake=_scale_by_fake,
    cpu=_scale_by_cpu,
    triton="scaling:scale_by",
)


def scale_by(c: Tensor, factor: Tensor, n_scale: Tensor | None = None) -> Tensor:
    """Pull coefficients through a diagonal operation: ``c * factor``.

    Parameters
    ----------
    c : Tensor [T, B, ...]
    factor : Tensor [B, ...]
    n_scale : Tensor [T / 2, B], optional
        With contrast: N is multiplied by it in the same pass, ``D' = factor (n_scale D + (1 - n_scale) P)``.

    Returns
    -------
    Tensor [T, B, ...] in the dtype of c
    """
    return _scale_by(c, factor, n_scale)  # type: ignore[no-any-return]


def _gate_reference(c: Tensor, x: Tensor, n_scale: Tensor | None = None) -> Tensor:
    dtype = compute_dtype(c, x, n_scale)
    c, x = same_layout((c,), (x,))
    kept = torch.where(x > 0, 2 * _with_n_scaled(c.to(dtype), n_scale), torch.zeros((), dtype=dtype, device=c.device))
    return torch.empty_like(c).copy_(kept)


def _gate_cpu(c: Tensor, x: Tensor, n_scale: Tensor | None = None) -> Tensor:
    return _diagonal_cpu(c, x, n_scale, True)


_gate = register(
    "gate(Tensor c, Tensor x, Tensor? n_scale=None) -> Tensor",
    reference=_gate_reference,
    fake=_scale_by_fake,
    cpu=_gate_cpu,
    triton="scaling:gate",
)


def gate(c: Tensor, x: Tensor, n_scale: Tensor | None = None) -> Tensor:
    """Pull coefficients through a gate (ReLU, a linear layer of weight one): ``2 [x > 0] c``.

    Parameters
    ----------
    c : Tensor [T, B, ...]
    x : Tensor [B, ...]
    n_scale : Tensor [T / 2, B], optional
        As for :func:`scale_by`.

    Returns
    -------
    Tensor [T, B, ...] in the dtype of c
    """
    return _gate(c, x, n_scale)  # type: ignore[no-any-return]
