"""Matrix products ``x W^T + bias`` on tensor cores, which multiply 16-bit numbers and sum in float32.

float32 numbers are sums of two float16 ones: rows of x and of W are scaled by powers of two to begin where float16
ends, so that what a number loses is at most 2^-23 of it, or 2^-39 of its row's largest. Of the four products of parts
the smallest is left out, at most 2^-22 of the whole and mostly far less. (After Ootomo and Yokota, "Recovering single
precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022, arXiv 2203.03341.)

Tensor cores cut off what a sum cannot hold: sums of float32 begin anew in every step and are added up rounded, without
which they lose fifty times as much (measured on an H200: 3e-7 of 3,072 terms' magnitudes instead of 5e-9).

The sums are walked in steps of a fixed size in a fixed order, so that a row's result depends neither on the other rows
nor on the tile: a library's products choose their order by the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import FEW_ROWS, INTERPRETED, aligned, dot, fitting, launch_tuned, tile_of
from ramp_fast.ops._registry import equation
from ramp_fast.ops.product import unpack_parts

SPLIT_BLOCK, SPLIT_WARPS = 1024, 4


def _config(rows: int, columns: int, warps: int, stages: int, described: bool = False) -> triton.Config:
    # One depth for all: with it the order of the sums is fixed.
    tile = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 64, "DESCRIBED": described}
    return triton.Config(tile, num_warps=warps, num_stages=stages)


# By dtype of x and generation of the device; the last two are for few rows. On an H200 (9) the fastest that were
# measured; on 8 and 10 the largest that Triton neither spills registers for nor gives up on (of the three products of
# parts each has memory of its own on 10).
CONFIGS = {
    (torch.bfloat16, 8): (_config(128, 128, 8, 4), _config(64, 128, 4, 4), _config(64, 64, 4, 4)),
    (torch.bfloat16, 9): (
        *(_config(128, 256, 8, 3), _config(128, 128, 8, 4, True)),
        *(_config(64, 128, 4, 4, True), _config(64, 64, 4, 4)),
    ),
    (torch.bfloat16, 10): (_config(128, 256, 8, 3), _config(64, 128, 4, 4, True), _config(64, 64, 4, 4)),
    (torch.float32, 8): (_config(128, 64, 8, 3), _config(64, 64, 4, 3)),
    (torch.float32, 9): (
        *(_config(128, 128, 8, 3), _config(128, 128, 8, 3, True)),
        *(_config(64, 128, 4, 3, True), _config(64, 64, 4, 3)),
    ),
    (torch.float32, 10): (_config(64, 64, 4, 3),),
}
if INTERPRETED:
    one = triton.Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "DESCRIBED": False}, num_warps=4)
    CONFIGS = dict.fromkeys(CONFIGS, (one,))


def configs(dtype: torch.dtype, major: int) -> tuple[triton.Config, ...]:
    """To be tried for x of this dtype on a device of compute capability ``major``.x."""
    return CONFIGS[dtype, min(max(major, 8), 10)]


@triton.jit
def power_of_two(largest):
    """What multiplies numbers of up to ``largest`` to below 2^15, and its inverse."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 15), 254)  # both are float32 then
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def two_parts(x):
    """float16 numbers that add up to x, which is smaller than float16's largest."""
    first = x.to(tl.float16)
    return first, (x - first.to(tl.float32)).to(tl.float16)


