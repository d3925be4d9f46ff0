"""One description per operator: how to draw its arguments, and the magnitudes that its errors are measured in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tolerances import COMPUTE, assert_close
from torch import Tensor

from ramp_fast import ops
from ramp_fast.ops import _registry
from ramp_fast.ops._common import affine_factor_from, divide, mass_equation, rescale_equation
from ramp_fast.ops._registry import equation
from ramp_fast.ops.activation import FUNCTIONS, SHARES
from ramp_fast.ops.linear import unpack_panels
from ramp_fast.ops.product import unpack_tiles
from ramp_fast.ops.rotary import exchanged

EPS = 1e-6

# Around the sizes at which the kernels change course: vectors (16), blocks (512) and chunks (8192).
INNER = [(), (0,), (1,), (3,), (16,), (5, 7), (513,), (3, 4, 5), (2, 4097), (17, 31, 3)]
ROWS = [(1,), (5,), (0, 4), (3, 0), (1, 1), (7, 16), (3, 513), (2, 3, 33), (31, 270)]
# Heads, queries, keys, head size: around tiles (6 and 4 rows), vectors (16), blocks of queries (about 24576 scores).
ATTENTION = [
    (1, 1, 1, 1),
    (2, 1, 197, 64),
    (1, 7, 5, 24),
    (3, 13, 13, 3),
    (1, 50, 51, 80),
    (2, 33, 17, 16),
    (1, 130, 513, 17),
    (1, 0, 5, 4),
    (1, 5, 0, 4),
    (1, 5, 5, 0),
]
LARGE_ATTENTION = (2, 197, 197, 64)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
]


# Their factor is stored in c_dtype; arithmetic is that of x.
FACTORS = ("activation_factor", "activation_share", "affine_factor")


# Of coefficients of bfloat16 they multiply bfloat16, where the processor does.
OF_ATTENTION = ("attention_pullback", "attention_gradient")


@dataclass(frozen=True)
class Options:
    """What a case varies over."""

    rhs: int = 2
    batch: int = 2
    inner: tuple[int, ...] = (5, 7)
    rows: tuple[int, ...] = (3, 33)
    c_dtype: torch.dtype = torch.float32
    x_dtype: torch.dtype = torch.float32
    contrast: bool = True
    seed: int = 0
    zeros: bool = False

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.float64 if torch.float64 in (self.c_dtype, self.x_dtype) else torch.float32


# Several chunks, blocks and a tail in each sample, enough work for several threads.
LARGE = Options(rhs=4, batch=5, inner=(9, 4099), rows=(67, 521), seed=1, zeros=True)


def odd_options() -> list[Options]:
    """No sample, no right-hand side, and every one of the shapes above, without contrast and with it."""
    some = [Options(batch=0, inner=(3, 4, 5), seed=1), Options(rhs=0)]
    for k in range(len(INNER)):
        for contrast in (False, True):
            c_dtype, x_dtype = DTYPES[(2 * k + contrast) % len(DTYPES)]
            shapes = {"inner": INNER[k], "rows": ROWS[k % len(ROWS)], "batch": 1 + k % 3}
            some.append(Options(1 + contrast, **shapes, c_dtype=c_dtype, x_dtype=x_dtype, contrast=contrast, seed=k))
    return some


class Draw:
    """Random tensors of a case, reproducible by its seed."""

    def __init__(self, o: Options) -> None:
        self.o = o
        self.generator = torch.Generator().manual_seed(o.seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def sample(self, *shape: int) -> Tensor:
        """Activations [B, ...]; some exactly 0 (and one sample as a whole) if the case asks for zeros."""
        x = self.normal(self.o.batch, *shape, dtype=self.o.x_dtype)
        if self.o.zeros and x.numel():
            x[torch.rand(x.shape, generator=self.generator) < 0.3] = 0
            x[0] = 0
        return x

    def coefficient(self, *shape: int) -> Tensor:
        c = self.normal(self.o.rhs, self.o.batch, *shape, dtype=self.o.c_dtype)
        if self.o.zeros and c.numel():
            c[:, -1] = 0
        return c

    def scale(self, *shape: int) -> Tensor:
        dtype = torch.float64 if self.o.arithmetic == torch.float64 else torch.float32
        return self.normal(self.o.rhs, self.o.batch, *shape, dtype=dtype)


def need_kernel(name: str, isa: str) -> None:
    """Skip where an operator has no kernel for an instruction set: its equation runs, by a library's products."""
    if name == "product" and isa != "amx":
        pytest.skip("product has a kernel for tile registers (AMX) only")


def poison_memory(enabled: bool) -> None:
    """Fill new tensors and the kernels' scratch with NaN, so that what is never written, or read before that, shows."""
    torch.use_deterministic_algorithms(enabled)
    if _registry.extension is not None:
        _registry.extension.poison_scratch(enabled)


