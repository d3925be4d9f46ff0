from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

__version__: str
has_cuda: bool

_Threads: TypeAlias = int

def bind_openmp(libtorch: str) -> str: ...
def supported_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
def poison_scratch(enabled: bool) -> None: ...

# Kernels: inputs, outputs (written), options. ValueError for a shape, dtype, layout or device they do not take.
def mass(x: Tensor, c: Tensor, mass: Tensor, contrast: bool, threads: _Threads, /) -> None: ...
def rescale(c: Tensor, scale: Tensor, out: Tensor, contrast: bool, threads: _Threads, /) -> None: ...
def rescale_parts(c: Tensor, scale: Tensor, out: Tensor, contrast: bool, threads: _Threads, /) -> None: ...
def merge(
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    out: Tensor,
    contrast: bool,
    threads: _Threads,
    /,
) -> None: ...
def junction(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    c_a: Tensor,
    c_b: Tensor,
    mass_a: Tensor,
    mass_b: Tensor,
    contrast: bool,
    relu: bool,
    threads: _Threads,
    /,
) -> None: ...
def merge_junction(
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    a: Tensor,
    b: Tensor,
    c_a: Tensor,
    c_b: Tensor,
    mass_a: Tensor,
    mass_b: Tensor,
    contrast: bool,
    relu: bool,
    threads: _Threads,
    /,
) -> None: ...
def residual_pullback(
    first: Tensor,
    first_scale: Tensor | None,
    second: Tensor | None,
    second_scale: Tensor | None,
    z: Tensor,
    b: Tensor,
    gain: Tensor,
    shift: Tensor,
    c_x: Tensor,
    c_b: Tensor,
    mass_y: Tensor,
    mass_b: Tensor,
    contrast: bool,
    threads: _Threads,
    /,
) -> None: ...
def norm_pullback(
    c: Tensor, x: Tensor, weight: Tensor | None, eps: float, out: Tensor, threads: _Threads, /
) -> None: ...
def linear_pullback(c: Tensor, panels: Tensor, x: Tensor, out: Tensor, threads: _Threads, /) -> None: ...
def product(x: Tensor, tiles: Tensor, bias: Tensor | None, out: Tensor, threads: _Threads, /) -> None: ...
def linear_norm_pullback(
    c: Tensor,
    panels: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    mass: Tensor,
    contrast: bool,
    threads: _Threads,
    /,
) -> None: ...
def max_pool_pullback(
    c: Tensor,
    x: Tensor,
    kernel_height: int,
    kernel_width: int,
    divided: bool,
    out: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def share(target: Tensor, masses: Sequence[Tensor], out: Tensor, /) -> None: ...
def scale_to(target: Tensor, actual: Tensor, scale: Tensor, mass: Tensor, /) -> None: ...
def select_phases(acc: Tensor, x: Tensor, top: int, left: int, out: Tensor, threads: _Threads, /) -> None: ...
def unpool(
    c: Tensor,
    indices: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    out: Tensor,
    threads: _Threads,
    /,
) -> None: ...
def scale_by(
    c: Tensor,
    factor: Tensor,
    n_scale: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    gate: bool,
    threads: _Threads,
    /,
) -> None: ...
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
def mask_steps(scores: Tensor, ks: Sequence[int], descending: bool, out: Tensor, threads: _Threads, /) -> None: ...
def masked_copies(
    images: Tensor,
    steps: Tensor,
    baseline: Tensor,
    first: int,
    last: int,
    reveal: bool,
    out: Tensor,
    channels_last: bool,
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
    out: Tensor,
    channels_last: bool,
    threads: _Threads,
    /,
) -> None: ...
def affine_factor(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    relu: bool,
    cap: float,
    y: Tensor,
    factor: Tensor,
    channels_last: bool,
    threads: _Threads,
    /,
) -> None: ...
def gelu_factor(x: Tensor, tanh_approx: bool, y: Tensor, factor: Tensor, threads: _Threads, /) -> None: ...
def softmax_pullback(scores: Tensor, c: Tensor, out: Tensor, threads: _Threads, /) -> None: ...
def attention_pullback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    c: Tensor,
    scale: float,
    gated: bool,
    contrast: bool,
    c_q: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    masses: Tensor,
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
