"""Masses and scalings of coefficients: ``mass``, ``rescale``, ``merge``, ``scale_by``, ``gate`` and their like.

With ``contrast`` the leading axis of a coefficient holds T/2 rows P (positive) and then T/2 rows D = P - N, and
that of masses and scales the values of P and then of N.
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
    C.scale_by(c, factor, n_scale, None, None, out, gate, get_num_threads())
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


def _affine_pullback_reference(
    c: Tensor, y: Tensor, gain: Tensor, shift: Tensor, relu: bool, n_scale: Tensor | None = None
) -> Tensor:
    dtype = compute_dtype(c, y, gain, shift, n_scale)
    factor = affine_factor_from(y.to(dtype), gain.to(dtype), shift.to(dtype), relu)
    return (_with_n_scaled(c.to(dtype), n_scale) * factor).to(c.dtype).contiguous()


def _affine_pullback_fake(
    c: Tensor, y: Tensor, gain: Tensor, shift: Tensor, relu: bool, n_scale: Tensor | None = None
) -> Tensor:
    return torch.empty_like(c, memory_format=torch.contiguous_format)


def _affine_pullback_cpu(
    c: Tensor, y: Tensor, gain: Tensor, shift: Tensor, relu: bool, n_scale: Tensor | None = None
) -> Tensor:
    out = torch.empty_like(c, memory_format=torch.contiguous_format)
    n_scale = None if n_scale is None else n_scale.contiguous()
    C.scale_by(
        c.contiguous(), y.contiguous(), n_scale, gain.contiguous(), shift.contiguous(), out, relu, get_num_threads()
    )
    return out


_affine_pullback = register(
    "affine_pullback(Tensor c, Tensor y, Tensor gain, Tensor shift, bool relu, Tensor? n_scale=None) -> Tensor",
    reference=_affine_pullback_reference,
    fake=_affine_pullback_fake,
    cpu=_affine_pullback_cpu,
)


def affine_pullback(
    c: Tensor, y: Tensor, gain: Tensor, shift: Tensor, relu: bool, n_scale: Tensor | None = None
) -> Tensor:
    """Pull coefficients through a BatchNorm ``y = gain x + shift``, of which only the output is at hand.

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
    return _affine_pullback(c, y, gain, shift, relu, n_scale)  # type: ignore[no-any-return]


# Coefficients that `centring` looks at, at most, per right-hand side and sample, and how many of them in a row.
CENTRE_SAMPLE, CENTRE_RUN = 2048, 32


def centring_runs(length: int) -> tuple[int, int]:
    """How many runs of a row are looked at, and how far apart they begin; none: the whole row."""
    if length <= CENTRE_SAMPLE:
        return 0, 0
    runs = CENTRE_SAMPLE // CENTRE_RUN
    step = length // runs
    # Channels are a power of two, mostly: runs a multiple of it apart would see the same few.
    return runs, step - CENTRE_RUN if step % (2 * CENTRE_RUN) == 0 else step


def centring_equation(
    c: Tensor,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: bool = False,
) -> Tensor:
    dtype = compute_dtype(c, factor, gain, shift)
    runs, step = centring_runs(c.shape[2:].numel())

    def sample(rows: Tensor) -> Tensor:
        """``[..., M]`` without what is not looked at."""
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


def _centring_fake(
    c: Tensor,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: bool = False,
) -> Tensor:
    shape = (c.shape[0] // 2, c.shape[1])
    return torch.empty(shape, dtype=compute_dtype(c, factor, gain, shift), device=c.device)


def _centring_cpu(
    c: Tensor,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: bool = False,
) -> Tensor:
    out = _centring_fake(c, factor, gain, shift)
    x, size, offset = (None if t is None else t.contiguous() for t in (factor, gain, shift))
    runs, step = centring_runs(c.shape[2:].numel())
    C.centring(c.contiguous(), x, size, offset, gate, runs, step, out, get_num_threads())
    return out


_centring = register(
    "centring(Tensor c, Tensor? factor=None, Tensor? gain=None, Tensor? shift=None, bool gate=False) -> Tensor",
    reference=centring_equation,
    fake=_centring_fake,
    cpu=_centring_cpu,
    triton="scaling:centring",
)


def centring(
    c: Tensor,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: bool = False,
) -> Tensor:
    """What N has to be multiplied by to become about as large as P, from a sample of the coefficients.

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
    return _centring(c, factor, gain, shift, gate)  # type: ignore[no-any-return]
