"""Matrix products in low precision: on the tile registers of CPUs (AMX) and the tensor cores of GPUs.

Both multiply bfloat16; tile registers multiply int8 twice as fast. float32 is multiplied on tile registers in three
int8 slices (csrc/cpu/int8_slices.h; the Ozaki scheme, after Ootomo, Ozaki and Yokota, "DGEMM on integer matrix
multiplication unit", 2024, arXiv 2306.11975), and on tensor cores as sums of two float16 numbers (kernels/product.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads

from ramp_fast.ops._common import C
from ramp_fast.ops._registry import backends_for, equation, operator
from ramp_fast.ops.linear import COLUMNS


def has_tiles() -> bool:
    """Whether :func:`product` has a kernel here: the processor has tile registers (AMX) and nothing forbids them."""
    return "cpu" in backends_for("cpu") and C.active_isa() == "amx"


# A tile of bfloat16 has 16 pairs of inputs and 16 outputs, one of int8 has 16 quadruples of inputs (kTileRows,
# kTileColumns, kTileDepth and kInt8TileDepth in csrc/cpu).
_TILE = 16
_PAIR, _QUAD = 2, 4
# The largest magnitude of a row as an integer, and the least that is scaled to it (kLargest and kSmallest in
# csrc/cpu/int8_slices.h).
_LARGEST, _SMALLEST = 8355000.0, 1e-30
_SHIFTS = (16, 8, 0)  # of the slices in the integer, the highest first
_CENTRE = sum(128 << shift for shift in _SHIFTS)  # with it, slices from -128 to 127 are bytes
# The sums of more inputs of float32 could overflow (kInt8Depth in csrc/cpu/kernels.h).
INT8_DEPTH = 1 << 15


# Of operands.
_TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float32)


def multiplies(weight: Tensor) -> bool:
    """Whether :func:`product` has a kernel for weights ``[I, K]`` of this dtype on their device."""
    if weight.device.type == "cpu" and "cpu" in backends_for("cpu"):
        return has_tiles() and weight.dtype in _TENSOR_CORE_DTYPES and weight.shape[1] <= INT8_DEPTH
    return "triton" in backends_for(weight.device.type) and weight.dtype in _TENSOR_CORE_DTYPES


def pack_tiles(weight: Tensor) -> Tensor:
    """Weights ``[I, K]`` (outputs, inputs) for :func:`product`, in the layout of the backend that runs on their device.

    Parameters
    ----------
    weight : Tensor [I, K]
        bfloat16, or float32 with K up to 2^15.

    Returns
    -------
    Tensor [ceil(I / 32), ceil(K / 32), 2, 16, 32], bfloat16
        Of bfloat16: panels of 32 outputs, steps of 32 inputs, two halves of the outputs; pairs of inputs side by side.
    Tensor [ceil(I / 16), 3 ceil(K / 64) + 1, 16, 16], int32
        Of float32: panels of 16 outputs; steps of 64 inputs in three int8 slices, the highest first, each int32 holding
        those of four neighbouring inputs. A last block begins with 16 float32, the scales of the outputs: weights are
        integers times that.
    Tensor [I, K], bfloat16, or [I, K + 1], int32
        For the Triton kernel: the weights, or of float32 [2, I, K] parts in float16 and behind them [I] float32 scales,
        powers of two that the sum of an output's two parts has to be multiplied by.

    Zero where there is no weight.
    """
    if "triton" in backends_for(weight.device.type) and weight.dtype in _TENSOR_CORE_DTYPES:
        return weight if weight.dtype == torch.bfloat16 else _pack_parts(weight)
    if weight.dtype == torch.bfloat16:
        return _pack_pairs(weight)
    if weight.dtype != torch.float32:
        raise ValueError(f"weights must be float32 or bfloat16, not {weight.dtype}")
    if weight.shape[1] > INT8_DEPTH:
        raise ValueError(f"weights have {weight.shape[1]} inputs; tiles of float32 take up to {INT8_DEPTH}")
    return _pack_slices(weight)


def unpack_parts(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Parts ``[2, I, K]`` in float16 and scales ``[I]`` in float32 of weights for tensor cores; in the same memory."""
    width, depth = tiles.shape[0], tiles.shape[1] - 1
    flat = tiles.view(-1)
    parts = flat[: width * depth].view(torch.float16).view(2, width, depth)
    return parts, flat[width * depth :].view(torch.float32)


# The largest weight of an output is scaled to below 2^15, half of what float16 reaches.
_PART_EXPONENT = 15


def _pack_parts(weight: Tensor) -> Tensor:
    width, depth = weight.shape
    tiles = torch.empty((width, depth + 1), dtype=torch.int32, device=weight.device)
    parts, scales = unpack_parts(tiles)
    most = weight.abs().amax(1) if depth else weight.new_zeros(width)
    exponents = torch.frexp(most).exponent.clamp(_PART_EXPONENT - 126, 128) - _PART_EXPONENT
    scales.copy_(torch.ldexp(torch.ones_like(most), exponents))
    scaled = weight / scales.unsqueeze(1)
    parts[0] = scaled
    parts[1] = scaled - parts[0].float()
    return tiles


def _pack_pairs(weight: Tensor) -> Tensor:
    step = _PAIR * _TILE
    padded = F.pad(weight, (0, -weight.shape[1] % step, 0, -weight.shape[0] % COLUMNS))
    panels, steps = padded.shape[0] // COLUMNS, padded.shape[1] // step
    tiles = padded.view(panels, 2, _TILE, steps, _TILE, _PAIR).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(panels, steps, 2, _TILE, _PAIR * _TILE)