@dataclass(frozen=True)
class Case:
    """An operator: its arguments for given options, and per output the magnitude of its terms (float64)."""

    name: str
    arguments: Callable[[Options], tuple[Any, ...]]
    magnitude: Callable[..., tuple[Tensor, ...]]

    def expected(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The reference in float64."""
        backend = ops.forced_backend()
        ops.set_backend("reference")
        try:
            return as_tuple(getattr(ops, self.name)(*in_float64(args)))
        finally:
            ops.set_backend(backend)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_in_float64(a) for a in args)


def _in_float64(a: Any) -> Any:
    if isinstance(a, Tensor):
        return a.double() if a.is_floating_point() else a
    if isinstance(a, list) and a and isinstance(a[0], Tensor):
        return [t.double() for t in a]
    return torch.float64 if isinstance(a, torch.dtype) else a


def of_sample(args: tuple[Any, ...], name: str, first: int, last: int) -> tuple[Any, ...]:
    """The same call with samples [first, last) only."""
    coefficients = {"c", "acc", "first", "second", "first_scale", "second_scale", "scale", "n_scale"}
    parameters = {"weight", "bias", "gain", "shift", "panels", "tiles", "stay", "cross"}
    schema = getattr(torch.ops.ramp_fast, name).default._schema
    parts: list[Any] = []
    for argument, value in zip(schema.arguments, args, strict=True):
        if argument.name in ("target", "actual"):
            parts.append(value[:, first:last])
        elif argument.name in ("masses", "pieces"):
            parts.append([each[:, first:last] for each in value])
        elif argument.name == "scales":
            parts.append(value[:, :, first:last])
        elif not isinstance(value, Tensor) or argument.name in parameters:
            parts.append(value)
        else:
            # at another address modulo the vector size than in the batch
            part = value[:, first:last] if argument.name in coefficients else value[first:last]
            shifted = torch.empty(part.numel() + 3, dtype=part.dtype)[3:].view(part.shape)
            parts.append(shifted.copy_(part))
    return tuple(parts)


def batch_axes(name: str, outputs: int) -> list[int]:
    """The axis of samples of each output."""
    axes = [0 if name in (*FACTORS, "mask_steps", "product", "rotary", "sides") else 1] * outputs
    if name in ("attention_pullback", "share", "piece_masses"):
        axes[-1] = 2  # masses are [n, T, B]
    return axes


def _rescale_magnitude(c: Tensor, scale: Tensor, contrast: bool) -> Tensor:
    # with all signs such that nothing cancels: s_P - s_N becomes |s_P| + |s_N|
    if not contrast:
        return rescale_equation(c.abs(), scale.abs(), False)
    half = scale.shape[0] // 2
    signs = scale.abs()
    signs[half:] *= -1
    terms = c.abs()
    terms[half:] *= -1
    return rescale_equation(terms, signs, True).abs()


def _merge_magnitude(first: Tensor, s: Tensor, second: Tensor, t: Tensor, contrast: bool) -> Tensor:
    return _rescale_magnitude(first, s, contrast) + _rescale_magnitude(second, t, contrast)


def _uncancelled_mass(x: Tensor, c: Tensor, contrast: bool) -> Tensor:
    """The mass if P and -D had the same sign everywhere."""
    terms = c.abs()
    if contrast:
        terms[terms.shape[0] // 2 :] *= -1
    return mass_equation(x, terms, contrast)


def _split_magnitude(c: Tensor, a: Tensor, b: Tensor, contrast: bool) -> tuple[Tensor, ...]:
    return 2 * c, 2 * c, 2 * _uncancelled_mass(a, c, contrast), 2 * _uncancelled_mass(b, c, contrast)


def _mass(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    return d.sample(*o.inner), d.coefficient(*o.inner), o.contrast


def _rescale(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    return d.coefficient(*o.inner), d.scale(), o.contrast


def _rescale_parts(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    *rows, width = o.rows
    parts = 1 + o.seed % 3
    return d.coefficient(math.prod(rows), parts, width), d.scale(parts), o.contrast


def _parts_magnitude(c: Tensor, scale: Tensor, contrast: bool) -> tuple[Tensor, ...]:
    parts = [_rescale_magnitude(c[..., i, :], scale[..., i], contrast) for i in range(c.shape[3])]
    return (torch.stack(parts, 3),)


def _merge(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    second = d.coefficient(*o.inner).to(o.x_dtype)
    return d.coefficient(*o.inner), d.scale(), second, d.scale(), o.contrast


def _operands(d: Draw) -> tuple[Any, ...]:
    a, b = d.sample(*d.o.inner), d.sample(*d.o.inner)
    b = torch.where((a + b).abs() < 1e-2, a, b)  # whether their sum is positive must not depend on its rounding
    return a, b, d.o.contrast, d.o.x_dtype if d.o.seed % 2 else None, d.o.seed % 4 > 1


def _junction(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    return d.coefficient(*o.inner), *_operands(d)


def _merge_junction(o: Options) -> tuple[Any, ...]:
    return *_merge(o)[:4], *_operands(Draw(o))


def _norm(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    weight = d.normal(o.rows[-1], dtype=torch.float32) if o.seed % 3 else None
    return d.coefficient(*o.rows), d.sample(*o.rows), weight, EPS


def _norm_factor_magnitude(x: Tensor, weight: Tensor | None) -> Tensor:
    w = 1 if weight is None else weight.abs()
    return w * sum(((u - u.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + EPS).rsqrt() for u in (x, x.abs()))


def _norm_gradient_magnitude(c: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    own = c.abs() if weight is None else c.abs() * weight.abs()
    inverse = ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((own + own.mean(-1, keepdim=True)) * inverse,)


def _packed(d: Draw, depth: int, width: int) -> Tensor:
    return ops.pack_panels(d.normal(depth, width, dtype=d.o.c_dtype))


def _depth(o: Options) -> int:
    return (1, 2, 7, 33, 64)[o.seed % 5]


def _linear(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    return d.coefficient(*o.rows[:-1], _depth(o)), _packed(d, _depth(o), o.rows[-1]), d.sample(*o.rows), o.c_dtype


def _linear_magnitude(c: Tensor, panels: Tensor, x: Tensor) -> Tensor:
    weight = unpack_panels(panels, c.shape[-1], x.shape[-1])
    return c.abs() @ weight.abs()


def _product(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    width, dtype = o.rows[-1], o.c_dtype
    weight = d.normal(width, _depth(o), dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    bias = d.normal(width, dtype=dtype) if o.seed % 2 else None
    return d.normal(o.batch, *o.rows[:-1], _depth(o), dtype=dtype), ops.pack_tiles(weight), bias, width


def _product_magnitude(x: Tensor, tiles: Tensor, bias: Tensor | None, width: int) -> tuple[Tensor, ...]:
    weight, x = unpack_tiles(tiles, x.shape[-1], width).double().abs(), x.abs()
    magnitude = torch.nn.functional.linear(x, weight, None if bias is None else bias.abs())
    if tiles.dtype == torch.int32 and x.numel():
        # Integers of 24 bits lose as much of every row's largest; this is in units of tolerances.COMPUTE.
        largest = x.amax(-1, keepdim=True) * weight.sum(-1) + weight.amax(-1) * x.sum(-1, keepdim=True)
        magnitude = magnitude + largest * (2**-24 / COMPUTE["product", torch.float32])
    return (magnitude,)


def _linear_norm(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    width = o.rows[-1]
    x = d.sample(*o.rows)
    weight = d.normal(width, dtype=torch.float32) if o.seed % 3 else None
    bias = d.normal(width, dtype=torch.float32) if o.seed % 2 else None
    n = torch.nn.functional.layer_norm(
        x.double(),
        (width,),
        None if weight is None else weight.double(),
        None if bias is None else bias.double(),
        EPS,
    )
    # Which half is chosen is decided by rounding where the normalised value is almost 0: weights of such inputs are 0.
    near = (n.abs() < 1e-3).flatten(0, -2).any(0)
    packed = ops.pack_panels(d.normal(_depth(o), width, dtype=o.c_dtype).masked_fill(near, 0))
    return d.coefficient(*o.rows[:-1], _depth(o)), packed, x, weight, bias, EPS, o.contrast


def _linear_norm_magnitude(
    c: Tensor, panels: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, contrast: bool
) -> tuple[Tensor, ...]:
    out = _linear_magnitude(c, panels, x) * _norm_factor_magnitude(x, weight)
    return out, _uncancelled_mass(x, out, contrast)


def _scale_by(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    n_scale = d.scale()[: o.rhs // 2] if o.contrast and o.seed % 2 else None
    return d.coefficient(*o.inner), d.sample(*o.inner), n_scale


def _ratio(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    z, below = d.sample(*o.inner), d.sample(*o.inner)
    return d.coefficient(*o.inner), z, below, 0.25 if o.contrast else 0.0, o.seed % 3 - 1


def _n_scaled_magnitude(c: Tensor, n_scale: Tensor | None) -> Tensor:
    if n_scale is None:
        return c.abs()
    return _rescale_magnitude(c, torch.cat((torch.ones_like(n_scale), n_scale)), True)


def _activation_factor(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    x = 3 * d.sample(*o.inner)
    function = FUNCTIONS[(o.seed + o.contrast) % len(FUNCTIONS)]
    if "hard" in function:  # a slope changes at 3
        x = torch.where((x.abs() - 3).abs() < 1e-2, torch.ones_like(x), x)
    if x.ndim != 4 or o.contrast:
        return x, function, o.c_dtype, None, None
    gain, shift = _channels_of(x, d, o)
    return x, function, o.c_dtype, gain, shift


def _activation_magnitude(x: Tensor, function: str, _: Any, gain: Tensor | None, shift: Any) -> tuple[Tensor, ...]:
    slope = 2 + 2 * x.abs()
    return 1 + x.abs(), slope if gain is None else 2 * slope * gain.abs().view(-1, 1, 1)


def _activation_share(o: Options) -> tuple[Any, ...]:
    return 3 * Draw(o).sample(*o.inner), SHARES[o.seed % len(SHARES)], o.c_dtype


def _channels_of(x: Tensor, d: Draw, o: Options) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if o.x_dtype == torch.float64 else torch.float32
    return d.normal(x.shape[1], dtype=dtype), d.normal(x.shape[1], dtype=dtype)


def _affine(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    x = d.sample(*(o.inner or (3,)))
    gain, shift = _channels_of(x, d, o)
    # outputs within rounding of zero would gate differently in float32
    y = x.double() * gain.double().view(-1, *[1] * (x.ndim - 2)) + shift.double().view(-1, *[1] * (x.ndim - 2))
    x = torch.where(y.abs() < 1e-4, torch.ones_like(x), x)
    if x.ndim == 4 and o.seed % 2:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, gain, shift, o.contrast, 1.5, o.c_dtype


def _affine_magnitude(x: Tensor, gain: Tensor, shift: Tensor, relu: bool, cap: float, _: Any) -> tuple[Tensor, ...]:
    shape = (-1, *[1] * (x.ndim - 2))
    return x.abs() * gain.abs().view(shape) + shift.abs().view(shape), 4 * gain.abs().view(shape)


def _channels(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """An activation with channels innermost, and a BatchNorm's gain and shift, some of which are 0."""
    x = d.sample(*(d.o.inner or (3,)))
    gain, shift = (d.normal(x.shape[-1], dtype=d.o.arithmetic) for _ in range(2))
    gain[::5], shift[1::4] = 0, 0
    return x, gain, shift


def _affine_pullback(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    y, gain, shift = _channels(d)
    if o.zeros:
        y = torch.where(y == 0, shift.to(y.dtype), y)  # which BatchNorm makes of 0
    n_scale = d.scale()[: o.rhs // 2] if o.contrast and o.seed % 2 else None
    return d.coefficient(*y.shape[1:]), y, gain, shift, o.seed % 4 > 1, n_scale


def _affine_pullback_magnitude(
    c: Tensor, y: Tensor, gain: Tensor, shift: Tensor, relu: bool, n_scale: Tensor | None
) -> tuple[Tensor, ...]:
    return (_n_scaled_magnitude(c, n_scale) * affine_factor_from(y, gain, shift, relu),)


def _centring(o: Options) -> tuple[Any, ...]:
    d = Draw(replace(o, rhs=o.rhs + o.rhs % 2))
    x, gain, shift = _channels(d)
    mode = o.seed % 4
    parameters = (None, None) if mode < 2 else (gain, shift)
    return d.coefficient(*x.shape[1:]), x if mode else None, *parameters, bool(mode and o.contrast)


def _masses(d: Draw, count: int) -> list[Tensor]:
    """Not negative, some 0 in the first sample."""
    drawn = [d.scale(*d.o.inner).abs() for _ in range(count)]
    for mass in drawn if d.o.zeros else []:
        mass[:, :1] = 0
    return drawn


def _share(o: Options) -> tuple[Any, ...]:
    target, *masses = _masses(Draw(o), 3 + o.seed % 3)
    return target, masses


def _scale_to(o: Options) -> tuple[Any, ...]:
    return tuple(_masses(Draw(o), 2))


def _residual(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    b, gain, shift = _channels(d)
    z = d.sample(*b.shape[1:]).relu()
    # whether y is above the shift must not depend on the rounding of y
    z = torch.where((z - b - shift).abs() < 1e-2, torch.zeros_like(z), z)
    first, second = d.coefficient(*b.shape[1:]), d.coefficient(*b.shape[1:]).to(o.x_dtype)
    readers = (first, d.scale(), second, d.scale()) if o.seed % 3 else (first, None, None, None)
    return *readers, z, b, gain, shift, o.contrast, o.x_dtype if o.seed % 2 else None


def _residual_magnitude(
    first: Tensor,
    s: Tensor | None,
    second: Tensor | None,
    t: Tensor | None,
    z: Tensor,
    b: Tensor,
    gain: Tensor,
    shift: Tensor,
    contrast: bool,
    _: Any,
) -> tuple[Tensor, ...]:
    one = second is None or s is None or t is None
    c = 4 * (first.abs() if one else _merge_magnitude(first, s, second, t, contrast))
    masses = (_uncancelled_mass(x * (z > 0), c, contrast) for x in ((z - b).relu(), b.relu()))
    return 2 * gain.abs() * c, c, *masses


def _unpool(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    channels = max(1, min(math.prod(o.inner), 600))
    kernel, stride, padding = (3, 2), (2, 1), (1, 0)
    x = (4 * d.sample(channels, 7, 6)).round() / 4
    _, indices = torch.nn.functional.max_pool2d(x, kernel, stride, padding, return_indices=True)
    where = indices.permute(0, 2, 3, 1).to(torch.int32)
    return d.coefficient(*where.shape[1:]), where, 7, 6, list(kernel), list(stride), list(padding)


def _unpool_magnitude(c: Tensor, *where: Any) -> tuple[Tensor, ...]:
    return (torch.ops.ramp_fast.unpool(c.abs(), *where),)


def _select_phases(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    channels = 1 + math.prod(o.inner) % 5
    height, width = (95, 128) if math.prod(o.inner) > 30_000 else (5, 8)
    cells = 1 + -(-height // 2), 1 + -(-width // 3)
    return d.coefficient(*cells, 2, 3, 2, channels), d.sample(height, width, channels), 1, 0


def _by_channel(o: Options) -> tuple[int, int]:
    """Rows and channels: one block of channels and more, and several tasks."""
    return math.prod(o.rows) % 41, 1 + math.prod(o.inner) % 600


def _mul(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    rows, channels = _by_channel(o)
    return d.coefficient(rows, channels), d.sample(rows, channels), d.sample(channels), o.contrast


def _mul_magnitude(c: Tensor, a: Tensor, b: Tensor, contrast: bool) -> tuple[Tensor, ...]:
    sides = 2 * c.abs()
    own = sides * b.abs().unsqueeze(1)
    return own, (sides * a.abs()).sum(2), _mass_of(a, own, contrast)


def _mul_gradient(o: Options) -> tuple[Any, ...]:
    return *_mul(o)[:3], (0.5, 1.0)[o.seed % 2]


def _mul_gradient_magnitude(c: Tensor, a: Tensor, b: Tensor, share: float) -> tuple[Tensor, ...]:
    return share * c.abs() * b.abs().unsqueeze(1), share * (c.abs() * a.abs()).sum(2)


def _sides(o: Options) -> tuple[Any, ...]:
    rows, channels = _by_channel(o)
    groups = 1 + o.seed % 3
    return Draw(o).sample(rows, groups * channels), groups, o.c_dtype


def _sides_magnitude(x: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.stack([x.abs().unflatten(-1, (groups, -1))] * 2, -2),)


def _spread(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    rows, channels = _by_channel(o)
    return d.coefficient(channels), d.sample(rows, channels), o.contrast


def _spread_magnitude(c: Tensor, x: Tensor, contrast: bool) -> tuple[Tensor, ...]:
    own = 2 * c.abs().unsqueeze(2).expand(-1, -1, x.shape[1], -1)
    return own, _mass_of(x, own, contrast)


def _piece_masses(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    rows, channels = _by_channel(o)
    first = channels // 3
    widths = [[channels], [first, channels - first], [first, 0, channels - first]][o.seed % 3]
    return d.coefficient(rows, channels), d.sample(rows, channels), widths, o.contrast


def _piece_masses_magnitude(c: Tensor, x: Tensor, widths: list[int], contrast: bool) -> tuple[Tensor, ...]:
    pieces = zip(c.split(widths, -1), x.split(widths, -1), strict=True)
    return (torch.stack([_uncancelled_mass(own, piece.abs(), contrast) for piece, own in pieces]),)


def _merge_pieces(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    rows, channels = _by_channel(o)
    whole = [d.coefficient(rows, channels + 4) for _ in range(1 + o.seed % 4)]
    pieces = [c[..., 3:-1] if i != o.seed % 2 else c[..., 3:-1].contiguous() for i, c in enumerate(whole)]
    return pieces, torch.stack([d.scale() for _ in pieces]), o.contrast


def _merge_pieces_magnitude(pieces: list[Tensor], scales: Tensor, contrast: bool) -> tuple[Tensor, ...]:
    several = zip(pieces, scales, strict=True)
    return (torch.stack([_rescale_magnitude(c, scale, contrast) for c, scale in several]).sum(0),)


def _gating(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    rows, width = _by_channel(o)
    # parts of wider rows, as a gate takes them apart
    a, b, x = (torch.cat([d.sample(rows, width), d.sample(rows, 3)], -1)[..., :width] for _ in range(3))
    further = o.seed % 2 == 1
    factor = d.sample(rows, width).to(o.c_dtype) if further else None
    return d.coefficient(rows, width), a, b, x if further else None, factor, o.contrast


def _gating_magnitude(
    c: Tensor, a: Tensor, b: Tensor, x: Tensor | None, factor: Tensor | None, contrast: bool
) -> tuple[Tensor, ...]:
    c_a, c_b, at = 2 * c.abs() * b.abs(), 2 * c.abs() * a.abs(), a
    if x is not None and factor is not None:
        c_a, at = c_a * factor.abs(), x
    return c_a, c_b, _mass_of(at, c_a, contrast), _mass_of(b, c_b, contrast)


def _rescale_pieces(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    heads, rows, width = 1 + o.seed % 3, math.prod(o.rows[:-1]), o.rows[-1]
    pieces = [d.coefficient(rows, heads, width).transpose(2, 3) for _ in range(1 + o.seed % 4)]
    pieces[-1] = pieces[-1].to(o.x_dtype)
    return pieces, torch.stack([d.scale() for _ in pieces]), o.contrast


def _pieces_magnitude(pieces: list[Tensor], scales: Tensor, contrast: bool) -> tuple[Tensor, ...]:
    scaled = [_rescale_magnitude(c, own, contrast) for c, own in zip(pieces, scales, strict=True)]
    return (torch.stack(scaled, 3).permute(0, 1, 4, 3, 2, 5),)


def _exchange(d: Draw) -> tuple[Any, ...]:
    """An operand, weights and how far partners are apart, around vectors of 16; half of the cases move rows as well."""
    heads, rows = 1 + d.o.seed % 3, 4099 if math.prod(d.o.rows) > 30_000 else math.prod(d.o.rows) % 67
    pair, runs = ((1, 33), (1, 8), (16, 1), (20, 2), (3, 5), (2, 1))[d.o.seed % 6]
    first = min(rows, d.o.seed % 4)
    shape = heads if d.o.seed % 5 else 1, rows - first, 2 * pair * runs
    dtype = torch.float64 if d.o.arithmetic == torch.float64 else torch.float32
    x = d.sample(rows, heads, shape[-1]).transpose(1, 2)
    return x, d.normal(*shape, dtype=dtype), d.normal(*shape, dtype=dtype), pair


def _rotary_magnitude(x: Tensor, stay: Tensor, cross: Tensor, pair: int) -> tuple[Tensor, ...]:
    return (equation("rotary")(x.abs(), stay.abs(), cross.abs(), pair),)


def _rotary_pullback(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    x, *map_ = _exchange(d)
    heads, rows, width = x.shape[1:]
    y = None if len(map_[0][0]) == rows and o.contrast else d.sample(heads, rows, width)
    c = d.coefficient(rows, heads, width).transpose(2, 3)
    return c, x, y, *map_, d.scale().abs(), o.contrast


def _rotary_pullback_magnitude(
    c: Tensor, x: Tensor, y: Tensor | None, stay: Tensor, cross: Tensor, pair: int, target: Tensor, contrast: bool
) -> tuple[Tensor, ...]:
    # scales as they are, and everything that they multiply without cancelling
    first = x.shape[2] - stay.shape[1]
    own, sign = c[:, :, :, first:], x[:, :, first:].sign()
    weights = stay.abs() + sign * stay, cross.abs() + sign * cross
    turned = weights[0] * own + weights[1] * exchanged(own, pair)
    size = weights[0] * own.abs() + weights[1] * exchanged(own.abs(), pair)
    below = mass_equation(x[:, :, first:], turned, contrast)
    above = target if y is None else mass_equation(y[:, :, first:], own, contrast)
    kept = torch.zeros_like(above) if y is None else mass_equation(y[:, :, :first], c[:, :, :, :first], contrast)
    scale = torch.ones_like(target) if y is None else divide(target, kept + above)
    # A mass of N is a sum of differences: how far they cancel makes its scale as much less exact.
    lost = 1 + divide(_mass_of(x[:, :, first:], size, contrast), below)
    if y is not None:
        lost = lost + divide(_mass_of(y, c.abs(), contrast), kept + above)
        lost = lost + divide(_mass_of(y[:, :, first:], own.abs(), contrast), above)
    if contrast:  # P has a part in D by both scales
        lost = torch.maximum(*lost.chunk(2)).repeat(2, 1)
    moved = _rescale_magnitude(c[:, :, :, :first].abs(), scale * lost, contrast)
    mapped = _rescale_magnitude(size, divide(scale * above, below) * lost, contrast)
    return torch.cat([moved, mapped], 3), target * lost


def _mass_of(x: Tensor, c: Tensor, contrast: bool) -> Tensor:
    """Magnitude of the masses of coefficients of magnitude ``c``."""
    mass = (x.abs() * c).flatten(2).sum(-1)
    half = len(c) // 2
    return torch.cat([mass[:half], mass[:half] + mass[half:]]) if contrast else mass


def _depthwise(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    # channels around a vector and four of them; windows of 3 x 5 and of 2 x 2, a stride that leaves lines over
    channels = 1 + math.prod(o.inner) % 77
    kernel, stride, padding, dilation = (((3, 5), [2, 1], [1, 2], [1, 1]), ((2, 2), [1, 3], [0, 1], [2, 1]))[o.seed % 2]
    large, transposed = (95, 64) if math.prod(o.inner) > 30_000 else (10, 8), bool(o.seed // 2 % 2)
    small = [
        (n + 2 * p - e * (k - 1) - 1) // s + 1
        for n, p, e, k, s in zip(large, padding, dilation, kernel, stride, strict=True)
    ]
    source, size = (small, [*large]) if transposed else (large, small)
    dtype = torch.float64 if o.x_dtype == torch.float64 else torch.float32
    c = d.coefficient(*source, channels)
    x = d.sample(*size, channels) if o.contrast else None
    by_source = not o.contrast and o.seed % 5 < 2
    weight = d.normal(2 if o.contrast or by_source else 1, *kernel, channels, dtype=dtype)
    bias = None if o.contrast else d.normal(channels, dtype=dtype)
    narrow = torch.bfloat16 if o.c_dtype == torch.float32 and o.seed % 2 == 0 else None
    return c, weight, bias, x, stride, padding, dilation, size, transposed, o.seed % 3 == 1, narrow


def _depthwise_magnitude(
    c: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor | None, *where: Any
) -> tuple[Tensor, ...]:
    both = equation("depthwise")(
        c.abs(), weight.abs().sum(0, keepdim=True), None if bias is None else bias.abs(), None, *where[:-1], None
    )
    return (both,)


def _max_pool(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    # windows of 2 x 3 that leave a line and two columns over; sizes around a block of channels
    channels = max(1, min(math.prod(o.inner), 600))
    x = (4 * d.sample(5, 8, channels)).round() / 4  # ties are common
    return d.coefficient(2, 2, channels), x, 2, 3, o.contrast


def _max_pool_magnitude(c: Tensor, x: Tensor, height: int, width: int, divided: bool) -> tuple[Tensor, ...]:
    return (c.abs().amax() * (1 if divided else x.abs().amax()) if c.numel() else torch.zeros(()),)


def _mask_steps(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    count = math.prod(o.inner)
    scores = d.sample(count)
    if o.seed % 3 == 0:
        scores = (2 * scores).round() / 2  # ties everywhere, zeros of both signs
    ks = torch.randint(0, count + 1, ((0, 1, 3, 40)[o.seed % 4],), generator=d.generator)
    return scores, [*sorted(ks.tolist()), count, count] if o.seed % 5 else sorted([0, *ks.tolist()]), o.contrast


def _masked_copies(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    channels, height, width = {0: (1, 1, 1), 1: (1, 1, *o.inner), 2: (*o.inner, 1)}.get(len(o.inner), o.inner)
    images = d.sample(channels, height, width)
    baseline = d.sample(channels, height, width) if o.seed % 2 else d.normal(1, *images.shape[1:], dtype=o.x_dtype)
    first, count = o.seed % 3, o.seed % 5
    shape = (o.batch, 1 if o.seed % 4 > 1 else channels, height, width)
    steps = torch.randint(0, first + count + 2, shape, generator=d.generator, dtype=torch.int32)
    if o.seed % 7 > 3:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, steps, baseline, first, first + count, o.contrast


def _exact(*args: Any) -> tuple[Tensor, ...]:
    """Nothing is computed with, and nothing rounded."""
    return (torch.zeros(()),)


def _softmax(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    scores = (8 * d.sample(*o.rows)).clamp(-30, 30)
    if o.zeros and scores.numel():
        scores[torch.rand(scores.shape, generator=d.generator) < 0.3] = -torch.inf
        scores[..., 0, :] = -torch.inf  # a whole row (or, of one row, all of it)
    return scores, d.coefficient(*o.rows)


def _softmax_magnitude(scores: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    masked = scores == -torch.inf
    both = scores.softmax(-1) + scores.abs().masked_fill(masked, -torch.inf).softmax(-1)
    return (both.masked_fill(masked, 0) * c.abs(),)


def _attention(o: Options) -> tuple[Any, ...]:
    d = Draw(o)
    heads, queries, keys, width = LARGE_ATTENTION if math.prod(o.rows) > 30_000 else ATTENTION[o.seed % len(ATTENTION)]
    # multiples of 1/8 make the scores exact in float32: the sign of one that is almost 0 is not decided by rounding
    q = (d.sample(heads, queries, width) * 8).round() / 8
    k = (d.sample(heads, keys, width) * 8).round() / 8
    v, out = d.sample(heads, keys, width), d.sample(heads, queries, width)
    c = d.coefficient(queries, heads, width).transpose(2, 3)
    bias, junction = None, False
    if (o.seed + o.contrast) % 2 == 0:  # of every shape once
        junction = o.seed // 2 % 3 != 1
        bias = attention_bias(d, 1 if o.seed // 2 % 3 == 2 else heads, queries, keys, junction, o.seed // 2 % 3 > 0)
        bias = bias.to(o.x_dtype).expand(1, heads, queries, keys)
    return q, k, v, out, c, 0.25, bool(o.seed % 3), o.contrast, bias, junction


def attention_bias(d: Draw, heads: int, queries: int, keys: int, adds: bool, masks: bool, groups: int = 1) -> Tensor:
    """Numbers whose sums with scores are exact, or zeros; some masked, and the last row as a whole."""
    bias = (d.normal(groups, heads, queries, keys) * 8).round() / 8
    if not adds:
        bias.zero_()
    if masks:
        bias[torch.rand(bias.shape, generator=d.generator) < 0.3] = -torch.inf
        bias[..., -1:, :] = -torch.inf
    return bias


def _attention_weights(product: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(S) and softmax(|S|), S a product and a bias; 0 where masked."""
    scores = product if bias is None else product + bias.repeat(len(product) // len(bias), 1, 1, 1)
    masked = scores == -torch.inf
    either = scores, scores.abs().masked_fill(masked, -torch.inf)
    weights, absolute = (s.softmax(-1).masked_fill(masked, 0) for s in either)
    return weights, absolute


def _attention_magnitude(
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
) -> tuple[Tensor, ...]:
    def pull(terms: Tensor, other: Tensor, x: Tensor) -> Tensor:
        positive, negative = (2 * (terms @ (sign * other).clamp_min(0)) for sign in (1, -1))
        return (x > 0) * positive + (0 if gated else (x < 0) * negative)

    g = c.abs() * (o > 0) if gated else c.abs()
    query = scale * q
    product = query @ k.mT
    weights, absolute = _attention_weights(product, bias)
    c_a = 2 * (g @ v.clamp_min(0).mT)
    c_v = 2 * (v > 0) * (weights.mT @ g)
    c_s = (weights + absolute) * c_a
    terms = []
    if junction and bias is not None:
        added = bias.clamp_min(0).repeat(len(q) // len(bias), 1, 1, 1)
        terms = [(product, 2 * (product > 0) * c_s), (added, 2 * c_s)]
        c_s = terms[0][1]
    c_q, c_k = scale * pull(c_s, k, query), pull(c_s.mT, query, k)
    pairs = ((weights, c_a), (v, c_v), (q, c_q), (k, c_k), *terms)
    return c_q, c_k, c_v, torch.stack([_uncancelled_mass(x, own, contrast) for x, own in pairs])


def _attention_gradient(o: Options) -> tuple[Any, ...]:
    q, k, v, _, c, scale, _, _, bias, _ = _attention(o)
    return q, k, v, c, scale, 0.5, 0.0 if o.seed % 5 == 4 else 0.75, bias


def _attention_gradient_magnitude(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    scale: float,
    value_share: float,
    score_share: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    weights, _ = _attention_weights(scale * q @ k.mT, bias)
    c_a = c.abs() @ v.abs().mT
    c_s = score_share * scale * (weights * (c_a + (weights * c_a).sum(-1, keepdim=True)))
    return c_s @ k.abs(), c_s.mT @ q.abs(), value_share * (weights.mT @ c.abs())


CASES = {
    case.name: case
    for case in [
        Case("mass", _mass, lambda x, c, contrast: (_uncancelled_mass(x, c, contrast),)),
        Case("rescale", _rescale, lambda *a: (_rescale_magnitude(*a),)),
        Case("rescale_parts", _rescale_parts, _parts_magnitude),
        Case("merge", _merge, lambda *a: (_merge_magnitude(*a),)),
        Case(
            "junction",
            _junction,
            lambda c, a, b, contrast, _, relu: _split_magnitude(c.abs() * (1 + relu), a, b, contrast),
        ),
        Case(
            "merge_junction",
            _merge_junction,
            lambda f, s, g, t, a, b, contrast, _, relu: _split_magnitude(
                _merge_magnitude(f, s, g, t, contrast) * (1 + relu), a, b, contrast
            ),
        ),
        Case("norm_pullback", _norm, lambda c, x, w, eps: (_norm_factor_magnitude(x, w) * c.abs(),)),
        Case("norm_gradient", _norm, _norm_gradient_magnitude),
        Case("linear_pullback", _linear, lambda c, panels, x, _: (_linear_magnitude(c, panels, x),)),
        Case("product", _product, _product_magnitude),
        Case("linear_norm_pullback", _linear_norm, _linear_norm_magnitude),
        Case("scale_by", _scale_by, lambda c, f, n: (_n_scaled_magnitude(c, n) * f.abs(),)),
        Case("ratio", _ratio, lambda *a: (equation("ratio")(*a).abs(),)),
        Case("gate", _scale_by, lambda c, x, n: (2 * _n_scaled_magnitude(c, n),)),
        Case("affine_pullback", _affine_pullback, _affine_pullback_magnitude),
        Case("centring", _centring, lambda *a: (equation("centring")(*a),)),
        Case("share", _share, lambda *a: (equation("share")(*a),)),
        Case("scale_to", _scale_to, equation("scale_to")),
        Case("residual_pullback", _residual, _residual_magnitude),
        Case("unpool", _unpool, _unpool_magnitude),
        Case("select_phases", _select_phases, _exact),
        Case("mul_pullback", _mul, _mul_magnitude),
        Case("mul_gradient", _mul_gradient, _mul_gradient_magnitude),
        Case("sides", _sides, _sides_magnitude),
        Case("spread", _spread, _spread_magnitude),
        Case("piece_masses", _piece_masses, _piece_masses_magnitude),
        Case("merge_pieces", _merge_pieces, _merge_pieces_magnitude),
        Case("gating_pullback", _gating, _gating_magnitude),
        Case("rescale_pieces", _rescale_pieces, _pieces_magnitude),
        Case("rotary", lambda o: _exchange(Draw(o)), _rotary_magnitude),
        Case("rotary_pullback", _rotary_pullback, _rotary_pullback_magnitude),
        Case("depthwise", _depthwise, _depthwise_magnitude),
        Case("activation_factor", _activation_factor, _activation_magnitude),
        Case("activation_share", _activation_share, lambda x, *_: (x.abs(), torch.ones_like(x))),
        Case("affine_factor", _affine, _affine_magnitude),
        Case("max_pool_pullback", _max_pool, _max_pool_magnitude),
        Case("mask_steps", _mask_steps, _exact),
        Case("masked_copies", _masked_copies, _exact),
        Case("softmax_pullback", _softmax, _softmax_magnitude),
        Case("attention_pullback", _attention, _attention_magnitude),
        Case("attention_gradient", _attention_gradient, _attention_gradient_magnitude),
    ]
}


def check_case(name: str, o: Options, multiplies_bfloat16: bool) -> tuple[Tensor, ...]:
    """Compare an operator with the float64 reference, also what it does to its arguments; returns its outputs."""
    case = CASES[name]
    args = case.arguments(o)
    before = [a.clone() for a in args if isinstance(a, Tensor)]
    actual = as_tuple(getattr(ops, name)(*args))
    for kept, a in zip(before, (a for a in args if isinstance(a, Tensor)), strict=True):
        assert torch.equal(kept, a), "an argument was written to"
    magnitudes = as_tuple(case.magnitude(*in_float64(args)))
    arithmetic = o.arithmetic
    if name in FACTORS:
        arithmetic = torch.float64 if o.x_dtype == torch.float64 else torch.float32
    if name in OF_ATTENTION and o.c_dtype == torch.bfloat16 and arithmetic != torch.float64 and multiplies_bfloat16:
        arithmetic = torch.bfloat16
    for index, outputs in enumerate(zip(actual, case.expected(args), magnitudes, strict=True)):
        assert_close(name, index, *outputs, arithmetic)
    return actual
