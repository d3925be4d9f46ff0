"""Attention ``O = softmax(S) V`` with ``S = scale Q K^T``: coefficients of Q, K and V from those of O.

    c_A = 2 g V+^T                                       c_V = 2 [v > 0] A^T g          g = [o > 0] c if gated, else c
    c_S = (sign(S) A + softmax(|S|)) c_A                 A = softmax(S)
    c_Q = 2 scale [q > 0] c_S K+                         c_K = 2 scale [k > 0] c_S^T Q+

Not gated, ``c_Q`` has ``2 scale c_S K-`` where q < 0, and ``c_K`` likewise. Scores are computed tile by tile three
times and are never in memory: once for the sums of both softmaxes, then by blocks of queries for c_Q and by blocks of
keys for c_K and c_V, so that every sum has a fixed order. Scores are in units of log 2: exponentials are powers of 2.

Tensor cores multiply 16-bit numbers. Scores are products of bfloat16 q and k, or else of the two float16 parts of each
(see product.py; rows are multiplied by powers of two); the other products have operands of the dtype of c. There a
float32 operand, which may be of any size, is the sum of three bfloat16 parts, and a product of two that of the six
largest products of parts, with an error below 2^-23. A first kernel writes parts, gates and halves, for the other two
to copy straight into shared memory: split in registers instead, nothing but tiles of 16 rows fits.

The gradient goes the same way, and finds the sums of A c_A beside those of the softmax:

    c_A = c V^T            c_V = A^T c            c_S = A (c_A - sum over keys of A c_A)
    c_Q = scale c_S K      c_K = scale c_S^T Q
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import INTERPRETED, dot, launch_tuned, sum_partials
from ramp_fast.kernels.product import power_of_two, two_parts
from ramp_fast.ops._registry import equation
from ramp_fast.ops.attention import output_views, packed_output

# Of a head; wider ones spill whatever the tile.
MAX_WIDTH = 128
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
HUGE: tl.constexpr = tl.constexpr(2.0**126)


class Tiles(NamedTuple):
    """Rows of the block that a program owns and of those it walks over, warps and stages."""

    own: int
    other: int
    warps: int
    stages: int
    apart: bool = False  # whether the last rows it walks over, if they are no whole block, are a step of their own


def paired(width: int, parts: int) -> bool:
    """Whether a program holds both P and D: the sums of wider heads or of more parts leave no registers for that."""
    return parts == 1 and padded(width) <= 64


def tiles(capability: int, width: int, parts: int, gated: bool) -> Tiles:
    """Of both passes: among those tried the largest that do not spill.

    Blocks of 64 rows are what the tensor cores of compute capability 9.x and 10.x ask for; others take any. With four
    warps for 64 rows each owns whole rows, and what it multiplies next stays in its registers; not gated, there are too
    many sums for that. Where float32 coefficients would need more tensor memory than there is on 10.x, Triton 3.6 and
    3.8 compile a trap without an error.
    """
    if INTERPRETED:
        return Tiles(16, 32, 4, 1, gated)
    wide = padded(width) > 64
    if capability // 10 not in (9, 10) or (parts == 3 and (wide or capability >= 100)):
        if paired(width, parts):
            return Tiles(32, 32, 4, 2)
        return Tiles(16, 16, 4, 2) if wide and parts == 3 else Tiles(16, 32, 4, 2) if wide else Tiles(32, 16, 4, 2)
    if capability < 100:
        if paired(width, parts):
            return Tiles(64, 32, 4, 2, True) if gated else Tiles(64, 32, 8, 2)
        return Tiles(64, 16, 8, 2)
    return Tiles(64, 32, 4, 2) if paired(width, parts) else Tiles(64, 32, 8, 1)


@functools.cache
def configs(capability: int, width: int, parts: int, gated: bool) -> tuple[triton.Config, ...]:
    """Of both passes, to be tried: one tile, which fixes the order of the sums over blocks, in several ways."""
    tile = tiles(capability, width, parts, gated)
    ways = [(tile.warps, tile.stages)]
    # Others that neither spill nor ask for more memory than there is.
    if INTERPRETED:
        pass
    elif tile.own < 64:
        ways += [(tile.warps, 3), (8, tile.stages)]
    elif capability < 100 or paired(width, parts):
        ways += [(tile.warps, 3)]
    constants = {"OWN": tile.own, "OTHER": tile.other, "APART": tile.apart}
    return tuple(triton.Config(constants, *way) for way in ways)


def lasting(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Those worth trying: with no more stages than there are blocks to walk over; the first if none is."""
    rows = min(constants["QUERY_ROWS"], constants["KEY_ROWS"])
    return [c for c in configs if c.num_stages * c.kwargs["OTHER"] <= rows] or configs[:1]


# All that the best configuration depends on; the number of samples must not be part of it.
KEY = ("QUERIES", "KEYS", "WIDTH", "GATED", "CONTRAST", "SCORE_PARTS", "PARTS")
GRADIENT_KEY = ("QUERIES", "KEYS", "WIDTH", "SCORE_PARTS", "PARTS")


