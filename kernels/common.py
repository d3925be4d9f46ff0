"""Launch helpers that the kernel families share."""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels run on the CPU, one program after the other; read when they are decorated.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def compute_dtype(*tensors: Tensor | None) -> tuple[torch.dtype, tl.dtype]:
    """The dtype of arithmetic and masses, for torch and for Triton."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return (torch.float64, tl.float64) if wide else (torch.float32, tl.float32)


@functools.cache
def tuned(
    kernel: Any, configs: tuple[triton.Config, ...], key: tuple[str, ...], prune: Callable[..., Any], device: str
) -> Any:
    """``kernel`` with the fastest of ``configs`` for each value of the arguments named by ``key``.

    Those that ``prune`` leaves are tried at the first call on a ``device`` (its name) and kept on disk by Triton. The
    number of rows must not be part of the key: an image's result would depend on its batch.
    """
    return triton.autotune(
        configs=list(configs), key=list(key), prune_configs_by={"early_config_prune": prune}, cache_results=True
    )(kernel)


# Triton's autotuner keeps the arguments of the call at hand in itself.
_LAUNCH = threading.Lock()


def launch_tuned(
    kernel: Any,
    configs: tuple[triton.Config, ...],
    key: tuple[str, ...],
    prune: Callable[..., Any],
    grid: Callable[[dict[str, int]], tuple[int]],
    arguments: tuple[Any, ...],
    **constants: Any,
) -> None:
    """Launch ``kernel`` on the device of its first argument as :func:`tuned` has found best."""
    first = arguments[0]
    launcher = tuned(kernel, configs, key, prune, device_name(first))[grid]

    def launch() -> None:
        if hasattr(triton, "set_allocator"):
            triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        launcher(*arguments, **constants)

    with torch.cuda.device_of(first), _LAUNCH:
        contextvars.copy_context().run(launch)  # the caller's allocator, if there is one, stays


def device_name(tensor: Tensor) -> str:
    """What tensors on the same kind of device have in common."""
    return "cpu" if tensor.device.type == "cpu" else torch.cuda.get_device_name(tensor.device)


# Whether this Triton has tensor descriptors, by which the copy engine of sm_90 and later loads whole tiles.
DESCRIPTORS = hasattr(tl, "make_tensor_descriptor") and hasattr(triton, "set_allocator")
# Addresses and rows that descriptors want are multiples of so many bytes.
DESCRIBED_BYTES = 16


def offered(configs: Iterable[triton.Config], major: int, row: int) -> list[triton.Config]:
    """Those that exist for a compute capability and rows of so many bytes."""
    described = DESCRIPTORS and major >= 9 and row % DESCRIBED_BYTES == 0
    return [config for config in configs if described or not config.kwargs["DESCRIBED"]]


# Fewer rows than this have configurations of their own, of tiles with few rows; all give the same bits.
FEW_ROWS = 1024


def fitting(
    configs: list[triton.Config],
    device: torch.device,
    row: int,
    width: int,
    few: bool,
    step: Callable[[triton.Config], int],
) -> list[triton.Config]:
    """Those worth trying for many rows or few: they fit into shared memory and are no wider than the layer.

    The smallest if none does.

    Parameters
    ----------
    configs : list of triton.Config
        Of a product, with BLOCK_M, BLOCK_N and DESCRIBED.
    device : torch.device
    row : int
        Bytes of a row of its operands.
    width : int
        Columns of its result.
    few : bool
        Whether it has fewer rows than FEW_ROWS.
    step : callable
        Bytes of the tiles that one step multiplies.
    """
    properties = torch.cuda.get_device_properties(device)
    in_flight = 0 if properties.major >= 9 else 1  # before wgmma the tile that is multiplied lies in registers
    configs = offered(configs, properties.major, row)
    configs = [c for c in configs if (c.kwargs["BLOCK_M"] <= 64) == few] or configs
    widest = max(min(c.kwargs["BLOCK_N"] for c in configs), triton.next_power_of_2(width))
    room = properties.shared_memory_per_block_optin
    kept = [c for c in configs if (c.num_stages - in_flight) * step(c) <= room and c.kwargs["BLOCK_N"] <= widest]
    return kept or [min(configs, key=step)]


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` where descriptors may point: a configuration found with other tensors may rely on that."""
    return tensor if tensor.data_ptr() % DESCRIBED_BYTES == 0 else tensor.clone()


# Neighbouring tiles share rows: so many row tiles go through all their columns before the next ones start.
GROUP: tl.constexpr = tl.constexpr(8)


@triton.jit
def tile_of(program, tiles_m, TILES_N: tl.constexpr):
    """Row and column of a program's tile among ``tiles_m`` times TILES_N."""
    first = program // (GROUP * TILES_N) * GROUP
    group = tl.minimum(tiles_m - first, GROUP)
    program = program % (GROUP * TILES_N)
    return first + program % group, program // group


WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """``a b + sums`` in float32."""
    if WIDEN:
        # The interpreter would multiply the bits of bfloat16 numbers as integers; and its library may sum a row in an
        # order that depends on where in the tile it lies, which float64 leaves no trace of.
        exact = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return sums + exact.to(tl.float32)
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)


SUM_BLOCK = 16 if INTERPRETED else 1024  # several steps on the small shapes of tests


@triton.jit
def sum_kernel(
    partials_ptr,  # [sums, COUNT]
    out_ptr,  # [sums]
    COUNT: tl.constexpr,  # a constant of the model (and an int for Triton 3.6's interpreter)
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, COUNT, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + row * COUNT + place, mask=place < COUNT, other=0.0).to(tl.float64)
    tl.store(out_ptr + row, tl.sum(total, 0).to(out_ptr.dtype.element_ty))


def sum_partials(partials: Tensor) -> Tensor:
    """Sums over the last axis in double, in an order that depends on nothing but its length.

    ``torch.sum`` on a GPU divides the work by the number of sums as well, that is by the batch.
    """
    out = torch.empty(partials.shape[:-1], dtype=partials.dtype, device=partials.device)
    if out.numel():
        with torch.cuda.device_of(partials):
            sum_kernel[(out.numel(),)](partials, out, COUNT=partials.shape[-1], BLOCK=SUM_BLOCK, num_warps=4)
    return out
