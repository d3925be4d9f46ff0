from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

__version__: str
has_cuda: bool

_Threads: TypeAlias = int

def bind_openmp(libtorch: str) -> str: ...
def supported_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
def poison_scratch(enabled: bool) -> None: ...

# Kernels raise ValueError for a shape, dtype, layout or device that they do not take. Those that are not here have the
# name and arguments of their operator, without dtypes, then its outputs (written), then the number of threads;
# ramp_fast.ops._registry calls them by name. These have arguments of their own.
def checksum(addresses: Any, sizes: Any, sampled: Any, out: Any, threads: _Threads, /) -> None: ...
def merge_pieces(pieces: list[Tensor], scales: Tensor, contrast: bool, out: Tensor, threads: _Threads, /) -> None: ...
def product(x: Tensor, tiles: Tensor, bias: Tensor | None, out: Tensor, threads: _Threads, /) -> None: ...
def ratio(c: Tensor, z: Tensor, d: Tensor, stabilizer: float, side: int, out: Tensor, threads: _Threads, /) -> None: ...
def centring(
    c: Tensor,
    factor: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    gate: bool,
    runs: int,
    step: int,
    out: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def activation_factor(
    x: Tensor,
    function: int,
    gain: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    factor: Tensor | None,
    threads: _Threads,
    /,
) -> None: ...
def activation_share(x: Tensor, function: int, y: Tensor, factor: Tensor, threads: _Threads, /) -> None: ...
def depthwise(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    transposed: bool,
    relu: bool,
    out: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def affine_factor(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    relu: bool,
    cap: float,
    channels_last: bool,
    y: Tensor,
    factor: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def attention_pullback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    c: Tensor,
    scale: float,
    gated: bool,
    contrast: bool,
    bias: Tensor | None,
    junction: bool,
    c_q: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    masses: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def attention_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    scale: float,
    value_share: float,
    score_share: float,
    bias: Tensor | None,
    c_q: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def gating_pullback(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    x: Tensor | None,
    factor: Tensor | None,
    contrast: bool,
    c_a: Tensor,
    c_b: Tensor,
    mass_a: Tensor,
    mass_b: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def rescale_pieces(
    pieces: Sequence[Tensor], scales: Tensor, contrast: bool, out: Tensor, threads: _Threads, /
) -> None: ...
def rotary(x: Tensor, stay: Tensor, cross: Tensor, pair: int, y: Tensor, threads: _Threads, /) -> None: ...
def rotary_pullback(
    c: Tensor,
    x: Tensor,
    y: Tensor | None,
    stay: Tensor,
    cross: Tensor,
    pair: int,
    target: Tensor,
    contrast: bool,
    out: Tensor,
    mass: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def masked_copies(
    images: Tensor,
    steps: Tensor,
    baseline: Tensor,
    first: int,
    last: int,
    reveal: bool,
    channels_last: bool,
    out: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def order_by_step(steps: Tensor, order: Tensor, begins: Tensor, threads: _Threads, /) -> None: ...
def advance_copies(
    source: Tensor,
    order: Tensor,
    begins: Tensor,
    first: int,
    by: int,
    channels_last: bool,
    out: Tensor,
    threads: _Threads,
    /,
) -> None: ...

# Where has_cuda: kernels on addresses of contiguous memory, started on a stream and not waited for. RuntimeError if
# CUDA refuses.
def cuda_problem(device: int) -> str: ...
def cuda_mask_steps(
    scores: int,
    item_size: int,
    batch: int,
    count: int,
    ks: Sequence[int],
    descending: bool,
    out: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_masked_copies(
    images: int,
    steps: int,
    baseline: int,
    item_size: int,
    batch: int,
    channels: int,
    pixels: int,
    first: int,
    last: int,
    shared: bool,
    shared_baseline: bool,
    channels_last: bool,
    reveal: bool,
    out: int,
    device: int,
    stream: int,
    /,
) -> None: ...