def padded(width: int) -> int:
    """Columns of a tile of one head; products want 16 at least."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _split(x, PARTS: tl.constexpr):
    """Write x as a sum of bfloat16 numbers: one, rounded, or three."""
    x = x.to(tl.float32)
    first = x.to(tl.bfloat16)
    if PARTS == 1:
        return first, first, first
    else:
        rest = x - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b, sums, PARTS: tl.constexpr):
    """``a b + sums`` of operands in parts, the smallest products first."""
    if PARTS == 3:
        sums = dot(a[2], b[0], sums, "ieee")
        sums = dot(a[0], b[2], sums, "ieee")
        sums = dot(a[1], b[1], sums, "ieee")
    if PARTS > 1:
        sums = dot(a[1], b[0], sums, "ieee")
        sums = dot(a[0], b[1], sums, "ieee")
    return dot(a[0], b[0], sums, "ieee")


@triton.jit
def _tile(pointer, plane, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Rows [start, start + ROWS) of one head of a prepared operand, in parts."""
    place = (start + tl.arange(0, ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = tl.load(pointer + place)
    if PARTS == 1:
        return first, first, first
    elif PARTS == 2:
        second = tl.load(pointer + plane + place)
        return first, second, second
    else:
        return first, tl.load(pointer + plane + place), tl.load(pointer + 2 * plane + place)


@triton.jit
def _transposed(x, PARTS: tl.constexpr):
    if PARTS == 1:
        first = tl.trans(x[0])
        return first, first, first
    elif PARTS == 2:
        second = tl.trans(x[1])
        return tl.trans(x[0]), second, second
    else:
        return tl.trans(x[0]), tl.trans(x[1]), tl.trans(x[2])


@triton.jit
def _store_parts(pointer, plane, x, PARTS: tl.constexpr):
    parts = _split(x, PARTS)
    tl.store(pointer, parts[0])
    if PARTS == 3:
        tl.store(pointer + plane, parts[1])
        tl.store(pointer + 2 * plane, parts[2])


@triton.jit(do_not_specialize=["batch"])
def prepare_kernel(
    x_ptr,  # [T, B, H, COUNT, WIDTH]
    gate_ptr,  # [B, H, COUNT, WIDTH]; not read unless GATE
    whole_ptr,  # [WHOLE, T, B, H, rows, BLOCK_D]; not written if WHOLE is 0
    powers_ptr,  # [T, B, H, rows]: what rows of ``whole`` are to be multiplied by; not written unless WHOLE is 2
    halves_ptr,  # [HALVES, T, B, H, rows, BLOCK_D, 1 or 2]; not written if HALVES is 0
    x_t,  # strides of these axes; the last one is dense
    x_b,
    x_h,
    x_n,
    gate_b,
    gate_h,
    gate_n,
    batch,  # B
    num_maps,  # T
    HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    FACTOR: tl.constexpr,  # x <- FACTOR x
    GATE: tl.constexpr,  # x <- [gate > 0] x
    WHOLE: tl.constexpr,  # parts of x
    HALVES: tl.constexpr,  # parts of x+, or of x+ and x-
    BOTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # rows / BLOCK: rows and columns beyond COUNT and WIDTH are 0
):
    program = tl.program_id(0)
    block = program % BLOCKS
    # All t of a head one after another: they share the gate.
    t = program // BLOCKS % num_maps
    head = program // BLOCKS // num_maps % HEADS
    sample = (program // BLOCKS // num_maps // HEADS).to(tl.int64)
    index = (t * batch.to(tl.int64) + sample) * HEADS + head
    row = block * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    inside = (row < COUNT)[:, None] & (column < WIDTH)[None, :]
    place = x_ptr + t.to(tl.int64) * x_t + sample * x_b + head.to(tl.int64) * x_h
    x = FACTOR * tl.load(place + row[:, None] * x_n + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATE:
        place = gate_ptr + sample * gate_b + head.to(tl.int64) * gate_h
        gate = tl.load(place + row[:, None] * gate_n + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(gate > 0, x, 0.0)
    plane = batch.to(tl.int64) * num_maps * HEADS * BLOCKS * BLOCK * BLOCK_D
    first = index * (BLOCKS * BLOCK)
    whole = whole_ptr + (first + row)[:, None] * BLOCK_D + column[None, :]
    if WHOLE == 2:
        up, down = power_of_two(tl.max(tl.abs(x), 1))
        high, low = two_parts(x * up[:, None])
        tl.store(whole, high)
        tl.store(whole + plane, low)
        tl.store(powers_ptr + first + row, down)
    elif WHOLE > 0:
        _store_parts(whole, plane, x, WHOLE)
    if HALVES > 0:
        if BOTH:
            both = tl.join(tl.maximum(x, 0.0), tl.maximum(-x, 0.0)).reshape(BLOCK, 2 * BLOCK_D)
            column = tl.arange(0, 2 * BLOCK_D)
            place = (first + row)[:, None] * (2 * BLOCK_D) + column[None, :]
            _store_parts(halves_ptr + place, 2 * plane, both, HALVES)
        else:
            place = (first + row)[:, None] * BLOCK_D + column[None, :]
            _store_parts(halves_ptr + place, plane, tl.maximum(x, 0.0), HALVES)


@triton.jit
def _place(batch, HEADS: tl.constexpr, BLOCKS: tl.constexpr, OWN: tl.constexpr):
    """First row, head, sample and map of what a program computes."""
    program = tl.program_id(0)
    start = program % BLOCKS * OWN
    head = program // BLOCKS % HEADS
    sample = program // (BLOCKS * HEADS) % batch
    t = program // (BLOCKS * HEADS) // batch
    return start, head, sample, t


@triton.jit
def _raw(pointer, sample, head, row, column, inside, x_b, x_h, x_n):
    """Rows and columns of one head of an operand as it came, 0 outside."""
    x = pointer + sample.to(tl.int64) * x_b + head.to(tl.int64) * x_h + row[:, None] * x_n + column[None, :]
    return tl.load(x, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _selected(sums, x, GATED: tl.constexpr):
    """Of sums against halves those that the sign of x asks for."""
    if GATED:
        return tl.where(x > 0, sums, 0.0)
    else:
        upper, lower = tl.split(sums.reshape(x.shape[0], x.shape[1], 2))
        return tl.where(x > 0, upper, tl.where(x < 0, lower, 0.0))


@triton.jit
def _products(
    own,
    other,
    plane,
    powers,
    first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Products of own rows, without their powers, with rows [first, first + ROWS) of the other operand."""
    x = _transposed(_tile(other, plane, first, ROWS, COLUMNS, PARTS), PARTS)
    product = _product(own, x, tl.zeros([own[0].shape[0], ROWS], tl.float32), PARTS)
    if PARTS == 2:
        return product * tl.load(powers + first + tl.arange(0, ROWS))[None, :]
    else:
        return product


@triton.jit
def _unit(scale, powers, start, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """What makes scores in units of log 2 of products with rows [start, start + ROWS)."""
    unit = tl.full([ROWS], scale * LOG2_E, tl.float32)
    if PARTS == 2:
        return unit * tl.load(powers + start + tl.arange(0, ROWS))
    else:
        return unit


@triton.jit
def _sign(x):
    """1, -1, or 0 of 0; less than 1 of numbers below 2^-126."""
    return tl.clamp(x * HUGE, -1.0, 1.0)


@triton.jit
def _seen(x, unit, inside, top, total, MASKED: tl.constexpr):
    """Maxima of rows of ``unit x`` and sums of 2^(unit x - maximum), with some more x."""
    higher = tl.maximum(top, unit * tl.max(tl.where(inside, x, float("-inf")) if MASKED else x, 1))
    new = tl.exp2(x * unit[:, None] - higher[:, None])
    return higher, total * tl.exp2(top - higher) + tl.sum(tl.where(inside, new, 0.0) if MASKED else new, 1)


@triton.jit
def _measured(
    q,
    unit,
    k,
    plane,
    powers,
    first,
    found,  # maxima and sums of scores, and of their absolute values
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step of the first pass over keys: what was found, with [first, first + ROWS)."""
    x = _products(q, k, plane, powers, first, ROWS, COLUMNS, PARTS)
    inside = (first + tl.arange(0, ROWS) < KEYS)[None, :]
    top, total = _seen(x, unit, inside, found[0], found[1], MASKED)
    top_absolute, total_absolute = _seen(tl.abs(x), unit, inside, found[2], found[3], MASKED)
    return top, total, top_absolute, total_absolute


@triton.jit
def _weights(x, unit, norm, first, KEYS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Softmax of scores of keys [first, first + ROWS)."""
    a = tl.exp2(x * unit[:, None] - norm[:, None])
    if MASKED:  # scores beyond KEYS are 0, and so is what this is multiplied by; but it may be infinite
        return tl.where((first + tl.arange(0, ROWS) < KEYS)[None, :], a, 0.0)
    else:
        return a


@triton.jit
def _pulled_to_queries(
    q,
    unit,
    g,
    g_d,
    k,
    key_plane,
    powers,
    k_halves,
    v,
    norm,
    norm_absolute,
    first,
    sums,
    mass,
    sums_d,
    mass_n,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CONTRAST: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step of the second pass over keys: sums and masses with those of [first, first + ROWS)."""
    x = _products(q, k, key_plane, powers, first, ROWS, BLOCK_D, SCORE_PARTS)
    a = _weights(x, unit, norm, first, KEYS, ROWS, MASKED)
    factor = tl.exp2(tl.abs(x) * unit[:, None] - norm_absolute[:, None]) + _sign(x) * a
    v_t = _transposed(_tile(v, key_plane, first, ROWS, BLOCK_D, PARTS), PARTS)
    halves = _tile(k_halves, key_plane * (COLUMNS // BLOCK_D), first, ROWS, COLUMNS, PARTS)
    c_a = _product(g, v_t, tl.zeros([q[0].shape[0], ROWS], tl.float32), PARTS)
    mass += tl.sum(a * tl.abs(c_a), 1)
    sums = _product(_split(factor * c_a, PARTS), halves, sums, PARTS)
    if CONTRAST:
        c_a_d = _product(g_d, v_t, tl.zeros([q[0].shape[0], ROWS], tl.float32), PARTS)
        mass_n += tl.sum(a * tl.abs(c_a - c_a_d), 1)
        sums_d = _product(_split(factor * c_a_d, PARTS), halves, sums_d, PARTS)
    return sums, mass, sums_d, mass_n


@triton.jit(do_not_specialize=["batch"])
def queries_kernel(
    q_ptr,  # [SCORE_PARTS, B, H, rows, BLOCK_D]; prepared, like the next six
    q_powers_ptr,  # [B, H, rows]; not read unless SCORE_PARTS is 2, like the next but one
    k_ptr,  # [SCORE_PARTS, B, H, rows of keys, BLOCK_D]
    k_powers_ptr,  # [B, H, rows of keys]
    k_halves_ptr,  # [PARTS, B, H, rows of keys, BLOCK_D, 1 or 2]
    v_ptr,  # [PARTS, B, H, rows of keys, BLOCK_D]: V+
    g_ptr,  # [PARTS, T, B, H, rows, BLOCK_D]: 2 g
    x_ptr,  # [B, H, N, D]: q as it came
    out_ptr,  # [T, B, H, N, D]: c_Q
    statistics_ptr,  # [2, B, H, rows]: log2 of the sum of exp(S), and of exp(|S|)
    masses_ptr,  # [4, T, B, slots]: those of A and q are written here
    x_b,  # strides of these axes; the last one is dense
    x_h,
    x_n,
    out_t,
    out_b,
    out_h,
    out_n,
    batch,  # B
    slots,
    scale,
    NUM_MAPS: tl.constexpr,  # T
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERY_ROWS: tl.constexpr,  # of prepared operands
    KEY_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    CONTRAST: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    APART: tl.constexpr,
):
    BLOCKS: tl.constexpr = QUERY_ROWS // OWN
    COLUMNS: tl.constexpr = BLOCK_D if GATED else 2 * BLOCK_D
    GROUPS: tl.constexpr = NUM_MAPS // 2 if CONTRAST else NUM_MAPS
    # Keys of a last step apart from the others, the only one with masks, or else masks in every step if there are any.
    REST: tl.constexpr = KEYS % OTHER if APART else 0
    LAST: tl.constexpr = 16 if REST <= 16 else 32 if REST <= 32 else 64
    MASKED: tl.constexpr = REST == 0 and KEYS % OTHER > 0
    start, head, sample, t = _place(batch, HEADS, BLOCKS, OWN)
    samples = batch.to(tl.int64)
    of_head = sample.to(tl.int64) * HEADS + head
    query_plane = samples * (HEADS * QUERY_ROWS * BLOCK_D)
    key_plane = samples * (HEADS * KEY_ROWS * BLOCK_D)
    k = k_ptr + of_head * (KEY_ROWS * BLOCK_D)
    powers = k_powers_ptr + of_head * KEY_ROWS
    k_halves = k_halves_ptr + of_head * (KEY_ROWS * COLUMNS)
    v = v_ptr + of_head * (KEY_ROWS * BLOCK_D)
    g_head = g_ptr + (t * samples * HEADS + of_head) * (QUERY_ROWS * BLOCK_D)
    q = _tile(q_ptr + of_head * (QUERY_ROWS * BLOCK_D), query_plane, start, OWN, BLOCK_D, SCORE_PARTS)
    unit = _unit(scale, q_powers_ptr + of_head * QUERY_ROWS, start, OWN, SCORE_PARTS)

    nothing = tl.full([OWN], float("-inf"), tl.float32)
    found = nothing, tl.zeros([OWN], tl.float32), nothing, tl.zeros([OWN], tl.float32)
    for first in range(0, KEYS - REST, OTHER):
        found = _measured(q, unit, k, key_plane, powers, first, found, KEYS, OTHER, BLOCK_D, SCORE_PARTS, MASKED)
    if REST > 0:
        found = _measured(q, unit, k, key_plane, powers, KEYS - REST, found, KEYS, LAST, BLOCK_D, SCORE_PARTS, True)
    norm = found[0] + tl.log2(found[1])
    norm_absolute = found[2] + tl.log2(found[3])
    if t == 0:
        of_row = statistics_ptr + of_head * QUERY_ROWS + start + tl.arange(0, OWN)
        tl.store(of_row, norm)
        tl.store(of_row + samples * (HEADS * QUERY_ROWS), norm_absolute)

    g = _tile(g_head, query_plane * NUM_MAPS, start, OWN, BLOCK_D, PARTS)
    sums = tl.zeros([OWN, COLUMNS], tl.float32)
    mass = tl.zeros([OWN], tl.float32)
    if CONTRAST:
        g_d = _tile(g_head + GROUPS * query_plane, query_plane * NUM_MAPS, start, OWN, BLOCK_D, PARTS)
        sums_d = tl.zeros([OWN, COLUMNS], tl.float32)
        mass_n = tl.zeros([OWN], tl.float32)
    else:
        g_d, sums_d, mass_n = g, sums, mass  # not used
    for first in range(0, KEYS - REST, OTHER):
        sums, mass, sums_d, mass_n = _pulled_to_queries(
            *(q, unit, g, g_d, k, key_plane, powers, k_halves, v, norm, norm_absolute),
            *(first, sums, mass, sums_d, mass_n),
            *(KEYS, OTHER, COLUMNS, BLOCK_D, CONTRAST, SCORE_PARTS, PARTS, MASKED),
        )
    if REST > 0:
        sums, mass, sums_d, mass_n = _pulled_to_queries(
            *(q, unit, g, g_d, k, key_plane, powers, k_halves, v, norm, norm_absolute),
            *(KEYS - REST, sums, mass, sums_d, mass_n),
            *(KEYS, LAST, COLUMNS, BLOCK_D, CONTRAST, SCORE_PARTS, PARTS, True),
        )

    row = start + tl.arange(0, OWN)
    column = tl.arange(0, BLOCK_D)
    inside = row < QUERIES
    stored = inside[:, None] & (column < WIDTH)[None, :]
    x = _raw(x_ptr, sample, head, row, column, stored, x_b, x_h, x_n)
    out = sample.to(tl.int64) * out_b + head.to(tl.int64) * out_h + t.to(tl.int64) * out_t
    out = out_ptr + out + row[:, None] * out_n + column[None, :]
    map_stride = samples * slots  # of masses
    mass_a = masses_ptr + t * map_stride + sample.to(tl.int64) * slots + head * QUERIES + row
    mass_q = mass_a + 2 * NUM_MAPS * map_stride
    c_q = 2 * scale * _selected(sums, x, GATED)
    tl.store(out, c_q.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(mass_a, mass, mask=inside)
    tl.store(mass_q, tl.sum(tl.abs(x * c_q), 1), mask=inside)
    if CONTRAST:
        c_q_d = 2 * scale * _selected(sums_d, x, GATED)
        to_d = out + tl.cast(GROUPS, tl.int64) * out_t
        tl.store(to_d, c_q_d.to(out_ptr.dtype.element_ty), mask=stored)
        tl.store(mass_a + GROUPS * map_stride, mass_n, mask=inside)
        tl.store(mass_q + GROUPS * map_stride, tl.sum(tl.abs(x * (c_q - c_q_d)), 1), mask=inside)


@triton.jit
def _of_rows(pointer, first, QUERIES: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """A statistic of rows [first, first + ROWS); of rows that may have none, what it is multiplied by is 0."""
    row = first + tl.arange(0, ROWS)
    if MASKED:
        return tl.load(pointer + row, mask=row < QUERIES, other=0.0)
    else:
        return tl.load(pointer + row)


@triton.jit
def _pulled_to_keys(
    k,
    unit,
    v,
    q,
    query_plane,
    powers,
    q_halves,
    g_ptr,
    to_d,
    g_plane,
    norms,
    norm_plane,
    first,
    sums_k,
    sums_v,
    sums_k_d,
    sums_v_d,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CONTRAST: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step over queries: sums with those of [first, first + ROWS). Rows of scores are keys."""
    x = _products(k, q, query_plane, powers, first, ROWS, BLOCK_D, SCORE_PARTS)
    norm = _of_rows(norms, first, QUERIES, ROWS, MASKED)
    norm_absolute = _of_rows(norms + norm_plane, first, QUERIES, ROWS, MASKED)
    a = tl.exp2(x * unit[:, None] - norm[None, :])
    factor = tl.exp2(tl.abs(x) * unit[:, None] - norm_absolute[None, :]) + _sign(x) * a
    a = _split(a, PARTS)
    halves = _tile(q_halves, query_plane * (COLUMNS // BLOCK_D), first, ROWS, COLUMNS, PARTS)
    g = _tile(g_ptr, g_plane, first, ROWS, BLOCK_D, PARTS)
    c_a = _product(v, _transposed(g, PARTS), tl.zeros([k[0].shape[0], ROWS], tl.float32), PARTS)
    sums_v = _product(a, g, sums_v, PARTS)
    sums_k = _product(_split(factor * c_a, PARTS), halves, sums_k, PARTS)
    if CONTRAST:
        g = _tile(g_ptr + to_d, g_plane, first, ROWS, BLOCK_D, PARTS)
        c_a = _product(v, _transposed(g, PARTS), tl.zeros([k[0].shape[0], ROWS], tl.float32), PARTS)
        sums_v_d = _product(a, g, sums_v_d, PARTS)
        sums_k_d = _product(_split(factor * c_a, PARTS), halves, sums_k_d, PARTS)
    return sums_k, sums_v, sums_k_d, sums_v_d


@triton.jit(do_not_specialize=["batch"])
def keys_kernel(
    q_ptr,  # as above
    q_powers_ptr,
    q_halves_ptr,  # [PARTS, B, H, rows, BLOCK_D, 1 or 2]
    k_ptr,
    k_powers_ptr,
    v_ptr,
    g_ptr,
    k_raw_ptr,  # [B, H, M, D]: k as it came
    v_raw_ptr,  # [B, H, M, D]
    c_k_ptr,  # [T, B, H, M, D]
    c_v_ptr,  # [T, B, H, M, D]
    statistics_ptr,
    masses_ptr,  # those of v and k are written here
    k_b,  # strides of k_raw
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    out_t,  # of c_k and of c_v
    out_b,
    out_h,
    out_n,
    batch,
    slots,
    scale,
    NUM_MAPS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    CONTRAST: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    APART: tl.constexpr,
):
    BLOCKS: tl.constexpr = KEY_ROWS // OWN
    COLUMNS: tl.constexpr = BLOCK_D if GATED else 2 * BLOCK_D
    GROUPS: tl.constexpr = NUM_MAPS // 2 if CONTRAST else NUM_MAPS
    REST: tl.constexpr = QUERIES % OTHER if APART else 0
    LAST: tl.constexpr = 16 if REST <= 16 else 32 if REST <= 32 else 64
    MASKED: tl.constexpr = REST == 0 and QUERIES % OTHER > 0
    start, head, sample, t = _place(batch, HEADS, BLOCKS, OWN)
    samples = batch.to(tl.int64)
    of_head = sample.to(tl.int64) * HEADS + head
    query_plane = samples * (HEADS * QUERY_ROWS * BLOCK_D)
    key_plane = samples * (HEADS * KEY_ROWS * BLOCK_D)
    q = q_ptr + of_head * (QUERY_ROWS * BLOCK_D)
    powers = q_powers_ptr + of_head * QUERY_ROWS
    q_halves = q_halves_ptr + of_head * (QUERY_ROWS * COLUMNS)
    g = g_ptr + (t * samples * HEADS + of_head) * (QUERY_ROWS * BLOCK_D)
    norms = statistics_ptr + of_head * QUERY_ROWS
    norm_plane = samples * (HEADS * QUERY_ROWS)
    k = _tile(k_ptr + of_head * (KEY_ROWS * BLOCK_D), key_plane, start, OWN, BLOCK_D, SCORE_PARTS)
    v = _tile(v_ptr + of_head * (KEY_ROWS * BLOCK_D), key_plane, start, OWN, BLOCK_D, PARTS)
    unit = _unit(scale, k_powers_ptr + of_head * KEY_ROWS, start, OWN, SCORE_PARTS)

    sums_k = tl.zeros([OWN, COLUMNS], tl.float32)
    sums_v = tl.zeros([OWN, BLOCK_D], tl.float32)
    if CONTRAST:
        sums_k_d = tl.zeros([OWN, COLUMNS], tl.float32)
        sums_v_d = tl.zeros([OWN, BLOCK_D], tl.float32)
    else:
        sums_k_d, sums_v_d = sums_k, sums_v  # not used
    for first in range(0, QUERIES - REST, OTHER):
        sums_k, sums_v, sums_k_d, sums_v_d = _pulled_to_keys(
            *(k, unit, v, q, query_plane, powers, q_halves, g, GROUPS * query_plane, query_plane * NUM_MAPS),
            *(norms, norm_plane, first, sums_k, sums_v, sums_k_d, sums_v_d),
            *(QUERIES, OTHER, COLUMNS, BLOCK_D, CONTRAST, SCORE_PARTS, PARTS, MASKED),
        )
    if REST > 0:
        sums_k, sums_v, sums_k_d, sums_v_d = _pulled_to_keys(
            *(k, unit, v, q, query_plane, powers, q_halves, g, GROUPS * query_plane, query_plane * NUM_MAPS),
            *(norms, norm_plane, QUERIES - REST, sums_k, sums_v, sums_k_d, sums_v_d),
            *(QUERIES, LAST, COLUMNS, BLOCK_D, CONTRAST, SCORE_PARTS, PARTS, True),
        )

    # Rows beyond KEYS may hold infinities and NaN: x is 0 there and chooses neither.
    row = start + tl.arange(0, OWN)
    column = tl.arange(0, BLOCK_D)
    inside = row < KEYS
    stored = inside[:, None] & (column < WIDTH)[None, :]
    out = sample.to(tl.int64) * out_b + head.to(tl.int64) * out_h + t.to(tl.int64) * out_t
    out = out + row[:, None] * out_n + column[None, :]
    to_d = out + tl.cast(GROUPS, tl.int64) * out_t
    map_stride = samples * slots
    mass_v = masses_ptr + (NUM_MAPS + t) * map_stride + sample.to(tl.int64) * slots + head * KEYS + row
    mass_k = mass_v + 2 * NUM_MAPS * map_stride
    x = _raw(v_raw_ptr, sample, head, row, column, stored, v_b, v_h, v_n)
    c_v = tl.where(x > 0, sums_v, 0.0)
    tl.store(c_v_ptr + out, c_v.to(c_v_ptr.dtype.element_ty), mask=stored)
    tl.store(mass_v, tl.sum(tl.abs(x * c_v), 1), mask=inside)
    if CONTRAST:
        c_v_d = tl.where(x > 0, sums_v_d, 0.0)
        tl.store(c_v_ptr + to_d, c_v_d.to(c_v_ptr.dtype.element_ty), mask=stored)
        tl.store(mass_v + GROUPS * map_stride, tl.sum(tl.abs(x * (c_v - c_v_d)), 1), mask=inside)
    x = _raw(k_raw_ptr, sample, head, row, column, stored, k_b, k_h, k_n)
    c_k = 2 * scale * _selected(sums_k, x, GATED)
    tl.store(c_k_ptr + out, c_k.to(c_k_ptr.dtype.element_ty), mask=stored)
    tl.store(mass_k, tl.sum(tl.abs(x * c_k), 1), mask=inside)
    if CONTRAST:
        c_k_d = 2 * scale * _selected(sums_k_d, x, GATED)
        tl.store(c_k_ptr + to_d, c_k_d.to(c_k_ptr.dtype.element_ty), mask=stored)
        tl.store(mass_k + GROUPS * map_stride, tl.sum(tl.abs(x * (c_k - c_k_d)), 1), mask=inside)


@triton.jit
def _measured_with_sums(
    q,
    unit,
    k,
    key_plane,
    powers,
    c,
    v,
    first,
    top,
    total,
    weighted,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step of the first pass over keys: maxima of scores, sums of exp(S - maximum), and those times c_A."""
    x = _products(q, k, key_plane, powers, first, ROWS, BLOCK_D, SCORE_PARTS)
    c_a = _products(c, v, key_plane, powers, first, ROWS, BLOCK_D, PARTS)
    inside = (first + tl.arange(0, ROWS) < KEYS)[None, :]
    higher = tl.maximum(top, unit * tl.max(tl.where(inside, x, float("-inf")) if MASKED else x, 1))
    new = tl.exp2(x * unit[:, None] - higher[:, None])
    if MASKED:
        new = tl.where(inside, new, 0.0)
    old = tl.exp2(top - higher)
    return higher, total * old + tl.sum(new, 1), weighted * old + tl.sum(new * c_a, 1)


@triton.jit
def _gradient_of_queries(
    q,
    unit,
    c,
    k,
    key_plane,
    powers,
    k_narrow,
    v,
    norm,
    mean,
    first,
    sums,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step of the second pass over keys: sums for c_Q with those of [first, first + ROWS)."""
    x = _products(q, k, key_plane, powers, first, ROWS, BLOCK_D, SCORE_PARTS)
    a = _weights(x, unit, norm, first, KEYS, ROWS, MASKED)
    c_a = _products(c, v, key_plane, powers, first, ROWS, BLOCK_D, PARTS)
    keys = _tile(k_narrow, key_plane, first, ROWS, BLOCK_D, PARTS)
    return _product(_split(a * (c_a - mean[:, None]), PARTS), keys, sums, PARTS)


@triton.jit(do_not_specialize=["batch"])
def gradient_queries_kernel(
    q_ptr,  # [SCORE_PARTS, B, H, rows, BLOCK_D]; prepared, like the next six
    q_powers_ptr,  # [B, H, rows]; not read unless SCORE_PARTS is 2, like the next but one
    k_ptr,  # [SCORE_PARTS, B, H, rows of keys, BLOCK_D]
    k_powers_ptr,  # [B, H, rows of keys]
    k_narrow_ptr,  # [PARTS, B, H, rows of keys, BLOCK_D]
    v_ptr,  # [PARTS, B, H, rows of keys, BLOCK_D]
    c_ptr,  # [PARTS, T, B, H, rows, BLOCK_D]
    out_ptr,  # [T, B, H, N, D]: c_Q
    norms_ptr,  # [B, H, rows]: log2 of the sum of exp(S)
    means_ptr,  # [T, B, H, rows]: sums of A c_A
    out_t,  # strides of these axes; the last one is dense
    out_b,
    out_h,
    out_n,
    batch,  # B
    scale,
    share,
    NUM_MAPS: tl.constexpr,  # T
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERY_ROWS: tl.constexpr,  # of prepared operands
    KEY_ROWS: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    APART: tl.constexpr,
):
    BLOCKS: tl.constexpr = QUERY_ROWS // OWN
    # Keys of a last step apart from the others, the only one with masks, or else masks in every step if there are any.
    REST: tl.constexpr = KEYS % OTHER if APART else 0
    LAST: tl.constexpr = 16 if REST <= 16 else 32 if REST <= 32 else 64
    MASKED: tl.constexpr = REST == 0 and KEYS % OTHER > 0
    start, head, sample, t = _place(batch, HEADS, BLOCKS, OWN)
    samples = batch.to(tl.int64)
    of_head = sample.to(tl.int64) * HEADS + head
    of_map = t * samples * HEADS + of_head
    query_plane = samples * (HEADS * QUERY_ROWS * BLOCK_D)
    key_plane = samples * (HEADS * KEY_ROWS * BLOCK_D)
    k = k_ptr + of_head * (KEY_ROWS * BLOCK_D)
    powers = k_powers_ptr + of_head * KEY_ROWS
    k_narrow = k_narrow_ptr + of_head * (KEY_ROWS * BLOCK_D)
    v = v_ptr + of_head * (KEY_ROWS * BLOCK_D)
    q = _tile(q_ptr + of_head * (QUERY_ROWS * BLOCK_D), query_plane, start, OWN, BLOCK_D, SCORE_PARTS)
    c = _tile(c_ptr + of_map * (QUERY_ROWS * BLOCK_D), query_plane * NUM_MAPS, start, OWN, BLOCK_D, PARTS)
    unit = _unit(scale, q_powers_ptr + of_head * QUERY_ROWS, start, OWN, SCORE_PARTS)

    top = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    weighted = tl.zeros([OWN], tl.float32)
    for first in range(0, KEYS - REST, OTHER):
        top, total, weighted = _measured_with_sums(
            *(q, unit, k, key_plane, powers, c, v, first, top, total, weighted),
            *(KEYS, OTHER, BLOCK_D, SCORE_PARTS, PARTS, MASKED),
        )
    if REST > 0:
        top, total, weighted = _measured_with_sums(
            *(q, unit, k, key_plane, powers, c, v, KEYS - REST, top, total, weighted),
            *(KEYS, LAST, BLOCK_D, SCORE_PARTS, PARTS, True),
        )
    norm = top + tl.log2(total)
    mean = weighted / total
    row = start + tl.arange(0, OWN)
    if t == 0:
        tl.store(norms_ptr + of_head * QUERY_ROWS + row, norm)
    tl.store(means_ptr + of_map * QUERY_ROWS + row, mean)

    sums = tl.zeros([OWN, BLOCK_D], tl.float32)
    for first in range(0, KEYS - REST, OTHER):
        sums = _gradient_of_queries(
            *(q, unit, c, k, key_plane, powers, k_narrow, v, norm, mean, first, sums),
            *(KEYS, OTHER, BLOCK_D, SCORE_PARTS, PARTS, MASKED),
        )
    if REST > 0:
        sums = _gradient_of_queries(
            *(q, unit, c, k, key_plane, powers, k_narrow, v, norm, mean, KEYS - REST, sums),
            *(KEYS, LAST, BLOCK_D, SCORE_PARTS, PARTS, True),
        )
    column = tl.arange(0, BLOCK_D)
    stored = (row < QUERIES)[:, None] & (column < WIDTH)[None, :]
    out = sample.to(tl.int64) * out_b + head.to(tl.int64) * out_h + t.to(tl.int64) * out_t
    out = out_ptr + out + row[:, None] * out_n + column[None, :]
    tl.store(out, (share * sums).to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _gradient_of_keys(
    k,
    unit,
    v,
    q,
    query_plane,
    powers,
    q_narrow,
    c_ptr,
    c_plane,
    norms,
    means,
    first,
    sums_k,
    sums_v,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A step over queries: sums with those of [first, first + ROWS). Rows of scores are keys."""
    x = _products(k, q, query_plane, powers, first, ROWS, BLOCK_D, SCORE_PARTS)
    norm = _of_rows(norms, first, QUERIES, ROWS, MASKED)
    mean = _of_rows(means, first, QUERIES, ROWS, MASKED)
    a = tl.exp2(x * unit[:, None] - norm[None, :])
    c = _tile(c_ptr, c_plane, first, ROWS, BLOCK_D, PARTS)
    c_a = _product(v, _transposed(c, PARTS), tl.zeros([k[0].shape[0], ROWS], tl.float32), PARTS)
    queries = _tile(q_narrow, query_plane, first, ROWS, BLOCK_D, PARTS)
    sums_k = _product(_split(a * (c_a - mean[None, :]), PARTS), queries, sums_k, PARTS)
    return sums_k, _product(_split(a, PARTS), c, sums_v, PARTS)


@triton.jit(do_not_specialize=["batch"])
def gradient_keys_kernel(
    q_ptr,  # as above
    q_powers_ptr,
    q_narrow_ptr,  # [PARTS, B, H, rows, BLOCK_D]
    k_ptr,
    k_powers_ptr,
    v_ptr,
    c_ptr,
    c_k_ptr,  # [T, B, H, M, D]
    c_v_ptr,  # [T, B, H, M, D]
    norms_ptr,
    means_ptr,
    out_t,  # strides of c_k and of c_v
    out_b,
    out_h,
    out_n,
    batch,
    scale,
    share,  # of K, times the scale
    value_share,
    NUM_MAPS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    APART: tl.constexpr,
):
    BLOCKS: tl.constexpr = KEY_ROWS // OWN
    REST: tl.constexpr = QUERIES % OTHER if APART else 0
    LAST: tl.constexpr = 16 if REST <= 16 else 32 if REST <= 32 else 64
    MASKED: tl.constexpr = REST == 0 and QUERIES % OTHER > 0
    start, head, sample, t = _place(batch, HEADS, BLOCKS, OWN)
    samples = batch.to(tl.int64)
    of_head = sample.to(tl.int64) * HEADS + head
    of_map = t * samples * HEADS + of_head
    query_plane = samples * (HEADS * QUERY_ROWS * BLOCK_D)
    key_plane = samples * (HEADS * KEY_ROWS * BLOCK_D)
    q = q_ptr + of_head * (QUERY_ROWS * BLOCK_D)
    powers = q_powers_ptr + of_head * QUERY_ROWS
    q_narrow = q_narrow_ptr + of_head * (QUERY_ROWS * BLOCK_D)
    c = c_ptr + of_map * (QUERY_ROWS * BLOCK_D)
    norms = norms_ptr + of_head * QUERY_ROWS
    means = means_ptr + of_map * QUERY_ROWS
    k = _tile(k_ptr + of_head * (KEY_ROWS * BLOCK_D), key_plane, start, OWN, BLOCK_D, SCORE_PARTS)
    v = _tile(v_ptr + of_head * (KEY_ROWS * BLOCK_D), key_plane, start, OWN, BLOCK_D, PARTS)
    unit = _unit(scale, k_powers_ptr + of_head * KEY_ROWS, start, OWN, SCORE_PARTS)

    sums_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    sums_v = tl.zeros([OWN, BLOCK_D], tl.float32)
    for first in range(0, QUERIES - REST, OTHER):
        sums_k, sums_v = _gradient_of_keys(
            *(k, unit, v, q, query_plane, powers, q_narrow, c, query_plane * NUM_MAPS),
            *(norms, means, first, sums_k, sums_v),
            *(QUERIES, OTHER, BLOCK_D, SCORE_PARTS, PARTS, MASKED),
        )
    if REST > 0:
        sums_k, sums_v = _gradient_of_keys(
            *(k, unit, v, q, query_plane, powers, q_narrow, c, query_plane * NUM_MAPS),
            *(norms, means, QUERIES - REST, sums_k, sums_v),
            *(QUERIES, LAST, BLOCK_D, SCORE_PARTS, PARTS, True),
        )
    row = start + tl.arange(0, OWN)
    column = tl.arange(0, BLOCK_D)
    stored = (row < KEYS)[:, None] & (column < WIDTH)[None, :]
    out = sample.to(tl.int64) * out_b + head.to(tl.int64) * out_h + t.to(tl.int64) * out_t
    out = out + row[:, None] * out_n + column[None, :]
    tl.store(c_k_ptr + out, (share * sums_k).to(c_k_ptr.dtype.element_ty), mask=stored)
    tl.store(c_v_ptr + out, (value_share * sums_v).to(c_v_ptr.dtype.element_ty), mask=stored)


def _check(q: Tensor, k: Tensor, v: Tensor, o: Tensor, c: Tensor, scale: float, contrast: bool) -> None:
    if q.ndim != 4 or c.ndim != 5:
        raise ValueError(f"q must be [B, H, N, D] and c [T, B, H, N, D], not {list(q.shape)} and {list(c.shape)}")
    keys = [*q.shape[:2], k.shape[2] if k.ndim == 4 else 0, q.shape[3]]
    expected = {"k": keys, "v": keys, "o": list(q.shape), "c": [c.shape[0], *q.shape]}
    for name, tensor in (("k", k), ("v", v), ("o", o), ("c", c)):
        if list(tensor.shape) != expected[name]:
            raise ValueError(f"{name} {list(tensor.shape)} must have shape {expected[name]}")
    if contrast and c.shape[0] % 2:
        raise ValueError(f"c {list(c.shape)}: with contrast the first axis holds P and D rows and must be even")
    if not scale >= 0:
        raise ValueError(f"scale {scale} must not be negative")


def attention_pullback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    c: Tensor,
    scale: float,
    gated: bool,
    contrast: bool,
    bias: Tensor | None = None,
    junction: bool = False,
) -> tuple[Tensor, Tensor]:
    """``ramp_fast::attention_pullback`` for q, o [B, H, N, D], k, v [B, H, M, D] and c [T, B, H, N, D].

    A bias they do not take: rules go another way then.
    """
    _check(q, k, v, o, c, scale, contrast)
    if bias is not None:
        return equation("attention_pullback")(q, k, v, o, c, scale, gated, contrast, bias, junction)
    batch, heads, queries, width = q.shape
    num_maps, keys = c.shape[0], k.shape[2]
    if width > MAX_WIDTH or any(x.dtype == torch.float64 for x in (q, k, v, o, c)):
        return equation("attention_pullback")(q, k, v, o, c, scale, gated, contrast)
    q, k, v, o, c = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, o, c))
    if 0 in (num_maps, batch, heads, queries, keys, width):
        return packed_output(q, k, c).zero_(), torch.zeros((4, num_maps, batch), device=c.device)
    score_parts, parts = _parts(q, k, c)
    if contrast and not paired(width, parts):
        # P, D and N = P - D one by one; of N only the masses are kept.
        half = num_maps // 2
        maps = torch.cat((c, c[:half] - c[half:]))
        packed, masses = _pullback(q, k, v, o, maps, scale, gated, False, score_parts, parts)
        return packed[:num_maps], torch.cat((masses[:, :half], masses[:, num_maps:]), 1)
    return _pullback(q, k, v, o, c, scale, gated, contrast, score_parts, parts)


def _pullback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    c: Tensor,
    scale: float,
    gated: bool,
    contrast: bool,
    score_parts: int,
    parts: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    num_maps, keys = c.shape[0], k.shape[2]
    out = packed_output(q, k, c)
    c_q, c_k, c_v = output_views(out, q, k)
    capability = _capability(c)
    tile = tiles(capability, width, parts, gated)
    block = max(tile.own, tile.other)
    q_whole, q_powers, q_halves = _prepared(q[None], block, score_parts, parts, not gated)
    k_whole, k_powers, k_halves = _prepared(k[None], block, score_parts, parts, not gated)
    _, _, v_plus = _prepared(v[None], block, 0, parts, False)
    g, _, _ = _prepared(c, block, parts, 0, False, o if gated else None, factor=2)
    rows = q_whole.shape[-2]
    # Every row has a slot; both kernels fill all slots if there are as many queries as keys.
    new = torch.empty if queries == keys else torch.zeros
    masses = new((4, num_maps, batch, heads * max(queries, keys)), dtype=torch.float32, device=c.device)
    statistics = torch.empty((2, batch, heads, rows), dtype=torch.float32, device=c.device)
    numbers = batch, masses.shape[-1], scale
    passes = (
        (
            queries_kernel,
            *(q_whole, q_powers, k_whole, k_powers, k_halves, v_plus, g, q, c_q, statistics, masses),
            *(*q.stride()[:3], *c_q.stride()[:4], *numbers),
        ),
        (
            keys_kernel,
            *(q_whole, q_powers, q_halves, k_whole, k_powers, v_plus, g, k, v, c_k, c_v, statistics, masses),
            *(*k.stride()[:3], *v.stride()[:3], *c_k.stride()[:4], *numbers),
        ),
    )
    constants = _constants(q, k, q_whole, k_whole, num_maps, parts) | {"GATED": gated, "CONTRAST": contrast}
    programs = batch * heads * (num_maps // 2 if contrast else num_maps)
    _launch(passes, configs(capability, width, parts, gated), KEY, programs, constants)
    return out, sum_partials(masses)


def attention_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    scale: float,
    value_share: float,
    score_share: float,
    bias: Tensor | None = None,
) -> Tensor:
    """``ramp_fast::attention_gradient`` for q [B, H, N, D], k, v [B, H, M, D] and c [T, B, H, N, D]."""
    _check(q, k, v, q, c, scale, False)
    if bias is not None:
        return equation("attention_gradient")(q, k, v, c, scale, value_share, score_share, bias)
    batch, heads, queries, width = q.shape
    num_maps, keys = c.shape[0], k.shape[2]
    # Without a share of the scores there is little to do, and products of 0 would let NaN through.
    if score_share == 0 or width > MAX_WIDTH or any(x.dtype == torch.float64 for x in (q, k, v, c)):
        return equation("attention_gradient")(q, k, v, c, scale, value_share, score_share)
    q, k, v, c = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, c))
    out = packed_output(q, k, c)
    if 0 in (num_maps, batch, heads, queries, keys, width):
        return out.zero_()
    score_parts, parts = _parts(q, k, c)
    c_q, c_k, c_v = output_views(out, q, k)
    capability = _capability(c)
    tile = tiles(capability, width, parts, True)
    block = max(tile.own, tile.other)
    q_whole, q_powers, _ = _prepared(q[None], block, score_parts, 0, False)
    k_whole, k_powers, _ = _prepared(k[None], block, score_parts, 0, False)
    q_narrow, k_narrow = (
        whole if parts == score_parts else _prepared(x[None], block, parts, 0, False)[0]
        for x, whole in ((q, q_whole), (k, k_whole))
    )
    v_narrow, _, _ = _prepared(v[None], block, parts, 0, False)
    c_narrow, _, _ = _prepared(c, block, parts, 0, False)
    rows = q_whole.shape[-2]
    norms = torch.empty((batch, heads, rows), dtype=torch.float32, device=c.device)
    means = torch.empty((num_maps, batch, heads, rows), dtype=torch.float32, device=c.device)
    share = score_share * scale
    passes = (
        (
            gradient_queries_kernel,
            *(q_whole, q_powers, k_whole, k_powers, k_narrow, v_narrow, c_narrow, c_q, norms, means),
            *(*c_q.stride()[:4], batch, scale, share),
        ),
        (
            gradient_keys_kernel,
            *(q_whole, q_powers, q_narrow, k_whole, k_powers, v_narrow, c_narrow, c_k, c_v, norms, means),
            *(*c_k.stride()[:4], batch, scale, share, value_share),
        ),
    )
    constants = _constants(q, k, q_whole, k_whole, num_maps, parts)
    _launch(passes, configs(capability, width, parts, True), GRADIENT_KEY, batch * heads * num_maps, constants)
    return out


def _capability(c: Tensor) -> int:
    major, minor = (8, 0) if c.device.type == "cpu" else torch.cuda.get_device_capability(c.device)
    return 10 * major + minor


def _parts(q: Tensor, k: Tensor, c: Tensor) -> tuple[int, int]:
    """Parts of the operands of scores, and of those of the other products."""
    return 1 if q.dtype == k.dtype == torch.bfloat16 else 2, 1 if c.dtype == torch.bfloat16 else 3


def _constants(q: Tensor, k: Tensor, q_whole: Tensor, k_whole: Tensor, num_maps: int, parts: int) -> dict[str, int]:
    return {
        "NUM_MAPS": num_maps,
        "HEADS": q.shape[1],
        "QUERIES": q.shape[2],
        "KEYS": k.shape[2],
        "WIDTH": q.shape[3],
        "QUERY_ROWS": q_whole.shape[-2],
        "KEY_ROWS": k_whole.shape[-2],
        "SCORE_PARTS": q_whole.shape[0],
        "PARTS": parts,
        "BLOCK_D": q_whole.shape[-1],
    }


def _launch(
    passes: tuple[tuple[Any, ...], tuple[Any, ...]],  # kernels and their arguments, by queries and by keys
    tried: tuple[triton.Config, ...],
    key: tuple[str, ...],
    programs: int,  # for a block of rows
    constants: dict[str, Any],
) -> None:
    for (kernel, *arguments), rows in zip(passes, (constants["QUERY_ROWS"], constants["KEY_ROWS"]), strict=True):
        grid = (programs * (rows // tried[0].kwargs["OWN"]),)
        launch_tuned(kernel, tried, key, lasting, lambda _, grid=grid: grid, tuple(arguments), **constants)


def _prepared(
    x: Tensor, block: int, whole: int, halves: int, both: bool, gate: Tensor | None = None, factor: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x [T, B, H, N, D] times a factor: parts, powers, and parts of its positive half (``both``: of both halves).

    In whole blocks of rows. Three parts or one are bfloat16; two are float16 of rows divided by powers of 2.
    """
    num_maps, batch, heads, count, width = x.shape
    blocks = triton.cdiv(count, block)
    block_d = padded(width)
    shape = num_maps, batch, heads, blocks * block, block_d
    of_whole = torch.empty((whole, *shape), dtype=torch.float16 if whole == 2 else torch.bfloat16, device=x.device)
    powers = torch.empty(shape[:-1] if whole == 2 else (0,), dtype=torch.float32, device=x.device)
    of_halves = torch.empty((halves, *shape[:-1], block_d * (1 + both)), dtype=torch.bfloat16, device=x.device)
    by = x[0] if gate is None else gate
    with torch.cuda.device_of(x):
        prepare_kernel[(num_maps * batch * heads * blocks,)](
            *(x, by, of_whole, powers, of_halves, *x.stride()[:4], *by.stride()[:3], batch, num_maps),
            HEADS=heads,
            COUNT=count,
            WIDTH=width,
            FACTOR=factor,
            GATE=gate is not None,
            WHOLE=whole,
            HALVES=halves,
            BOTH=both,
            BLOCK_D=block_d,
            BLOCK=block,
            BLOCKS=blocks,
            num_warps=8,
        )
    return of_whole, powers, of_halves
