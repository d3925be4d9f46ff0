"""Masses and scalings of coefficients, one pass over memory each.

    mass:   sum |x| |P|, sum |x| |P - D|                  rescale:  P <- s_P P, D <- s_N D + (s_P - s_N) P
    merge:  rescale(first) + rescale(second)              scale_by: c * factor,  gate: 2 [x > 0] c
    ratio:  c z / (d + stabilizer sign(d))

``rescale_parts`` has a scale for each part of a row; scale_by and gate may scale N as well.

With contrast rows [0, T/2) of c are P and rows [T/2, T) are D = P - N. One program per sample and block of elements,
which sees every map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import compute_dtype, sum_partials
from ramp_fast.ops._layout import same_layout
from ramp_fast.ops.scaling import CENTRE_RUN, centring_runs

BLOCK = 2048
WARPS = 8


@triton.jit
def block_of_sample(inner, BLOCK: tl.constexpr):
    """Sample, block and elements of a program, and which of these exist."""
    blocks = tl.cdiv(inner, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    elements = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return sample, block, elements, elements < inner


@triton.jit
def load_pair(
    c_ptr,  # [T, B, inner]
    row,  # of P in [T, B]
    row_d,  # of D
    inner,
    elements,
    inside,
    CONTRAST: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Elements of P and D, or those of a single map twice."""
    p = tl.load(c_ptr + row * inner + elements, mask=inside, other=0.0).to(COMPUTE)
    d = p
    if CONTRAST:
        d = tl.load(c_ptr + row_d * inner + elements, mask=inside, other=0.0).to(COMPUTE)
    return p, d