# Weights that are packed at a time: intermediate results stay in a core's cache.
_PACKED_AT_A_TIME = 1 << 16


def _pack_slices(weight: Tensor) -> Tensor:
    width, depth = weight.shape
    steps, panels = -(-depth // (_QUAD * _TILE)), -(-width // _TILE)
    packed = torch.zeros((panels, len(_SHIFTS) * steps + 1, _TILE, _TILE), dtype=torch.int32, device="cpu")
    tiles = packed[:, :-1].view(panels, steps, len(_SHIFTS), _TILE, _TILE)  # quads by outputs
    scales = packed[:, -1, 0].view(torch.float32)
    together = max(1, _PACKED_AT_A_TIME // max(1, steps * _QUAD * _TILE * _TILE))
    for first in range(0, panels, together):
        last = min(first + together, panels)
        rows = weight[first * _TILE : last * _TILE]
        most = rows.abs().amax(1) if depth else rows.new_zeros(rows.shape[0])
        scale = most.clamp_min(_SMALLEST) / _LARGEST
        integers = (rows.double() / scale.double().unsqueeze(1)).round_().nan_to_num_(0, 0, 0)  # NaN is in the scale
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        centred = torch.full(((last - first) * _TILE, steps * _QUAD * _TILE), _CENTRE, dtype=torch.int32, device="cpu")
        centred[: rows.shape[0], :depth] += integers.int()
        # 128 less in every byte: slices, the lowest first, and a byte that is nothing's
        slices = centred.bitwise_xor_(_CENTRE).view(torch.int8).view(-1, 4)
        for i, shift in enumerate(_SHIFTS):
            apart = slices[:, shift // 8].clone(memory_format=torch.contiguous_format)
            quads = apart.view(torch.int32).view(last - first, _TILE, steps, _TILE)
            tiles[first:last, :, i].copy_(quads.permute(0, 2, 3, 1))
        scales[first:last].copy_(F.pad(scale, (0, -rows.shape[0] % _TILE)).view(-1, _TILE))
    return packed


def unpack_tiles(tiles: Tensor, depth: int, width: int) -> Tensor:
    """The weights ``[I, K]`` that ``tiles`` stand for: exact, float64 of float32, else in their dtype."""
    if tiles.ndim == 2:
        if tiles.is_floating_point():
            return tiles
        parts, scales = unpack_parts(tiles)
        return parts.double().sum(0) * scales.double().unsqueeze(1)
    panels = tiles.shape[0]
    if tiles.is_floating_point():
        pairs: Tensor = tiles.unflatten(-1, (_TILE, _PAIR)).permute(0, 2, 4, 1, 3, 5)
        return pairs.reshape(panels * COLUMNS, tiles.shape[1] * _PAIR * _TILE)[:width, :depth]
    scales = tiles[:, -1, 0].contiguous().view(torch.float32).view(-1, 1)
    blocks: Tensor = tiles[:, :-1].contiguous().view(torch.int8).double()
    slices = blocks.unflatten(-1, (_TILE, _QUAD)).unflatten(1, (tiles.shape[1] // len(_SHIFTS), len(_SHIFTS)))
    integers = sum(slices[:, :, i] * 2.0**shift for i, shift in enumerate(_SHIFTS))
    rows = (
        torch.as_tensor(integers, device=tiles.device)
        .permute(0, 3, 1, 2, 4)
        .reshape(panels * _TILE, slices.shape[1] * _QUAD * _TILE)
    )
    return (rows * scales.double())[:width, :depth]


def _outputs(x: Tensor, tiles: Tensor, bias: Tensor | None, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


def _product_cpu(x: Tensor, tiles: Tensor, bias: Tensor | None, width: int) -> Tensor:
    if not has_tiles() or x.dtype == torch.float64 or x.numel() == 0 or width == 0:
        return equation("product")(x, tiles, bias, width)  # type: ignore[no-any-return]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty((rows.shape[0], width), dtype=x.dtype, device="cpu")
    bias = None if bias is None else bias.float().contiguous()
    C.product(rows, tiles.contiguous(), bias, out, get_num_threads())
    return out.view(*x.shape[:-1], width)


@operator(outputs=_outputs, cpu=_product_cpu, triton="product:product")
def product(x: Tensor, tiles: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """``x W^T + bias`` on tile registers (AMX) or tensor cores.

    bfloat16 is summed in float32.

    On tensor cores float32 rows of x and of W are scaled by powers of two, each number is the sum of two in float16,
    and the smallest of four products of parts is left out: the error of a term is at most 2^-21 of it, and 2^-38 of the
    product of the largest numbers of its rows of x and W. (Of sums of 768 terms a third of that of float32 arithmetic.)

    On tile registers float32 rows of x and of W are scaled, each by its largest magnitude, and rounded to integers of
    24 bits, whose products are summed exactly. So the error of an element is at most about 2^-24
    (max|x| sum|w| + max|w| sum|x|), over its row of x and its row w of W, and the rounding of the result: usually less
    than that of sums in float32; but numbers a thousand times smaller than the largest of their row have ten bits less.

    A row's result does not depend on the other rows, and a row that holds infinity or NaN gives NaN.

    Parameters
    ----------
    x : Tensor [..., K]
        float32 or bfloat16. (float64, and where :func:`multiplies` says no, run the equation.)
    tiles : Tensor
        ``pack_tiles`` of the weight [I, K] in the dtype of ``x``.
    bias : Tensor [I], optional
        float32 or bfloat16.
    width : int
        I.

    Returns
    -------
    Tensor [..., I]
        In the dtype of ``x``.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = unpack_tiles(tiles, x.shape[-1], width).to(dtype)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
