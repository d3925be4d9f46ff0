"""Linear layers whose input has both signs, with the LayerNorm that feeds them if there is one.

    c_x = W+^T c where x > 0,  W-^T c where x < 0                                    (linear_pullback)
    c_x = (sign(x) w / sigma(x) + |w| / sigma(|x|)) (W+^T c where n > 0, W-^T c where n < 0)
                                                    with n the LayerNorm's output    (linear_norm_pullback)

Both halves of the weights lie row by row beside each other, so one product with ``2 BLOCK_N`` columns reads c once and
leaves both sums of an element in one thread, which keeps one of them. K is walked in steps of a fixed size in a fixed
order, whatever the tile and however many rows there are. (Two products of a library and a kernel that chooses are
slower, and the library sums a row in an order that depends on the number of rows.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import (
    FEW_ROWS,
    INTERPRETED,
    aligned,
    dot,
    fitting,
    launch_tuned,
    sum_partials,
    tile_of,
)
from ramp_fast.kernels.norm import block_and_warps, row_statistics
from ramp_fast.ops._registry import equation

# Columns that one partial mass sums over; divides every BLOCK_N.
MASS_COLUMNS: tl.constexpr = tl.constexpr(64)


def _config(rows: int, columns: int, depth: int, warps: int, stages: int, described: bool = False) -> triton.Config:
    tile = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth, "DESCRIBED": described}
    return triton.Config(tile, num_warps=warps, num_stages=stages)


# One BLOCK_K per dtype: it fixes the order of the sums, so that a choice among these changes no product. None of them
# spills on sm_80, sm_90 or sm_100; float32 with more columns or rows, or with four warps, does on sm_80.
CONFIGS = {
    torch.bfloat16: (
        _config(128, 128, 64, 8, 3, True),
        _config(128, 128, 64, 8, 3),
        _config(128, 64, 64, 8, 4),
        _config(64, 128, 64, 4, 3, True),
        _config(64, 64, 64, 4, 4),
    ),
    torch.float32: (_config(64, 64, 32, 8, 4), _config(64, 64, 32, 8, 3)),
}
# bfloat16 products are exact; float32 ones are the sum of three products of tf32 parts.
PRECISION = {torch.bfloat16: "ieee", torch.float32: "tf32x3"}
if INTERPRETED:
    CONFIGS = dict.fromkeys(CONFIGS, (_config(32, 128, 16, 4, 1),))


@triton.jit
def statistics_kernel(
    x_ptr,  # [rows, width]
    statistics_ptr,  # [rows, 3]: mean, 1 / sigma(x), 1 / sigma(|x|)
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean, inverse, inverse_absolute = row_statistics(x_ptr + row * WIDTH, WIDTH, EPS, tl.float32, BLOCK)
    tl.store(statistics_ptr + row * 3, mean)
    tl.store(statistics_ptr + row * 3 + 1, inverse)
    tl.store(statistics_ptr + row * 3 + 2, inverse_absolute)


@triton.jit(do_not_specialize=["rows"])
def linear_pullback_kernel(
    c_ptr,  # [T, rows, K]
    halves_ptr,  # [I, 2, K]: W+ and W-
    x_ptr,  # [rows, I]
    out_ptr,  # [T, rows, I]
    statistics_ptr,  # [rows, 3]; this and the next three only with NORM
    weight_ptr,  # [I]; not read unless HAS_WEIGHT
    bias_ptr,  # [I]; not read unless HAS_BIAS
    masses_ptr,  # [T, rows, ceil(I / MASS_COLUMNS)]
    rows,
    GROUPS: tl.constexpr,  # T / GROUP_MAPS
    GROUP_MAPS: tl.constexpr,  # 2: a tile holds the rows of P and of D, for the mass of P - D
    DEPTH: tl.constexpr,  # K
    WIDTH: tl.constexpr,  # I
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    FEW: tl.constexpr,  # rows: another configuration is the fastest then
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,  # tiles of the weights, and of c unless they hold two maps, by descriptors
):
    TILES_N: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP_MAPS
    tiles_m = tl.cdiv(rows, TILE_ROWS)
    program = tl.program_id(0)
    index = program // (tiles_m * TILES_N)  # of the map
    program = program % (tiles_m * TILES_N)
    tile_m, tile_n = tile_of(program, tiles_m, TILES_N)

    # With two maps eight rows of P alternate with the same eight of D: a thread of the tensor cores holds both.
    r = tl.arange(0, BLOCK_M)
    if GROUP_MAPS == 2:
        of_pair = r // 8 % 2
        position = r // 16 * 8 + r % 8
    else:
        of_pair = r * 0
        position = r
    row = tile_m.to(tl.int64) * TILE_ROWS + position
    inside_rows = row < rows
    row = tl.minimum(row, rows - 1)  # rows and columns outside are computed and not stored: no masks in the loop
    c_row = (index + of_pair * GROUPS).to(tl.int64) * rows + row
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = inside_rows[:, None] & (column < WIDTH)[None, :]
    half = tl.minimum(tile_n * 2 * BLOCK_N + tl.arange(0, 2 * BLOCK_N), 2 * WIDTH - 1).to(tl.int64)
    if DESCRIBED:
        sums = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        w_tiles = tl.make_tensor_descriptor(
            halves_ptr, shape=[2 * WIDTH, DEPTH], strides=[DEPTH, 1], block_shape=[2 * BLOCK_N, BLOCK_K]
        )
        if GROUP_MAPS == 1:
            c_tiles = tl.make_tensor_descriptor(
                c_ptr, shape=[GROUPS * rows, DEPTH], strides=[DEPTH, 1], block_shape=[BLOCK_M, BLOCK_K]
            )
            top = index * rows + tile_m * TILE_ROWS  # rows of the next map are computed and not stored
            for start in range(0, DEPTH, BLOCK_K):
                c = c_tiles.load([top, start])
                w = w_tiles.load([tile_n * 2 * BLOCK_N, start])
                sums = dot(c, w.T, sums, PRECISION)
        else:
            k = tl.arange(0, BLOCK_K)
            c_tile = c_ptr + c_row[:, None] * DEPTH + k[None, :]
            for start in range(0, DEPTH, BLOCK_K):
                c = tl.load(c_tile + start, mask=(start + k < DEPTH)[None, :], other=0.0)
                w = w_tiles.load([tile_n * 2 * BLOCK_N, start])
                sums = dot(c, w.T, sums, PRECISION)
    else:
        k = tl.arange(0, BLOCK_K)
        c_tile = c_ptr + c_row[:, None] * DEPTH + k[None, :]
        w_tile = halves_ptr + half[None, :] * DEPTH + k[:, None]
        sums = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for start in range(0, DEPTH, BLOCK_K):
            if DEPTH % BLOCK_K == 0:
                c = tl.load(c_tile + start)
                w = tl.load(w_tile + start)
            else:
                c = tl.load(c_tile + start, mask=(start + k < DEPTH)[None, :], other=0.0)
                w = tl.load(w_tile + start, mask=(start + k < DEPTH)[:, None], other=0.0)
            sums = dot(c, w, sums, PRECISION)
    # Of two maps every thread holds both sums of both: from here on a row is a row of x.
    if GROUP_MAPS == 2:
        pairs = sums.reshape(BLOCK_M // 16, 2, 8, BLOCK_N, 2).permute(0, 2, 3, 4, 1)
        of_p, of_d = tl.split(pairs.reshape(TILE_ROWS, BLOCK_N, 2, 2))
        upper, lower = tl.split(of_p)
        upper_d, lower_d = tl.split(of_d)
        row = tl.minimum(tile_m.to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS), rows - 1)
        inside_rows = tile_m.to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS) < rows
        inside = inside_rows[:, None] & (column < WIDTH)[None, :]
    else:
        upper, lower = tl.split(sums.reshape(BLOCK_M, BLOCK_N, 2))

    # A thread loads four numbers, as it stores four: the 0 that is added is a multiple of four and no more to the
    # compiler. Eight of 16 bits would be another layout, in which all sums are held once more, and spill.
    x = tl.load(x_ptr + 4 * (rows >> 31) + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if NORM:
        mean = tl.load(statistics_ptr + row * 3)
        inverse = tl.load(statistics_ptr + row * 3 + 1)
        inverse_absolute = tl.load(statistics_ptr + row * 3 + 2)
        gate = (x - mean[:, None]) * inverse[:, None]
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
        factor = sign * inverse[:, None] + inverse_absolute[:, None]
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            gate *= weight[None, :]
            factor = sign * weight[None, :] * inverse[:, None] + tl.abs(weight)[None, :] * inverse_absolute[:, None]
        if HAS_BIAS:
            gate += tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    else:
        gate = x
        factor = 1.0
    out = factor * tl.where(gate > 0, upper, tl.where(gate < 0, lower, 0.0))
    place = out_ptr + (index.to(tl.int64) * rows + row)[:, None] * WIDTH + column[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=inside)

    if NORM:
        SLOTS: tl.constexpr = (WIDTH + MASS_COLUMNS - 1) // MASS_COLUMNS
        PARTS: tl.constexpr = BLOCK_N // MASS_COLUMNS
        slot = tile_n * PARTS + tl.arange(0, PARTS)
        stored = inside_rows[:, None] & (slot < SLOTS)[None, :]
        mass_row = masses_ptr + (index.to(tl.int64) * rows + row)[:, None] * SLOTS + slot[None, :]
        x = tl.abs(x)  # 0 outside
        of_c = tl.sum((x * tl.abs(out)).reshape(TILE_ROWS, PARTS, MASS_COLUMNS), 2)
        tl.store(mass_row, of_c, mask=stored)
    if GROUP_MAPS == 2:
        out_d = factor * tl.where(gate > 0, upper_d, tl.where(gate < 0, lower_d, 0.0))
        to_d = rows.to(tl.int64) * GROUPS
        tl.store(place + to_d * WIDTH, out_d.to(out_ptr.dtype.element_ty), mask=inside)
        if NORM:
            of_n = tl.sum((x * tl.abs(out - out_d)).reshape(TILE_ROWS, PARTS, MASS_COLUMNS), 2)
            tl.store(mass_row + to_d * SLOTS, of_n, mask=stored)


def _check(c: Tensor, panels: Tensor, x: Tensor) -> None:
    if x.ndim < 2 or c.ndim != x.ndim + 1 or c.shape[1:-1] != x.shape[:-1]:
        raise ValueError(f"x must be [B, ..., I] and c [T, B, ..., K], not {list(x.shape)} and {list(c.shape)}")
    if c.dtype != panels.dtype:
        raise ValueError(f"c ({c.dtype}) and panels ({panels.dtype}) must have the same dtype")
    expected = [x.shape[-1], 2, c.shape[-1]]
    if list(panels.shape) != expected:
        raise ValueError(
            f"panels {list(panels.shape)} must have shape {expected}: pack_panels with the weights on the device, and "
            "with the backend, that the product runs on"
        )


def _launch(
    c: Tensor,
    panels: Tensor,
    x: Tensor,
    out: Tensor,
    norm: tuple[Any, ...],
    masses: Tensor | None,
    group_maps: int,
) -> None:
    """One call for both operators; ``norm`` is (statistics, weight, bias) or empty."""
    statistics, weight, bias = norm or (None, None, None)
    depth, width = c.shape[-1], x.shape[-1]
    rows, groups = x.numel() // width, c.shape[0] // group_maps

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (groups * triton.cdiv(rows, meta["BLOCK_M"] // group_maps) * triton.cdiv(width, meta["BLOCK_N"]),)

    launch_tuned(
        linear_pullback_kernel,
        CONFIGS[c.dtype],
        ("DEPTH", "WIDTH", "NORM", "GROUP_MAPS", "FEW"),
        worth_trying,
        grid,
        (
            aligned(c),
            aligned(panels),
            x,
            out,
            x if statistics is None else statistics,
            x if weight is None else weight,
            x if bias is None else bias,
            x if masses is None else masses,
            rows,
        ),
        GROUPS=groups,
        GROUP_MAPS=group_maps,
        DEPTH=depth,
        WIDTH=width,
        NORM=bool(norm),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        PRECISION=PRECISION[c.dtype],
        FEW=c.shape[0] * rows < FEW_ROWS,
    )


def worth_trying(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    c = arguments["c_ptr"]

    def step(config: triton.Config) -> int:
        tile = config.kwargs["BLOCK_M"] + 2 * config.kwargs["BLOCK_N"]
        return int(tile * config.kwargs["BLOCK_K"] * c.element_size())

    return fitting(configs, c.device, constants["DEPTH"] * c.element_size(), constants["WIDTH"], constants["FEW"], step)


def linear_pullback(c: Tensor, panels: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``ramp_fast::linear_pullback`` for c [T, B, ..., K], panels [I, 2, K] and x [B, ..., I]."""
    if panels.dtype == torch.float64:  # tensor cores gain nothing there: the equation serves
        return equation("linear_pullback")(c, panels, x, dtype)
    _check(c, panels, x)
    out = torch.empty((c.shape[0], *x.shape), dtype=dtype, device=c.device)
    if out.numel():
        _launch(c.contiguous(), panels.contiguous(), x.contiguous(), out, (), None, 1)
    return out