@triton.jit(do_not_specialize=["rows"])
def split_kernel(
    x_ptr,  # [rows, DEPTH]
    parts_ptr,  # [2, rows, DEPTH]
    scale_ptr,  # [rows]: what the sum of the parts has to be multiplied by
    rows,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, DEPTH, BLOCK):
        x = tl.load(x_ptr + row * DEPTH + start + column, mask=start + column < DEPTH, other=0.0)
        largest = tl.maximum(largest, tl.abs(x))
    factor, inverse = power_of_two(tl.max(largest, 0))
    tl.store(scale_ptr + row, inverse)
    plane = rows.to(tl.int64) * DEPTH
    for start in range(0, DEPTH, BLOCK):
        inside = start + column < DEPTH
        x = tl.load(x_ptr + row * DEPTH + start + column, mask=inside, other=0.0) * factor
        first, second = two_parts(x)
        tl.store(parts_ptr + row * DEPTH + start + column, first, mask=inside)
        tl.store(parts_ptr + plane + row * DEPTH + start + column, second, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x_ptr,  # [PARTS, rows, K]
    w_ptr,  # [PARTS, I, K]
    x_scale_ptr,  # [rows]; this and the next are not read unless PARTS is 2
    w_scale_ptr,  # [I]
    bias_ptr,  # [I]; not read unless HAS_BIAS
    out_ptr,  # [rows, I]
    rows,
    DEPTH: tl.constexpr,  # K
    WIDTH: tl.constexpr,  # I
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FEW: tl.constexpr,  # rows: another configuration is the fastest then
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,  # tiles come by descriptors
):
    TILES_N: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, TILES_N)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIBED:
        # What lies beyond a part's last row or column is computed and not stored.
        x_tiles = tl.make_tensor_descriptor(
            x_ptr, shape=[PARTS * rows, DEPTH], strides=[DEPTH, 1], block_shape=[BLOCK_M, BLOCK_K]
        )
        w_tiles = tl.make_tensor_descriptor(
            w_ptr, shape=[PARTS * WIDTH, DEPTH], strides=[DEPTH, 1], block_shape=[BLOCK_N, BLOCK_K]
        )
        top = tile_m * BLOCK_M
        left = tile_n * BLOCK_N
        for start in range(0, DEPTH, BLOCK_K):
            x = x_tiles.load([top, start])
            w = w_tiles.load([left, start]).T
            if PARTS == 2:
                step = dot(x_tiles.load([rows + top, start]), w, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), "ieee")
                step = dot(x, w_tiles.load([WIDTH + left, start]).T, step, "ieee")
                sums += dot(x, w, step, "ieee")
            else:
                sums = dot(x, w, sums, "ieee")
    else:
        k = tl.arange(0, BLOCK_K)
        x_tile = x_ptr + tl.minimum(row, rows - 1)[:, None] * DEPTH + k[None, :]
        w_tile = w_ptr + tl.minimum(column, WIDTH - 1).to(tl.int64)[None, :] * DEPTH + k[:, None]
        x_plane = tl.cast(rows, tl.int64) * DEPTH
        w_plane: tl.constexpr = WIDTH * DEPTH
        for start in range(0, DEPTH, BLOCK_K):
            x = _columns(x_tile, start, k[None, :], DEPTH, BLOCK_K)
            w = _columns(w_tile, start, k[:, None], DEPTH, BLOCK_K)
            if PARTS == 2:
                x_rest = _columns(x_tile + x_plane, start, k[None, :], DEPTH, BLOCK_K)
                w_rest = _columns(w_tile + w_plane, start, k[:, None], DEPTH, BLOCK_K)
                step = dot(x_rest, w, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), "ieee")
                step = dot(x, w_rest, step, "ieee")
                sums += dot(x, w, step, "ieee")
            else:
                sums = dot(x, w, sums, "ieee")
    if PARTS == 2:
        sums *= tl.load(x_scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        sums *= tl.load(w_scale_ptr + column, mask=column < WIDTH, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + row[:, None] * WIDTH + column[None, :]
    tl.store(place, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _columns(tile, start, k, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a tile those of one step, 0 beyond the last."""
    if DEPTH % BLOCK_K == 0:
        return tl.load(tile + start)
    else:
        return tl.load(tile + start, mask=start + k < DEPTH, other=0.0)


def worth_trying(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    x, parts = arguments["x_ptr"], constants["PARTS"]

    def step(config: triton.Config) -> int:
        tile = (config.kwargs["BLOCK_M"] + config.kwargs["BLOCK_N"]) * parts
        return int(tile * config.kwargs["BLOCK_K"] * x.element_size())

    return fitting(configs, x.device, constants["DEPTH"] * x.element_size(), constants["WIDTH"], constants["FEW"], step)


def split_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [rows, K] in float32 as parts [2, rows, K], and what the sum of a row's parts has to be multiplied by."""
    rows, depth = x.shape
    parts = torch.empty((2, rows, depth), dtype=torch.float16, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(depth), SPLIT_BLOCK)
    with torch.cuda.device_of(x):
        split_kernel[(rows,)](x, parts, scales, rows, DEPTH=depth, BLOCK=block, num_warps=SPLIT_WARPS)
    return parts, scales


def product(x: Tensor, tiles: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """``ramp_fast::product`` for x [..., K] and tiles as ``pack_tiles`` makes them here."""
    if x.dtype == torch.float64:
        return equation("product")(x, tiles, bias, width)
    depth = x.shape[-1]
    wide = x.dtype == torch.float32
    expected = torch.int32 if wide else torch.bfloat16, [width, depth + wide]
    if (tiles.dtype, list(tiles.shape)) != expected:
        raise ValueError(
            f"tiles {tiles.dtype} {list(tiles.shape)} must be {expected[0]} {expected[1]} for {x.dtype}: pack_tiles "
            "with the weights on the device, and in the dtype, that the product runs on"
        )
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias {list(bias.shape)} must have shape [{width}]")
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if not depth:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    flat, tiles = x.reshape(-1, depth).contiguous(), tiles.contiguous()
    rows = flat.shape[0]
    (parts, x_scales), (weights, w_scales) = (flat, flat), (tiles, tiles)
    if wide:
        (parts, x_scales), (weights, w_scales) = split_rows(flat), unpack_parts(tiles)
    launch_tuned(
        product_kernel,
        configs(x.dtype, 8 if x.device.type == "cpu" else torch.cuda.get_device_capability(x.device)[0]),
        ("DEPTH", "WIDTH", "HAS_BIAS", "FEW"),
        worth_trying,
        lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),),
        (
            aligned(parts),
            aligned(weights),
            x_scales,
            w_scales,
            flat if bias is None else bias.contiguous(),
            out,
            rows,
        ),
        DEPTH=depth,
        WIDTH=width,
        PARTS=1 + wide,
        HAS_BIAS=bias is not None,
        FEW=rows < FEW_ROWS,
    )
    return out
