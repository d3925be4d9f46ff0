"""Rotary embeddings, and what absLRP pulls back through them: ``rotary``, ``rotary_pullback``."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C, compute_dtype, contiguous_like, divide, mass_equation, rescale_equation
from ramp_fast.ops._layout import rows_dense
from ramp_fast.ops._registry import operator


def exchanged(t: Tensor, pair: int) -> Tensor:
    """Of every element its partner: halves of each run of ``2 pair`` elements of the last axis change places."""
    runs: Tensor = t.unflatten(-1, (-1, 2, pair))
    return runs.flip(-2).flatten(-3)


def _rotary_cpu(x: Tensor, stay: Tensor, cross: Tensor, pair: int) -> Tensor:
    y = contiguous_like(x)
    C.rotary(rows_dense(x), stay.contiguous(), cross.contiguous(), pair, y, get_num_threads())
    return y


@operator(outputs=contiguous_like, cpu=_rotary_cpu)
def rotary(x: Tensor, stay: Tensor, cross: Tensor, pair: int) -> Tensor:
    """A linear map of rows that adds to every element a multiple of its partner, as rotary embeddings do.

    Parameters
    ----------
    x : Tensor [B, H, N, D]
    stay, cross : Tensor [H or 1, rows, D]
        Of the last ``rows`` rows; those before them are moved as they are.
    pair : int
        How far partners are apart: 1 for neighbours, D / 2 for halves. A divisor of D / 2.

    Returns
    -------
    Tensor [B, H, N, D]
        ``stay x``, and ``cross x`` of the partner, in the dtype of x.
    """
    dtype = compute_dtype(x, stay, cross)
    first = x.shape[2] - stay.shape[1]
    own = x[:, :, first:].to(dtype)
    turned = stay.to(dtype) * own + exchanged(cross.to(dtype) * own, pair)
    return torch.cat([x[:, :, :first], turned.to(x.dtype)], 2)


def _pulled_outputs(
    c: Tensor, x: Tensor, y: Tensor | None, stay: Tensor, cross: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return contiguous_like(c), c.new_empty(c.shape[:2], dtype=compute_dtype(c, x, y, stay, cross))


def _rotary_pullback_cpu(
    c: Tensor, x: Tensor, y: Tensor | None, stay: Tensor, cross: Tensor, pair: int, target: Tensor, contrast: bool
) -> tuple[Tensor, Tensor]:
    out, mass = _pulled_outputs(c, x, y, stay, cross)
    weights = stay.contiguous(), cross.contiguous()
    c, x, y = rows_dense(c), rows_dense(x), None if y is None else rows_dense(y)
    C.rotary_pullback(c, x, y, *weights, pair, target.contiguous(), contrast, out, mass, get_num_threads())
    return out, mass


@operator(outputs=_pulled_outputs, cpu=_rotary_pullback_cpu)
def rotary_pullback(
    c: Tensor, x: Tensor, y: Tensor | None, stay: Tensor, cross: Tensor, pair: int, target: Tensor, contrast: bool
) -> tuple[Tensor, Tensor]:
    """Pull coefficients of :func:`rotary` back, and give them the mass that they stand for.

    Rows that are moved as they are keep their coefficients, and the others get ``sign(x) L^T c + |L|^T c``; each of the
    two parts has the mass afterwards that it had before.

    Parameters
    ----------
    c : Tensor [T, B, H, N, D]
        Of y, up to a positive factor for every map and sample.
    x : Tensor [B, H, N, D]
    y : Tensor [B, H, N, D] or None
        The map's output; not needed where no row is moved as it is.
    stay, cross : Tensor [H or 1, rows, D]
        Of the transpose: ``stay c``, and ``cross`` times the partner's ``c``.
    pair : int
        As of :func:`rotary`.
    target : Tensor [T, B]
        The mass of c.
    contrast : bool

    Returns
    -------
    c_x : Tensor [T, B, H, N, D]
        In the dtype of c, scaled to the mass below.
    mass : Tensor [T, B]
        ``target``, but for what arrives at rows whose x is zero; float32, or float64 if an operand is.
    """
    dtype = compute_dtype(c, x, y, stay, cross)
    first = x.shape[2] - stay.shape[1]
    c_y, target = c.to(dtype), target.to(dtype)
    own = c_y[:, :, :, first:]
    sign, stay, cross = x[:, :, first:].to(dtype).sign(), stay.to(dtype), cross.to(dtype)
    turned = (stay.abs() + sign * stay) * own + (cross.abs() + sign * cross) * exchanged(own, pair)
    below = mass_equation(x[:, :, first:].to(dtype), turned, contrast)
    if y is None:
        return rescale_equation(turned, divide(target, below), contrast).to(c.dtype), target * (below != 0)
    kept = mass_equation(y[:, :, :first].to(dtype), c_y[:, :, :, :first], contrast)
    above = mass_equation(y[:, :, first:].to(dtype), own, contrast)
    scale = divide(target, kept + above)
    arrives = scale * above * (below != 0)
    parts = (
        rescale_equation(c_y[:, :, :, :first], scale, contrast),
        rescale_equation(turned, divide(arrives, below), contrast),
    )
    return torch.cat(parts, 3).to(c.dtype), scale * kept + arrives
