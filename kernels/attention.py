"""Attention ``O = softmax(S) V`` with ``S = scale Q K^T``: coefficients of Q, K and V from those of O.

    c_A = 2 g V+^T                                       c_V = 2 [v > 0] A^T g          g = [o > 0] c if gated, else c
    c_S = (sign(S) A + softmax(|S|)) c_A                 A = softmax(S)
    c_Q = 2 scale [q > 0] c_S K+                         c_K = 2 scale [k > 0] c_S^T Q+

Not gated, ``c_Q`` has ``2 scale c_S K-`` where q < 0, and ``c_K`` likewise. Scores are computed tile by tile three
times and are never in memory: once for the maxima and sums of both softmaxes, then by blocks of queries for c_Q and by
blocks of keys for c_K and c_V, so that every sum has a fixed order. Scores are float32; operands of the other products
have the dtype of c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import INTERPRETED, dot, sum_partials
from ramp_fast.ops.attention import attention_pullback_equation, output_views, packed_output

# Wider heads leave no room for four sums of a block of keys in registers.
MAX_WIDTH = 128


class Tiles(NamedTuple):
    """Rows of the block that a program owns and of those it walks over, warps and stages."""

    own: int
    other: int
    warps: int
    stages: int


def tiles(width: int, dtype: torch.dtype, gated: bool) -> tuple[Tiles, Tiles]:
    """Of the pass by queries and the pass by keys: the largest that do not spill on sm_80, sm_90 and sm_100."""
    if INTERPRETED:
        return Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1)
    return Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)


def padded(width: int) -> int:
    """Columns of a tile of one head; products want 16 at least."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _tile(
    pointer,
    start,
    stride,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Rows [start, start + ROWS) of one head as DTYPE; 0 outside of [COUNT, WIDTH]."""
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < COUNT)[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _store_tile(
    pointer,
    start,
    stride,
    value,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < COUNT)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointer + row[:, None] * stride + column[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _halves(x, DTYPE: tl.constexpr, GATED: tl.constexpr):
    """x+, and if not gated x- column by column beside it."""
    x = x.to(tl.float32)
    if GATED:
        return tl.maximum(x, 0.0).to(DTYPE)
    else:
        both = tl.join(tl.maximum(x, 0.0), tl.maximum(-x, 0.0))
        return both.reshape(x.shape[0], 2 * x.shape[1]).to(DTYPE)


@triton.jit
def _selected(sums, x, GATED: tl.constexpr):
    """Of sums against the halves above those that the sign of x asks for."""
    if GATED:
        return tl.where(x > 0, sums, 0.0)
    else:
        upper, lower = tl.split(sums.reshape(x.shape[0], x.shape[1], 2))
        return tl.where(x > 0, upper, tl.where(x < 0, lower, 0.0))


@triton.jit
def _gated(c, o, GATED: tl.constexpr):
    if GATED:
        return tl.where(o > 0, c, 0.0).to(c.dtype)
    else:
        return c


@triton.jit
def queries_kernel(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, M, D]
    v_ptr,  # [B, H, M, D]
    o_ptr,  # [B, H, N, D]; not read unless GATED
    c_ptr,  # [T, B, H, N, D]
    c_q_ptr,  # [T, B, H, N, D]
    statistics_ptr,  # [4, B, H, N]: maximum and 1 / sum of exp(S - maximum), the same of |S|
    masses_ptr,  # [4, T, B, slots]: A and q are written here
    q_b,  # strides of these axes; the last one is dense
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    o_b,
    o_h,
    o_n,
    c_t,
    c_b,
    c_h,
    c_n,
    out_t,
    out_b,
    out_h,
    out_n,
    batch,  # B
    slots,
    scale,
    RHS: tl.constexpr,  # T
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    CONTRAST: tl.constexpr,
    SCORES: tl.constexpr,  # dtype of q and k in products
    SCORES_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    BLOCKS: tl.constexpr = (QUERIES + OWN - 1) // OWN
    COLUMNS: tl.constexpr = BLOCK_D if GATED else 2 * BLOCK_D
    MAPS: tl.constexpr = RHS // 2 if CONTRAST else RHS
    PRODUCT: tl.constexpr = c_ptr.dtype.element_ty
    program = tl.program_id(0)
    block = program % BLOCKS
    head = (program // BLOCKS % HEADS).to(tl.int64)
    sample = (program // (BLOCKS * HEADS) % batch).to(tl.int64)
    t = (program // (BLOCKS * HEADS) // batch).to(tl.int64)
    start = block * OWN
    k_head = k_ptr + sample * k_b + head * k_h
    v_head = v_ptr + sample * v_b + head * v_h
    o_head = o_ptr + sample * o_b + head * o_h
    c_head = c_ptr + sample * c_b + head * c_h
    q = _tile(q_ptr + sample * q_b + head * q_h, start, q_n, QUERIES, WIDTH, OWN, BLOCK_D, SCORES)
    key = tl.arange(0, OTHER)

    top = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    top_absolute = tl.full([OWN], float("-inf"), tl.float32)
    total_absolute = tl.zeros([OWN], tl.float32)
    for first in range(0, KEYS, OTHER):
        k = _tile(k_head, first, k_n, KEYS, WIDTH, OTHER, BLOCK_D, SCORES)
        scores = scale * dot(q, tl.trans(k), tl.zeros([OWN, OTHER], tl.float32), SCORES_PRECISION)
        inside = (first + key < KEYS)[None, :]
        absolute = tl.where(inside, tl.abs(scores), float("-inf"))
        scores = tl.where(inside, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        top = higher
        higher = tl.maximum(top_absolute, tl.max(absolute, 1))
        total_absolute = total_absolute * tl.exp(top_absolute - higher) + tl.sum(tl.exp(absolute - higher[:, None]), 1)
        top_absolute = higher
    inverse = 1 / total
    inverse_absolute = 1 / total_absolute
    row = start + tl.arange(0, OWN)
    of_row = statistics_ptr + (sample * HEADS + head) * QUERIES + row
    plane = batch.to(tl.int64) * HEADS * QUERIES
    if t == 0:
        tl.store(of_row, top, mask=row < QUERIES)
        tl.store(of_row + plane, inverse, mask=row < QUERIES)
        tl.store(of_row + 2 * plane, top_absolute, mask=row < QUERIES)
        tl.store(of_row + 3 * plane, inverse_absolute, mask=row < QUERIES)

    o = _tile(o_head, start, o_n, QUERIES, WIDTH, OWN, BLOCK_D, tl.float32)
    g = _gated(_tile(c_head + t * c_t, start, c_n, QUERIES, WIDTH, OWN, BLOCK_D, PRODUCT), o, GATED)
    sums = tl.zeros([OWN, COLUMNS], tl.float32)
    mass = tl.zeros([OWN], tl.float32)
    if CONTRAST:
        g_d = _gated(_tile(c_head + (t + MAPS) * c_t, start, c_n, QUERIES, WIDTH, OWN, BLOCK_D, PRODUCT), o, GATED)
        sums_d = tl.zeros([OWN, COLUMNS], tl.float32)
        mass_n = tl.zeros([OWN], tl.float32)
    for first in range(0, KEYS, OTHER):
        k = _tile(k_head, first, k_n, KEYS, WIDTH, OTHER, BLOCK_D, SCORES)
        scores = scale * dot(q, tl.trans(k), tl.zeros([OWN, OTHER], tl.float32), SCORES_PRECISION)
        inside = (first + key < KEYS)[None, :]
        a = tl.where(inside, tl.exp(scores - top[:, None]) * inverse[:, None], 0.0)
        of_absolute = tl.exp(tl.abs(scores) - top_absolute[:, None]) * inverse_absolute[:, None]
        signed = tl.where(scores > 0, a, tl.where(scores < 0, -a, 0.0))
        factor = tl.where(inside, signed + of_absolute, 0.0)
        v = _tile(v_head, first, v_n, KEYS, WIDTH, OTHER, BLOCK_D, tl.float32)
        v = tl.trans(tl.maximum(v, 0.0).to(PRODUCT))
        k = _halves(k, PRODUCT, GATED)
        c_a = 2 * dot(g, v, tl.zeros([OWN, OTHER], tl.float32), PRECISION)
        mass += tl.sum(a * tl.abs(c_a), 1)
        sums = dot((factor * c_a).to(PRODUCT), k, sums, PRECISION)
        if CONTRAST:
            c_a_d = 2 * dot(g_d, v, tl.zeros([OWN, OTHER], tl.float32), PRECISION)
            mass_n += tl.sum(a * tl.abs(c_a - c_a_d), 1)
            sums_d = dot((factor * c_a_d).to(PRODUCT), k, sums_d, PRECISION)

    slot = head * BLOCKS + block
    mass_row = masses_ptr + (t * batch + sample) * slots + slot
    side = batch.to(tl.int64) * slots * MAPS  # from the masses of P to those of N
    of_queries = batch.to(tl.int64) * slots * RHS * 2  # from the masses of A to those of q
    x = _tile(q_ptr + sample * q_b + head * q_h, start, q_n, QUERIES, WIDTH, OWN, BLOCK_D, tl.float32)
    c_q = 2 * scale * _selected(sums, x, GATED)
    out_head = c_q_ptr + sample * out_b + head * out_h
    _store_tile(out_head + t * out_t, start, out_n, c_q, QUERIES, WIDTH, OWN, BLOCK_D)
    tl.store(mass_row, tl.sum(mass, 0))
    tl.store(mass_row + of_queries, tl.sum(tl.sum(tl.abs(x) * tl.abs(c_q), 1), 0))
    if CONTRAST:
        c_q_d = 2 * scale * _selected(sums_d, x, GATED)
        _store_tile(out_head + (t + MAPS) * out_t, start, out_n, c_q_d, QUERIES, WIDTH, OWN, BLOCK_D)
        tl.store(mass_row + side, tl.sum(mass_n, 0))
        tl.store(mass_row + side + of_queries, tl.sum(tl.sum(tl.abs(x) * tl.abs(c_q - c_q_d), 1), 0))


@triton.jit
def keys_kernel(
    q_ptr,  # as above
    k_ptr,
    v_ptr,
    o_ptr,
    c_ptr,
    c_k_ptr,  # [T, B, H, M, D]
    c_v_ptr,  # [T, B, H, M, D], with the strides of c_k
    statistics_ptr,
    masses_ptr,  # v and k are written here
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    o_b,
    o_h,
    o_n,
    c_t,
    c_b,
    c_h,
    c_n,
    out_t,
    out_b,
    out_h,
    out_n,
    batch,
    slots,
    scale,
    RHS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    CONTRAST: tl.constexpr,
    SCORES: tl.constexpr,
    SCORES_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    BLOCKS: tl.constexpr = (KEYS + OWN - 1) // OWN
    COLUMNS: tl.constexpr = BLOCK_D if GATED else 2 * BLOCK_D
    MAPS: tl.constexpr = RHS // 2 if CONTRAST else RHS
    PRODUCT: tl.constexpr = c_ptr.dtype.element_ty
    program = tl.program_id(0)
    block = program % BLOCKS
    head = (program // BLOCKS % HEADS).to(tl.int64)
    sample = (program // (BLOCKS * HEADS) % batch).to(tl.int64)
    t = (program // (BLOCKS * HEADS) // batch).to(tl.int64)
    start = block * OWN
    q_head = q_ptr + sample * q_b + head * q_h
    k_head = k_ptr + sample * k_b + head * k_h
    v_head = v_ptr + sample * v_b + head * v_h
    o_head = o_ptr + sample * o_b + head * o_h
    c_head = c_ptr + sample * c_b + head * c_h + t * c_t
    k = _tile(k_head, start, k_n, KEYS, WIDTH, OWN, BLOCK_D, SCORES)
    v = tl.maximum(_tile(v_head, start, v_n, KEYS, WIDTH, OWN, BLOCK_D, tl.float32), 0.0).to(PRODUCT)
    of_rows = statistics_ptr + (sample * HEADS + head) * QUERIES
    plane = batch.to(tl.int64) * HEADS * QUERIES

    sums_k = tl.zeros([OWN, COLUMNS], tl.float32)
    sums_v = tl.zeros([OWN, BLOCK_D], tl.float32)
    if CONTRAST:
        sums_k_d = tl.zeros([OWN, COLUMNS], tl.float32)
        sums_v_d = tl.zeros([OWN, BLOCK_D], tl.float32)
    for first in range(0, QUERIES, OTHER):
        # Rows outside have zeros everywhere: their weights are 0, not exp(0 - maximum).
        row = first + tl.arange(0, OTHER)
        top = tl.load(of_rows + row, mask=row < QUERIES, other=0.0)
        inverse = tl.load(of_rows + plane + row, mask=row < QUERIES, other=0.0)
        top_absolute = tl.load(of_rows + 2 * plane + row, mask=row < QUERIES, other=0.0)
        inverse_absolute = tl.load(of_rows + 3 * plane + row, mask=row < QUERIES, other=0.0)
        q = _tile(q_head, first, q_n, QUERIES, WIDTH, OTHER, BLOCK_D, SCORES)
        scores = scale * dot(k, tl.trans(q), tl.zeros([OWN, OTHER], tl.float32), SCORES_PRECISION)  # [keys, queries]
        a = tl.exp(scores - top[None, :]) * inverse[None, :]
        of_absolute = tl.exp(tl.abs(scores) - top_absolute[None, :]) * inverse_absolute[None, :]
        factor = tl.where(scores > 0, a, tl.where(scores < 0, -a, 0.0)) + of_absolute
        a = a.to(PRODUCT)
        o = _tile(o_head, first, o_n, QUERIES, WIDTH, OTHER, BLOCK_D, tl.float32)
        g = _gated(_tile(c_head, first, c_n, QUERIES, WIDTH, OTHER, BLOCK_D, PRODUCT), o, GATED)
        q = _halves(q, PRODUCT, GATED)
        c_a = 2 * dot(v, tl.trans(g), tl.zeros([OWN, OTHER], tl.float32), PRECISION)
        sums_v = dot(a, g, sums_v, PRECISION)
        sums_k = dot((factor * c_a).to(PRODUCT), q, sums_k, PRECISION)
        if CONTRAST:
            g = _gated(_tile(c_head + MAPS * c_t, first, c_n, QUERIES, WIDTH, OTHER, BLOCK_D, PRODUCT), o, GATED)
            c_a = 2 * dot(v, tl.trans(g), tl.zeros([OWN, OTHER], tl.float32), PRECISION)
            sums_v_d = dot(a, g, sums_v_d, PRECISION)
            sums_k_d = dot((factor * c_a).to(PRODUCT), q, sums_k_d, PRECISION)

    slot = head * BLOCKS + block
    of_values = batch.to(tl.int64) * slots * RHS  # from the masses of A to those of v; q and k follow
    mass_row = masses_ptr + of_values + (t * batch + sample) * slots + slot
    side = batch.to(tl.int64) * slots * MAPS
    out = sample * out_b + head * out_h + t * out_t
    x = _tile(v_head, start, v_n, KEYS, WIDTH, OWN, BLOCK_D, tl.float32)
    c_v = tl.where(x > 0, 2 * sums_v, 0.0)
    _store_tile(c_v_ptr + out, start, out_n, c_v, KEYS, WIDTH, OWN, BLOCK_D)
    tl.store(mass_row, tl.sum(tl.sum(tl.abs(x) * tl.abs(c_v), 1), 0))
    if CONTRAST:
        c_v_d = tl.where(x > 0, 2 * sums_v_d, 0.0)
        _store_tile(c_v_ptr + out + MAPS * out_t, start, out_n, c_v_d, KEYS, WIDTH, OWN, BLOCK_D)
        tl.store(mass_row + side, tl.sum(tl.sum(tl.abs(x) * tl.abs(c_v - c_v_d), 1), 0))
    x = _tile(k_head, start, k_n, KEYS, WIDTH, OWN, BLOCK_D, tl.float32)
    c_k = 2 * scale * _selected(sums_k, x, GATED)
    _store_tile(c_k_ptr + out, start, out_n, c_k, KEYS, WIDTH, OWN, BLOCK_D)
    tl.store(mass_row + 2 * of_values, tl.sum(tl.sum(tl.abs(x) * tl.abs(c_k), 1), 0))
    if CONTRAST:
        c_k_d = 2 * scale * _selected(sums_k_d, x, GATED)
        _store_tile(c_k_ptr + out + MAPS * out_t, start, out_n, c_k_d, KEYS, WIDTH, OWN, BLOCK_D)
        tl.store(mass_row + 2 * of_values + side, tl.sum(tl.sum(tl.abs(x) * tl.abs(c_k - c_k_d), 1), 0))


def _check(q: Tensor, k: Tensor, v: Tensor, o: Tensor, c: Tensor, contrast: bool) -> None:
    if q.ndim != 4 or c.ndim != 5:
        raise ValueError(f"q must be [B, H, N, D] and c [T, B, H, N, D], not {list(q.shape)} and {list(c.shape)}")
    keys = [*q.shape[:2], k.shape[2] if k.ndim == 4 else 0, q.shape[3]]
    expected = {"k": keys, "v": keys, "o": list(q.shape), "c": [c.shape[0], *q.shape]}
    for name, tensor in (("k", k), ("v", v), ("o", o), ("c", c)):
        if list(tensor.shape) != expected[name]:
            raise ValueError(f"{name} {list(tensor.shape)} must have shape {expected[name]}")
    if contrast and c.shape[0] % 2:
        raise ValueError(f"c {list(c.shape)}: with contrast the first axis holds P and D rows and must be even")


def attention_pullback(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, c: Tensor, scale: float, gated: bool, contrast: bool
) -> tuple[Tensor, Tensor]:
    """``ramp_fast::attention_pullback`` for q, o [B, H, N, D], k, v [B, H, M, D] and c [T, B, H, N, D]."""
    _check(q, k, v, o, c, contrast)
    batch, heads, queries, width = q.shape
    rhs, keys = c.shape[0], k.shape[2]
    if width > MAX_WIDTH or any(x.dtype == torch.float64 for x in (q, k, v, o, c)):
        return attention_pullback_equation(q, k, v, o, c, scale, gated, contrast)
    q, k, v, o, c = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, o, c))
    out = packed_output(q, k, c)
    if 0 in (rhs, batch, heads, queries, keys, width):
        return out.zero_(), torch.zeros((4, rhs, batch), device=c.device)
    c_q, c_k, c_v = output_views(out, q, k)
    by_queries, by_keys = tiles(width, c.dtype, gated)
    blocks = triton.cdiv(queries, by_queries.own), triton.cdiv(keys, by_keys.own)
    # Both kernels fill all slots if they have as many blocks.
    new = torch.empty if blocks[0] == blocks[1] else torch.zeros
    masses = new((4, rhs, batch, heads * max(blocks)), dtype=torch.float32, device=c.device)
    statistics = torch.empty((4, batch, heads, queries), dtype=torch.float32, device=c.device)
    exact = q.dtype == k.dtype == torch.bfloat16
    strides = [s for x in (q, k, v, o) for s in x.stride()[:3]] + [s for x in (c, c_q) for s in x.stride()[:4]]
    strides_by_keys = [*strides[:-4], *c_k.stride()[:4]]
    constants = {
        "RHS": rhs,
        "HEADS": heads,
        "QUERIES": queries,
        "KEYS": keys,
        "WIDTH": width,
        "GATED": gated,
        "CONTRAST": contrast,
        "SCORES": tl.bfloat16 if exact else tl.float32,
        "SCORES_PRECISION": "ieee" if exact else "tf32x3",
        "PRECISION": "ieee" if c.dtype == torch.bfloat16 else "tf32x3",
        "BLOCK_D": padded(width),
    }
    programs = batch * heads * (rhs // 2 if contrast else rhs)
    numbers = batch, masses.shape[-1], scale
    with torch.cuda.device_of(c):
        queries_kernel[(programs * blocks[0],)](
            *(q, k, v, o, c, c_q, statistics, masses, *strides, *numbers),
            **constants,
            OWN=by_queries.own,
            OTHER=by_queries.other,
            num_warps=by_queries.warps,
            num_stages=by_queries.stages,
        )
        keys_kernel[(programs * blocks[1],)](
            *(q, k, v, o, c, c_k, c_v, statistics, masses, *strides_by_keys, *numbers),
            **constants,
            OWN=by_keys.own,
            OTHER=by_keys.other,
            num_warps=by_keys.warps,
            num_stages=by_keys.stages,
        )
    return out, sum_partials(masses)