@triton.jit
def store_pair(out_ptr, row, row_d, inner, elements, inside, p, d, CONTRAST: tl.constexpr):
    tl.store(out_ptr + row * inner + elements, p.to(out_ptr.dtype.element_ty), mask=inside)
    if CONTRAST:
        tl.store(out_ptr + row_d * inner + elements, d.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_masses(masses_ptr, row, row_d, blocks, block, of_p, of_n, CONTRAST: tl.constexpr):
    """The sums of the masses of P and N over one block."""
    tl.store(masses_ptr + row * blocks + block, tl.sum(of_p, 0))
    if CONTRAST:
        tl.store(masses_ptr + row_d * blocks + block, tl.sum(of_n, 0))


@triton.jit
def rescaled_pair(p, d, scale_p, scale_n, CONTRAST: tl.constexpr):
    """P and D after scaling, or the single map twice; and where N is zero."""
    scaled = scale_p * p
    if CONTRAST:
        return scaled, tl.where(d == p, scaled, scale_n * d + (scale_p - scale_n) * p), d == p
    else:
        return scaled, scaled, p == p


@triton.jit
def load_rescaled_pair(
    c_ptr,
    scale_ptr,  # [T, B]
    row,
    row_d,
    inner,
    elements,
    inside,
    CONTRAST: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    p, d = load_pair(c_ptr, row, row_d, inner, elements, inside, CONTRAST, COMPUTE)
    scale_p = tl.load(scale_ptr + row).to(COMPUTE)
    scale_n = scale_p
    if CONTRAST:
        scale_n = tl.load(scale_ptr + row_d).to(COMPUTE)
    return rescaled_pair(p, d, scale_p, scale_n, CONTRAST)


@triton.jit
def load_merged_pair(
    first_ptr,
    first_scale_ptr,
    second_ptr,
    second_scale_ptr,
    row,
    row_d,
    inner,
    elements,
    inside,
    CONTRAST: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The sum of two scaled pairs. Where N is zero in both, D is P to the last bit: a fused product would round it."""
    p, d, zero = load_rescaled_pair(first_ptr, first_scale_ptr, row, row_d, inner, elements, inside, CONTRAST, COMPUTE)
    q, e, zero_too = load_rescaled_pair(
        second_ptr, second_scale_ptr, row, row_d, inner, elements, inside, CONTRAST, COMPUTE
    )
    p += q
    return p, tl.where(zero & zero_too, p, d + e)


@triton.jit(do_not_specialize=["batch"])
def merge_kernel(
    first_ptr,  # [T, B, inner]
    first_scale_ptr,  # [T, B]
    second_ptr,  # as first; these two are not read unless SECOND
    second_scale_ptr,
    out_ptr,  # [T, B, inner]
    batch,  # B
    inner,
    NUM_MAPS: tl.constexpr,  # T
    CONTRAST: tl.constexpr,
    SECOND: tl.constexpr,
    COMPUTE: tl.constexpr,  # float32 or float64
    BLOCK: tl.constexpr,
):
    sample, _block, elements, inside = block_of_sample(inner, BLOCK)
    GROUPS: tl.constexpr = NUM_MAPS // 2 if CONTRAST else NUM_MAPS
    for t in range(GROUPS):
        row = t * batch.to(tl.int64) + sample
        row_d = row + GROUPS * batch.to(tl.int64)
        if SECOND:
            p, d = load_merged_pair(
                *(first_ptr, first_scale_ptr, second_ptr, second_scale_ptr),
                *(row, row_d, inner, elements, inside, CONTRAST, COMPUTE),
            )
        else:
            p, d, _ = load_rescaled_pair(
                first_ptr, first_scale_ptr, row, row_d, inner, elements, inside, CONTRAST, COMPUTE
            )
        store_pair(out_ptr, row, row_d, inner, elements, inside, p, d, CONTRAST)


@triton.jit(do_not_specialize=["batch"])
def mass_kernel(
    x_ptr,  # [B, inner]
    c_ptr,  # [T, B, inner]
    masses_ptr,  # [T, B, blocks]
    batch,
    inner,
    NUM_MAPS: tl.constexpr,
    CONTRAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, block, elements, inside = block_of_sample(inner, BLOCK)
    blocks = tl.cdiv(inner, BLOCK)
    x = tl.abs(tl.load(x_ptr + sample * inner + elements, mask=inside, other=0.0).to(COMPUTE))
    GROUPS: tl.constexpr = NUM_MAPS // 2 if CONTRAST else NUM_MAPS
    for t in range(GROUPS):
        row = t * batch.to(tl.int64) + sample
        row_d = row + GROUPS * batch.to(tl.int64)
        p, d = load_pair(c_ptr, row, row_d, inner, elements, inside, CONTRAST, COMPUTE)
        store_masses(masses_ptr, row, row_d, blocks, block, x * tl.abs(p), x * tl.abs(p - d), CONTRAST)


@triton.jit(do_not_specialize=["batch"])
def rescale_parts_kernel(
    c_ptr,  # [T, B, rows, parts, width]
    scale_ptr,  # [T, B, parts]
    out_ptr,  # as c
    batch,  # B
    inner,  # rows * parts * width
    parts,
    width,
    NUM_MAPS: tl.constexpr,  # T
    CONTRAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _block, elements, inside = block_of_sample(inner, BLOCK)
    part = elements // width % parts
    GROUPS: tl.constexpr = NUM_MAPS // 2 if CONTRAST else NUM_MAPS
    for t in range(GROUPS):
        row = t * batch.to(tl.int64) + sample
        row_d = row + GROUPS * batch.to(tl.int64)
        p, d = load_pair(c_ptr, row, row_d, inner, elements, inside, CONTRAST, COMPUTE)
        scale_p = tl.load(scale_ptr + row * parts + part, mask=inside, other=0.0).to(COMPUTE)
        scale_n = scale_p
        if CONTRAST:
            scale_n = tl.load(scale_ptr + row_d * parts + part, mask=inside, other=0.0).to(COMPUTE)
        p, d, _ = rescaled_pair(p, d, scale_p, scale_n, CONTRAST)
        store_pair(out_ptr, row, row_d, inner, elements, inside, p, d, CONTRAST)


@triton.jit
def _diagonal(c, x, GATE: tl.constexpr):
    if GATE:
        return tl.where(x > 0, 2 * c, 0.0)
    else:
        return c * x


@triton.jit(do_not_specialize=["batch"])
def scale_by_kernel(
    c_ptr,  # [T, B, inner]
    x_ptr,  # [B, inner]
    n_scale_ptr,  # [T / 2, B]; not read unless N_SCALED
    out_ptr,  # [T, B, inner]
    batch,  # B
    inner,
    NUM_MAPS: tl.constexpr,
    GATE: tl.constexpr,  # 2 [x > 0] c instead of x c
    N_SCALED: tl.constexpr,  # N times n_scale as well
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    map_size = batch.to(tl.int64) * inner
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < map_size
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(COMPUTE)
    GROUPS: tl.constexpr = NUM_MAPS // 2 if N_SCALED else NUM_MAPS
    for t in range(GROUPS):
        offset = t * map_size + place
        p = tl.load(c_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
        tl.store(out_ptr + offset, _diagonal(p, x, GATE).to(out_ptr.dtype.element_ty), mask=inside)
        if N_SCALED:
            scale = tl.load(n_scale_ptr + t * batch + place // inner, mask=inside, other=0.0).to(COMPUTE)
            offset += GROUPS * map_size
            d = tl.load(c_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
            d = tl.where(d == p, p, scale * d + (1 - scale) * p)
            tl.store(out_ptr + offset, _diagonal(d, x, GATE).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def ratio_kernel(
    c_ptr,  # [T, B, inner]
    z_ptr,  # [B, inner]
    d_ptr,  # [B, inner]
    out_ptr,  # [T, B, inner]
    stabilizer_ptr,  # one number
    batch,  # B
    inner,
    NUM_MAPS: tl.constexpr,
    SIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    map_size = batch.to(tl.int64) * inner
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < map_size
    z = tl.load(z_ptr + place, mask=inside, other=0.0).to(COMPUTE)
    d = tl.load(d_ptr + place, mask=inside, other=1.0).to(COMPUTE)
    stabilizer = tl.load(stabilizer_ptr)
    below = d + tl.where(d < 0, -stabilizer, stabilizer)
    factor = tl.where(below == 0, 0.0, z / below)
    if SIDE != 0:
        factor = tl.where(SIDE * z <= 0, 0.0, factor)
    for t in range(NUM_MAPS):
        offset = t * map_size + place
        c = tl.load(c_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
        tl.store(out_ptr + offset, (c * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def centring_kernel(
    c_ptr,  # [T, B, inner]
    x_ptr,  # [B, inner]; not read unless WEIGHTED
    gain_ptr,  # [CHANNELS]; this and the next are not read unless AFFINE
    shift_ptr,  # [CHANNELS]
    out_ptr,  # [T / 2, B]
    to_d,  # T / 2 B inner
    batch,  # B
    inner,
    step,  # between two runs
    COUNT: tl.constexpr,  # numbers looked at
    RUN: tl.constexpr,  # so many are neighbours
    CHANNELS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    AFFINE: tl.constexpr,  # c is compared behind affine_pullback, whose y is x and whose relu is GATE
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # in [T / 2, B]
    number = tl.arange(0, BLOCK)
    inside = number < COUNT
    element = number // RUN * step + number % RUN
    p = tl.load(c_ptr + row * inner + element, mask=inside, other=0.0).to(tl.float64)
    d = tl.load(c_ptr + to_d + row * inner + element, mask=inside, other=0.0).to(tl.float64)
    of_p = tl.abs(p)
    of_n = tl.abs(p - d)
    if WEIGHTED:
        x = tl.load(x_ptr + row % batch * inner + element, mask=inside, other=0.0).to(tl.float64)
        if AFFINE:
            gain = tl.load(gain_ptr + element % CHANNELS).to(tl.float64)
            shift = tl.load(shift_ptr + element % CHANNELS).to(tl.float64)
            weight = tl.abs(gain) * tl.where(x > shift, 2.0, tl.where(x < shift, 0.0, 1.0))
            if GATE:
                weight = tl.where(x > 0, 2 * weight, 0.0)
        elif GATE:
            weight = tl.where(x > 0, 1.0, 0.0)
        else:
            weight = tl.abs(x)
        of_p *= weight
        of_n *= weight
    alpha = tl.sum(of_p, 0) / tl.sum(of_n, 0)
    alpha = tl.where((alpha > 0) & (alpha < float("inf")), alpha, 1.0)
    tl.store(out_ptr + row, alpha.to(out_ptr.dtype.element_ty))


def check_shapes(c: Tensor, samples: tuple[Tensor, ...], scales: tuple[Tensor, ...], contrast: bool) -> None:
    """Shapes of coefficients [T, B, ...], of samples [B, ...] and of scales [T, B]."""
    if c.ndim < 2:
        raise ValueError(f"c must be [T, B, ...], not {list(c.shape)}")
    for x in samples:
        if x.shape != c.shape[1:]:
            raise ValueError(f"c {list(c.shape)} and x {list(x.shape)} do not fit together: x must be [B, ...]")
    for scale in scales:
        if scale.shape != c.shape[:2]:
            raise ValueError(f"scale {list(scale.shape)} must have shape {list(c.shape[:2])}")
    if contrast and c.shape[0] % 2:
        raise ValueError(f"c {list(c.shape)}: with contrast the first axis holds P and D rows and must be even")


def inner_size(c: Tensor) -> int:
    """Elements of one sample."""
    return c[0, 0].numel() if c.shape[0] and c.shape[1] else 0


def mass(x: Tensor, c: Tensor, contrast: bool) -> Tensor:
    """``ramp_fast::mass`` for x [B, ...] and c [T, B, ...]."""
    check_shapes(c, (x,), (), contrast)
    c, x = same_layout((c,), (x,))
    dtype, compute = compute_dtype(x, c)
    num_maps, batch = c.shape[:2]
    blocks = triton.cdiv(inner_size(c), BLOCK)
    masses = torch.empty((num_maps, batch, blocks), dtype=dtype, device=c.device)
    if masses.numel():
        with torch.cuda.device_of(c):
            mass_kernel[(batch * blocks,)](
                *(x, c, masses, batch, inner_size(c)),
                NUM_MAPS=num_maps,
                CONTRAST=contrast,
                COMPUTE=compute,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return sum_partials(masses)


def _merge(first: Tensor, first_scale: Tensor, second: Tensor | None, scale: Tensor | None, contrast: bool) -> Tensor:
    out_dtype = first.dtype if second is None else torch.promote_types(first.dtype, second.dtype)
    out = torch.empty_like(first, dtype=out_dtype)
    if out.numel():
        with torch.cuda.device_of(first):
            merge_kernel[(first.shape[1] * triton.cdiv(inner_size(first), BLOCK),)](
                first,
                first_scale.contiguous(),
                first if second is None else second,
                first_scale if scale is None else scale.contiguous(),
                out,
                first.shape[1],
                inner_size(first),
                NUM_MAPS=first.shape[0],
                CONTRAST=contrast,
                SECOND=second is not None,
                COMPUTE=compute_dtype(first, first_scale, second, scale)[1],
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out


def rescale(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    """``ramp_fast::rescale`` for c [T, B, ...] and scale [T, B]."""
    check_shapes(c, (), (scale,), contrast)
    (c,) = same_layout((c,), ())
    return _merge(c, scale, None, None, contrast)


def rescale_parts(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    """``ramp_fast::rescale_parts`` for c [T, B, rows, parts, width] and scale [T, B, parts]."""
    check_shapes(c, (), (), contrast)
    if c.ndim != 5 or scale.shape != (*c.shape[:2], c.shape[3]):
        raise ValueError(
            f"c {list(c.shape)} must be [T, B, rows, parts, width], scale {list(scale.shape)} [T, B, parts]"
        )
    c, scale = c.contiguous(), scale.contiguous()
    out = torch.empty_like(c)
    if out.numel():
        with torch.cuda.device_of(c):
            rescale_parts_kernel[(c.shape[1] * triton.cdiv(inner_size(c), BLOCK),)](
                *(c, scale, out, c.shape[1], inner_size(c), c.shape[3], c.shape[4]),
                NUM_MAPS=c.shape[0],
                CONTRAST=contrast,
                COMPUTE=compute_dtype(c, scale)[1],
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out


def merge(first: Tensor, first_scale: Tensor, second: Tensor, second_scale: Tensor, contrast: bool) -> Tensor:
    """``ramp_fast::merge`` for first and second [T, B, ...] and their scales [T, B]."""
    if first.shape != second.shape:
        raise ValueError(f"first {list(first.shape)} and second {list(second.shape)} must have the same shape")
    check_shapes(first, (), (first_scale, second_scale), contrast)
    first, second = same_layout((first, second), ())
    return _merge(first, first_scale, second, second_scale, contrast)


def _scale_by(c: Tensor, x: Tensor, n_scale: Tensor | None, gate: bool) -> Tensor:
    check_shapes(c, (x,), (), n_scale is not None)
    if n_scale is not None and n_scale.shape != (c.shape[0] // 2, c.shape[1]):
        raise ValueError(f"n_scale {list(n_scale.shape)} must have shape {[c.shape[0] // 2, c.shape[1]]}")
    c, x = same_layout((c,), (x,))
    out = torch.empty_like(c)
    if out.numel():
        with torch.cuda.device_of(c):
            scale_by_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                *(c, x, x if n_scale is None else n_scale.contiguous(), out, c.shape[1], inner_size(c)),
                NUM_MAPS=c.shape[0],
                GATE=gate,
                N_SCALED=n_scale is not None,
                COMPUTE=compute_dtype(c, x, n_scale)[1],
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out


def scale_by(c: Tensor, factor: Tensor, n_scale: Tensor | None = None) -> Tensor:
    """``ramp_fast::scale_by`` for c [T, B, ...], factor [B, ...] and n_scale [T / 2, B]."""
    return _scale_by(c, factor, n_scale, False)


def gate(c: Tensor, x: Tensor, n_scale: Tensor | None = None) -> Tensor:
    """``ramp_fast::gate`` for c [T, B, ...], x [B, ...] and n_scale [T / 2, B]."""
    return _scale_by(c, x, n_scale, True)


def ratio(c: Tensor, z: Tensor, d: Tensor, stabilizer: float = 0.0, side: int = 0) -> Tensor:
    """``ramp_fast::ratio`` for c [T, B, ...], z and d [B, ...]."""
    check_shapes(c, (z, d), (), False)
    c, z, d = same_layout((c,), (z, d))
    out = torch.empty_like(c)
    if out.numel():
        dtype, compute = compute_dtype(c, z, d)
        # In memory: an argument that is a number would be rounded to float32.
        number = torch.full((1,), stabilizer, dtype=dtype, device=c.device)
        with torch.cuda.device_of(c):
            ratio_kernel[(triton.cdiv(z.numel(), BLOCK),)](
                *(c, z, d, out, number, c.shape[1], inner_size(c)),
                NUM_MAPS=c.shape[0],
                SIDE=side,
                COMPUTE=compute,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out


def centring(
    c: Tensor,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gate: bool = False,
) -> Tensor:
    """``ramp_fast::centring`` for c [T, B, ...], factor [B, ...], gain and shift [C]."""
    check_shapes(c, () if factor is None else (factor,), (), True)
    affine = factor is not None and gain is not None and shift is not None
    c, x = c.contiguous(), c if factor is None else factor.contiguous()
    out = torch.empty((c.shape[0] // 2, c.shape[1]), dtype=compute_dtype(c, factor, gain, shift)[0], device=c.device)
    inner = inner_size(c)
    runs, step = centring_runs(inner)
    count, run = (runs * CENTRE_RUN, CENTRE_RUN) if runs else (inner, max(inner, 1))
    if not inner:
        out.fill_(1)
    elif out.numel():
        with torch.cuda.device_of(c):
            centring_kernel[(out.numel(),)](
                c,
                x,
                gain.contiguous() if affine and gain is not None else c,
                shift.contiguous() if affine and shift is not None else c,
                *(out, out.numel() * inner, c.shape[1], inner, step),
                COUNT=count,
                RUN=run,
                CHANNELS=gain.numel() if affine and gain is not None else 1,
                WEIGHTED=factor is not None,
                AFFINE=affine,
                GATE=gate,
                BLOCK=triton.next_power_of_2(max(count, 1)),
                num_warps=WARPS,
            )
    return out
