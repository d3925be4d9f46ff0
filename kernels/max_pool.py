"""Max-pooling over windows that tile the image: the largest input of a window, the first of equals, gets

    c_x = c,  or  c_x = max(x) c  where not divided

and the others 0. A program walks over a row of windows, channels innermost: it finds the winners of its block once and
writes every input's coefficient once for each map. Windows that the edge cuts off have no output: what is
left of them gets 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ramp_fast.kernels.common import INTERPRETED, compute_dtype

BLOCK = 64 if INTERPRETED else 512  # several of them on the small shapes of tests
WARPS = 4


@triton.jit(do_not_specialize=["batch"])
def max_pool_pullback_kernel(
    c_ptr,  # [T, B, h, w, C]
    x_ptr,  # [B, H, W, C]
    out_ptr,  # [T, B, H, W, C]
    batch,  # B
    NUM_MAPS: tl.constexpr,  # T
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    DIVIDED: tl.constexpr,
    COMPUTE: tl.constexpr,  # float32 or float64
    BLOCK: tl.constexpr,
):
    OUT_HEIGHT: tl.constexpr = HEIGHT // KERNEL_HEIGHT
    OUT_WIDTH: tl.constexpr = WIDTH // KERNEL_WIDTH
    # Windows of a row and of a column, with those that the edge cuts off.
    ACROSS: tl.constexpr = (WIDTH + KERNEL_WIDTH - 1) // KERNEL_WIDTH
    DOWN: tl.constexpr = (HEIGHT + KERNEL_HEIGHT - 1) // KERNEL_HEIGHT
    BLOCKS: tl.constexpr = (ACROSS * CHANNELS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    top = program // BLOCKS % DOWN
    sample = (program // (BLOCKS * DOWN)).to(tl.int64)
    place = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    left = place // CHANNELS
    channel = place % CHANNELS
    whole = (left < OUT_WIDTH) & (top < OUT_HEIGHT)
    corner = left * (KERNEL_WIDTH * CHANNELS) + channel
    first_line = sample * HEIGHT + top * KERNEL_HEIGHT

    best = tl.full([BLOCK], float("-inf"), COMPUTE)
    winner = tl.zeros([BLOCK], tl.int32)
    for y in range(KERNEL_HEIGHT):
        line = x_ptr + (first_line + y) * (WIDTH * CHANNELS)
        for z in range(KERNEL_WIDTH):
            x = tl.load(line + corner + z * CHANNELS, mask=whole, other=0.0).to(COMPUTE)
            larger = (x > best) | (x != x)
            best = tl.where(larger, x, best)
            winner = tl.where(larger, y * KERNEL_WIDTH + z, winner)

    for t in range(NUM_MAPS):
        first_sample = t * batch.to(tl.int64)
        from_window = ((first_sample + sample) * OUT_HEIGHT + top) * (OUT_WIDTH * CHANNELS) + place
        c = tl.load(c_ptr + from_window, mask=whole, other=0.0).to(COMPUTE)
        value = c if DIVIDED else c * best
        for y in range(KERNEL_HEIGHT):
            line = out_ptr + (first_sample * HEIGHT + first_line + y) * (WIDTH * CHANNELS)
            for z in range(KERNEL_WIDTH):
                inside = (left * KERNEL_WIDTH + z < WIDTH) & (top * KERNEL_HEIGHT + y < HEIGHT)
                out = tl.where(winner == y * KERNEL_WIDTH + z, value, 0.0)
                tl.store(line + corner + z * CHANNELS, out.to(out_ptr.dtype.element_ty), mask=inside)


def max_pool_pullback(c: Tensor, x: Tensor, kernel_height: int, kernel_width: int, divided: bool) -> Tensor:
    """``ramp_fast::max_pool_pullback`` for c [T, B, h, w, C] and x [B, H, W, C]."""
    if x.ndim != 4 or c.ndim != 5:
        raise ValueError(f"x must be [B, H, W, C] and c [T, B, h, w, C], not {list(x.shape)} and {list(c.shape)}")
    if kernel_height < 1 or kernel_width < 1:
        raise ValueError(f"windows must not be empty, not {kernel_height} x {kernel_width}")
    batch, height, width, channels = x.shape
    expected = [c.shape[0], batch, height // kernel_height, width // kernel_width, channels]
    if list(c.shape) != expected:
        raise ValueError(
            f"c {list(c.shape)} must have shape {expected}: windows of {kernel_height} x {kernel_width} in x "
            f"{list(x.shape)}"
        )
    c, x = c.contiguous(), x.contiguous()
    out = torch.empty((c.shape[0], *x.shape), dtype=c.dtype, device=c.device)
    if out.numel():
        blocks = triton.cdiv(triton.cdiv(width, kernel_width) * channels, BLOCK)
        with torch.cuda.device_of(c):
            max_pool_pullback_kernel[(batch * triton.cdiv(height, kernel_height) * blocks,)](
                *(c, x, out, batch),
                NUM_MAPS=c.shape[0],
                HEIGHT=height,
                WIDTH=width,
                CHANNELS=channels,
                KERNEL_HEIGHT=kernel_height,
                KERNEL_WIDTH=kernel_width,
                DIVIDED=divided,
                COMPUTE=compute_dtype(c, x)[1],
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out