def linear_norm_pullback(
    c: Tensor, panels: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contrast: bool
) -> tuple[Tensor, Tensor]:
    """``ramp_fast::linear_norm_pullback``; weight and bias [I]."""
    if panels.dtype == torch.float64:
        return equation("linear_norm_pullback")(c, panels, x, weight, bias, eps, contrast)
    _check(c, panels, x)
    width = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name} {list(vector.shape)} must have shape [{width}]")
    if contrast and c.shape[0] % 2:
        raise ValueError(f"c {list(c.shape)}: with contrast the first axis holds P and D rows and must be even")
    group_maps = 2 if contrast else 1
    vectors = [None if v is None else v.contiguous() for v in (weight, bias)]
    c, x = c.contiguous(), x.contiguous()
    out = torch.empty((c.shape[0], *x.shape), dtype=torch.float32, device=c.device)
    masses = torch.empty(
        (*out.shape[:-1], triton.cdiv(width, MASS_COLUMNS.value)), dtype=torch.float32, device=c.device
    )
    if out.numel():
        statistics = torch.empty((x.numel() // width, 3), dtype=torch.float32, device=c.device)
        block, warps = block_and_warps(width)
        with torch.cuda.device_of(c):
            statistics_kernel[(len(statistics),)](x, statistics, WIDTH=width, EPS=eps, BLOCK=block, num_warps=warps)
        _launch(c, panels.contiguous(), x, out, (statistics, *vectors), masses, group_maps)
    return out, sum_partials(masses.flatten(2))
