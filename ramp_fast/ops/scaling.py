"""Masses and scalings of coefficients: ``mass``, ``rescale``, ``merge``, ``scale_by``, ``ratio``, ``gate`` and others.

With ``contrast`` the leading axis of a coefficient holds T/2 rows P (positive) and then T/2 rows D = P - N, and
that of masses and scales the values of P and then of N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import (
    C,
    affine_factor_from,
    compute_dtype,
    contiguous_like,
    mass_equation,
    rescale_equation,
)
from ramp_fast.ops._layout import same_layout
from ramp_fast.ops._registry import operator


def _like(c: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(c)


@operator(
    outputs=lambda x, c, _: c.new_empty(c.shape[:2], dtype=compute_dtype(x, c)),
    coefficients=("c",),
    samples=("x",),
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
    dtype = compute_dtype(x, c)
    return mass_equation(x.to(dtype), c.to(dtype), contrast)


@operator(outputs=_like, coefficients=("c",), triton="scaling:rescale")
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
    dtype = compute_dtype(c, scale)
    (c,) = same_layout((c,), ())
    return torch.empty_like(c).copy_(rescale_equation(c.to(dtype), scale.to(dtype), contrast))


@operator(outputs=contiguous_like, triton="scaling:rescale_parts")
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
    dtype = compute_dtype(c, scale)
    # with parts in the place of samples
    by_part = c.movedim(3, 2).flatten(1, 2).to(dtype)
    scaled = rescale_equation(by_part, scale.flatten(1).to(dtype), contrast).to(c.dtype)
    return torch.unflatten(scaled, 1, (c.shape[1], c.shape[3])).movedim(2, 3).contiguous()


@operator(
    outputs=lambda first, _, second, *__: torch.empty_like(first, dtype=torch.promote_types(first.dtype, second.dtype)),
    coefficients=("first", "second"),
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
    dtype = compute_dtype(first, first_scale, second, second_scale)
    out_dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = same_layout((first, second), ())
    c = rescale_equation(first.to(dtype), first_scale.to(dtype), contrast)
    c = c + rescale_equation(second.to(dtype), second_scale.to(dtype), contrast)
    return torch.empty_like(first, dtype=out_dtype).copy_(c)


def _with_n_scaled(c: Tensor, n_scale: Tensor | None) -> Tensor:
    """N times ``n_scale`` on the pair (P, D), P as it is."""
    if n_scale is None:
        return c
    return rescale_equation(c, torch.cat((torch.ones_like(n_scale), n_scale)).to(c.dtype), True)


@operator(outputs=_like, coefficients=("c",), samples=("factor",), triton="scaling:scale_by")
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
    dtype = compute_dtype(c, factor, n_scale)
    c, factor = same_layout((c,), (factor,))
    out = _with_n_scaled(c.to(dtype), n_scale) * factor.to(dtype)
    return torch.empty_like(c).copy_(out)


@operator(outputs=_like, coefficients=("c",), samples=("x",), triton="scaling:gate")
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
    dtype = compute_dtype(c, x, n_scale)
    c, x = same_layout((c,), (x,))
    kept = torch.where(x > 0, 2 * _with_n_scaled(c.to(dtype), n_scale), torch.zeros((), dtype=dtype, device=c.device))
    return torch.empty_like(c).copy_(kept)


@operator(outputs=_like, coefficients=("c",), samples=("z", "d"), triton="scaling:ratio")
def ratio(c: Tensor, z: Tensor, d: Tensor, stabilizer: float = 0.0, side: int = 0) -> Tensor:
    """What rules with a denominator send back through their weights: ``c z / (d + stabilizer sign(d))``.

    Parameters
    ----------
    c : Tensor [T, B, ...]
    z : Tensor [B, ...]
        Outputs of the layer, so that ``c z`` is their relevance.
    d : Tensor [B, ...]
        Denominators.
    stabilizer : float
        The sign of 0 is plus.
    side : {0, 1, -1}
        Only outputs above zero (1) or below (-1) have any.

    Returns
    -------
    Tensor [T, B, ...] in the dtype of c
        0 where the denominator is 0.
    """
    dtype = compute_dtype(c, z, d)
    c, z, d = same_layout((c,), (z, d))
    below = d.to(dtype)
    below = below + stabilizer * ((below >= 0).to(dtype) * 2 - 1)
    factor = (z.to(dtype) / below).masked_fill(below == 0, 0)
    if side:
        factor = factor.masked_fill(side * z <= 0, 0)
    return torch.empty_like(c).copy_(c.to(dtype) * factor)


@operator(outputs=contiguous_like)
def affine_pullback(
    c: Tensor, y: Tensor, gain: Tensor, shift: Tensor, relu: bool, n_scale: Tensor | None = None
) -> Tensor:
    """Pull coefficients through a BatchNorm ``y = gain x + shift``, from its output alone.

    ``sign(x) gain + |gain|`` is ``|gain| (1 + sign(y - shift))``: x has the sign of ``y - shift`` times that of the
    gain, up to rounding where it is almost zero.

    Parameters
    ----------
    c : Tensor [T, B, ..., C]
        Channels innermost.
    y : Tensor [B, ..., C]
        The output, behind the ReLU with ``relu``.
    gain, shift : Tensor [C]
    relu : bool
        The factor is ``2 [y > 0]`` times that.
    n_scale : Tensor [T / 2, B], optional
        As for :func:`scale_by`.

    Returns
    -------
    Tensor [T, B, ..., C] in the dtype of c
    """
    dtype = compute_dtype(c, y, gain, shift, n_scale)
    factor = affine_factor_from(y.to(dtype), gain.to(dtype), shift.to(dtype), relu)
    return (_with_n_scaled(c.to(dtype), n_scale) * factor).to(c.dtype).contiguous()


# Coefficients of a map of a sample that `centring` compares, at most, and how many of them are neighbours.
CENTRE_SAMPLE, CENTRE_RUN = 2048, 32


def centring_runs(length: int) -> tuple[int, int]:
    """How many runs of neighbours the sample of a row has, and how far apart they begin; 0 runs are the whole row."""
    if length <= CENTRE_SAMPLE:
        return 0, 0
    runs = CENTRE_SAMPLE // CENTRE_RUN
    step = length // runs
    # Channels are a power of two, mostly: runs a multiple of it apart would see the same few.
    return runs, step - CENTRE_RUN if step % (2 * CENTRE_RUN) == 0 else step


def _centring_outputs(c: Tensor, factor: Tensor | None, gain: Tensor | None, shift: Tensor | None, _: bool) -> Tensor:
    shape = (c.shape[0] // 2, c.shape[1])
    return torch.empty(shape, dtype=compute_dtype(c, factor, gain, shift), device=c.device)


def _centring_cpu(c: Tensor, factor: Tensor | None, gain: Tensor | None, shift: Tensor | None, gate: bool) -> Tensor:
    out = _centring_outputs(c, factor, gain, shift, gate)
    x, size, offset = (None if t is None else t.contiguous() for t in (factor, gain, shift))
    runs, step = centring_runs(c.shape[2:].numel())
    C.centring(c.contiguous(), x, size, offset, gate, runs, step, out, get_num_threads())
    return out


@operator(outputs=_centring_outputs, cpu=_centring_cpu, triton="scaling:centring")
def centring(
    c: Tensor,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: bool = False,
) -> Tensor:
    """What N has to be multiplied by to be about as large as P, estimated from a sample of the coefficients.

    Parameters
    ----------
    c : Tensor [T, B, ...]
        Pairs (P, D).
    factor : Tensor [B, ...], optional
        Compare ``factor * c`` instead, with ``gate`` ``[factor > 0] c``.
    gain, shift : Tensor [C], optional
        Compare what :func:`affine_pullback` makes of c (``gate`` is its ``relu``); factor is its y then.
    gate : bool

    Returns
    -------
    Tensor [T / 2, B]
        ``sum |P| / sum |P - D|``; 1 where that is not positive and finite.
    """
    dtype = compute_dtype(c, factor, gain, shift)
    runs, step = centring_runs(c.shape[2:].numel())

    def sample(rows: Tensor) -> Tensor:
        """Of ``[..., M]`` the coefficients that are compared."""
        if runs:
            rows = rows[..., : runs * step].unflatten(-1, (runs, step))[..., :CENTRE_RUN].flatten(-2)
        return rows.to(dtype)

    p, d = sample(c.flatten(2) if c.ndim > 2 else c.unsqueeze(-1)).chunk(2)
    of_p, of_n = p.abs(), (p - d).abs()
    if factor is not None:
        x = sample(factor.flatten(1) if factor.ndim > 1 else factor.unsqueeze(-1))
        if gain is not None and shift is not None:
            size, offset = (sample(t.to(dtype).expand(c.shape[2:]).flatten()) for t in (gain, shift))
            weight = affine_factor_from(x, size, offset, gate)
        else:
            weight = (x > 0).to(dtype) if gate else x.abs()
        of_p, of_n = of_p * weight, of_n * weight
    alpha = of_p.sum(-1) / of_n.sum(-1)
    return alpha.masked_fill_(~((alpha > 0) & (alpha < torch.inf)), 1.0)  # one of the two is zero here
