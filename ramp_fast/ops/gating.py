"""Gates between parts of one tensor, as SwiGLU has them: ``gating_pullback``, and ``rescale_pieces`` for any parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C, compute_dtype, contiguous_like, mass_equation, rescale_equation
from ramp_fast.ops._layout import rows_dense
from ramp_fast.ops._registry import operator


def _gating_outputs(
    c: Tensor, a: Tensor, b: Tensor, x: Tensor | None, factor: Tensor | None, contrast: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(c, a, b, x, factor)
    masses = [c.new_empty(c.shape[:2], dtype=dtype) for _ in range(2)]
    return contiguous_like(c), contiguous_like(c), masses[0], masses[1]


def _gating_pullback_cpu(
    c: Tensor, a: Tensor, b: Tensor, x: Tensor | None, factor: Tensor | None, contrast: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _gating_outputs(c, a, b, x, factor, contrast)
    values = rows_dense(a), rows_dense(b), None if x is None else rows_dense(x)
    C.gating_pullback(
        c.contiguous(), *values, None if factor is None else factor.contiguous(), contrast, *out, get_num_threads()
    )
    return out


@operator(outputs=_gating_outputs, cpu=_gating_pullback_cpu)
def gating_pullback(
    c: Tensor, a: Tensor, b: Tensor, x: Tensor | None, factor: Tensor | None, contrast: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pull coefficients of ``a b`` back to both, and on through an activation ``a = f(x)``.

    Parameters
    ----------
    c : Tensor [T, B, rows, width]
    a, b : Tensor [B, rows, width]
    x, factor : Tensor [B, rows, width] or None
        What a is the activation of, and its factor (:func:`ramp_fast.ops.activation_factor`); both or none.
    contrast : bool

    Returns
    -------
    c_a : Tensor [T, B, rows, width]
        ``2 [a b > 0] |b| c`` in the dtype of c, with a factor times that: coefficients of x.
    c_b : Tensor [T, B, rows, width]
        ``2 [a b > 0] |a| c``.
    mass_a, mass_b : Tensor [T, B]
        As :func:`ramp_fast.ops.mass` of (a, c_a), or (x, c_a), and (b, c_b), before these are rounded; float32, or
        float64 if an operand is.
    """
    dtype = compute_dtype(c, a, b, x, factor)
    a, b = a.to(dtype), b.to(dtype)
    gated = torch.where(a * b > 0, 2 * c.to(dtype), torch.zeros((), dtype=dtype, device=c.device))
    c_a, c_b, at = gated * b.abs(), gated * a.abs(), a
    if x is not None and factor is not None:
        c_a, at = c_a * factor.to(dtype), x.to(dtype)
    masses = mass_equation(at, c_a, contrast), mass_equation(b, c_b, contrast)
    return c_a.to(c.dtype).contiguous(), c_b.to(c.dtype).contiguous(), *masses


def _pieces_output(pieces: Sequence[Tensor], scales: Tensor, contrast: bool) -> Tensor:
    first = pieces[0]
    dtype = first.dtype
    for piece in pieces:
        dtype = torch.promote_types(dtype, piece.dtype)
    rhs, batch, heads, rows, width = first.shape
    return first.new_empty((rhs, batch, rows, len(pieces), heads, width), dtype=dtype)


def _rescale_pieces_cpu(pieces: Sequence[Tensor], scales: Tensor, contrast: bool) -> Tensor:
    out = _pieces_output(pieces, scales, contrast)
    C.rescale_pieces([rows_dense(t) for t in pieces], scales.contiguous(), contrast, out, get_num_threads())
    return out


@operator(outputs=_pieces_output, cpu=_rescale_pieces_cpu)
def rescale_pieces(pieces: Sequence[Tensor], scales: Tensor, contrast: bool) -> Tensor:
    """Put pieces side by side, each :func:`rescaled <ramp_fast.ops.rescale>` by its own scale on the way.

    Parameters
    ----------
    pieces : sequence of n Tensor [T, B, H, N, D]
    scales : Tensor [n, T, B]
    contrast : bool

    Returns
    -------
    Tensor [T, B, N, n, H, D]
        The order of the outputs of a layer that computes q, k and v, in the promoted dtype of the pieces.
    """
    out = _pieces_output(pieces, scales, contrast)
    for place, piece, own in zip(out.unbind(3), pieces, scales, strict=True):
        dtype = compute_dtype(piece, own)
        place.copy_(rescale_equation(piece.to(dtype), own.to(dtype), contrast).transpose(2, 3))
    return out
