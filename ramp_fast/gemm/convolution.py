"""Convolutions, their transposes, and the library routines that run them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ramp_fast import ops
from ramp_fast.gemm import private_operators
from ramp_fast.gemm.matrix import FEW_ROWS, Matrix, Selection, negative_part, positive_part
from ramp_fast.gemm.precision import Precision
from ramp_fast.ops.depthwise import MOST_TAPS
from ramp_fast.params import Conv


@dataclass(frozen=True)
class Geometry:
    """Of a convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @classmethod
    def of(cls, params: Conv) -> Geometry:
        """That of a node."""
        return cls(params.stride, params.padding, params.dilation, params.groups)

    def depthwise(self, weight: Tensor) -> bool:
        """Whether every channel of images is convolved by itself, by the kernel that does that on CPUs."""
        return (
            weight.dim() == 4
            and weight.shape[:2] == (self.groups, 1)
            and self.groups > 1
            and max(weight.shape[2:]) <= MOST_TAPS
            and weight.dtype != torch.float64
            and ops.cpu_kernels(weight.device)
        )

    def outputs(self, kernel: Sequence[int], size: Sequence[int]) -> list[int]:
        """Height and width of what a convolution of images of ``size`` gives."""
        axes = zip(size, self.padding, self.dilation, kernel, self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes]

    def pixels(self, weight: Tensor) -> bool:
        """Whether the windows are single pixels."""
        return weight.dim() == 4 and weight.shape[2:] == (1, 1) and self.groups == 1 and not any(self.padding)

    def rows(self, weight: Tensor) -> bool:
        """Whether pixels are rows of a matrix product, channels last, and the kernel for those runs on CPUs."""
        return self.pixels(weight) and self.stride == [1, 1] and ops.cpu_kernels(weight.device)

    def tiles(self, weight: Tensor, height: int, width: int) -> bool:
        """Whether the windows tile the image exactly."""
        kh, kw = weight.shape[-2:]
        return (
            weight.dim() == 4
            and kh * kw > 1
            and self.groups == 1
            and self.stride == [kh, kw]
            and not any(self.padding)
            and self.dilation == [1, 1]
            and height % kh == 0
            and width % kw == 0
        )


def _patches(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """``[B, C, h*kh, w*kw]`` as rows ``[B, h, w, C*kh*kw]``."""
    b, c, height, width = x.shape
    kh, kw = kernel
    grid = x.reshape(b, c, height // kh, kh, width // kw, kw)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, height // kh, width // kw, c * kh * kw)


def _unpatch(rows: Tensor, kernel: tuple[int, int], channels: int) -> Tensor:
    b, h, w, _ = rows.shape
    kh, kw = kernel
    grid = rows.reshape(b, h, w, channels, kh, kw).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(b, channels, h * kh, w * kw)


class PatchForward:
    """A convolution whose windows tile the image: one matrix product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.size = (weight.shape[2], weight.shape[3])
        self.matrix = Matrix(weight.flatten(1), bias)
        self.kernel, self.nbytes = self.matrix.kernel, self.matrix.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix(_patches(x, self.size)).permute(0, 3, 1, 2)


class PatchPullback:
    """Its transpose, from ``[B, out, h, w]`` to ``[B, in, h*kh, w*kw]``."""

    def __init__(self, weight: Tensor) -> None:
        self.size = (weight.shape[2], weight.shape[3])
        self.channels = weight.shape[1]
        self.matrix = Matrix(weight.flatten(1).t())
        self.kernel, self.nbytes = self.matrix.kernel, self.matrix.nbytes

    def __call__(self, c: Tensor) -> Tensor:
        rows = self.matrix(c.permute(0, 2, 3, 1).contiguous())
        return _unpatch(rows, self.size, self.channels)


class PatchSelection:
    """:class:`Selection` for a convolution whose windows tile the image, or are its pixels."""

    def __init__(self, weight: Tensor) -> None:
        self.size = (weight.shape[2], weight.shape[3])
        self.matrix = Selection(weight.flatten(1))
        self.kernel, self.nbytes = self.matrix.kernel, self.matrix.nbytes

    def __call__(self, c: Tensor, x: Tensor) -> Tensor:
        """``c`` ``[T, B, out, h, w]`` at ``x`` ``[B, in, h*kh, w*kw]``."""
        rows = self.matrix(c.permute(0, 1, 3, 4, 2).contiguous(), _patches(x, self.size), c.dtype)
        pulled = _unpatch(rows.flatten(0, 1), self.size, x.shape[1])
        return pulled.view(*c.shape[:2], *pulled.shape[1:])


class PixelForward:
    """A convolution of single pixels: one matrix product over their channels, channels last.

    Options and arguments as for :class:`ConvForward`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: list[int], relu: bool = False) -> None:
        self.stride, self.relu = stride, relu
        self._largest = _largest(weight, bias)
        self.matrix = Matrix(weight.flatten(1), bias)
        self.kernel, self.nbytes, self.independent = self.matrix.kernel, self.matrix.nbytes, self.matrix.independent

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        """As :attr:`ConvForward.reach`."""
        growth, offset = (float(t) for t in self._largest)
        return growth, offset

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        down, right = self.stride
        rows = x[:, :, ::down, ::right].permute(0, 2, 3, 1).contiguous()
        y = self.matrix(rows).permute(0, 3, 1, 2)
        if addend is not None:
            y += addend
        return y.relu_() if self.relu else y


def _largest(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The most that ``|x|`` can grow, and the most that the bias adds, on the device; NaN where a weight is."""
    growth = weight.abs().flatten(1).sum(1, dtype=torch.promote_types(weight.dtype, torch.float32)).amax()
    return growth, growth.new_zeros(()) if bias is None else bias.abs().amax()


class DepthwiseForward:
    """A convolution of every channel by itself. Options and arguments as for :class:`ConvForward`.

    Parameters
    ----------
    negative : Tensor, optional
        The weight of inputs below zero, where ``weight`` is for those above.
    dtype : torch.dtype, optional
        Of the output; by default that of the input.
    """

    kernel = "depthwise"
    independent = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        relu: bool = False,
        *,
        negative: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.bias, self.geometry, self.relu, self.dtype = None if bias is None else bias.float(), geometry, relu, dtype
        self._largest = _largest(weight, bias)
        halves = weight if negative is None else torch.cat([weight, negative], 1)
        self.weight = halves.permute(1, 2, 3, 0).float().contiguous()
        self.nbytes = self.weight.numel() * self.weight.element_size()

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        """As :attr:`ConvForward.reach`."""
        growth, offset = (float(t) for t in self._largest)
        return growth, offset

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        g = self.geometry
        size = g.outputs(self.weight.shape[1:3], x.shape[2:])
        rows = x.permute(0, 2, 3, 1).unsqueeze(0)
        own = self.relu and addend is None
        where = g.stride, g.padding, g.dilation, size
        y = ops.depthwise(rows, self.weight, self.bias, None, *where, False, own, self.dtype)[0].permute(0, 3, 1, 2)
        if addend is not None:
            y += addend
        return y.relu_() if self.relu and not own else y


class DepthwisePullback:
    """Its transpose, of W+ where the input is positive and of W- where it is negative.

    Parameters
    ----------
    weight : Tensor [C, 1, kh, kw]
    geometry : Geometry
    size : tuple of int
        Of the convolution's input.
    positive_input : bool
        Whether there is nothing but W+.
    """

    kernel = "depthwise"

    def __init__(self, weight: Tensor, geometry: Geometry, size: tuple[int, ...], positive_input: bool) -> None:
        halves = [positive_part(weight)] if positive_input else [positive_part(weight), negative_part(weight)]
        self._pack(halves, geometry, size)

    @classmethod
    def of(cls, halves: Sequence[Tensor], geometry: Geometry, size: tuple[int, ...]) -> DepthwisePullback:
        """With other weights for positive and for negative inputs, or one for all."""
        made = cls.__new__(cls)
        made._pack(halves, geometry, size)
        return made

    def _pack(self, halves: Sequence[Tensor], geometry: Geometry, size: tuple[int, ...]) -> None:
        self.geometry, self.size, self.positive_input = geometry, list(size), len(halves) == 1
        # Sums are in float32; weights of bfloat16 are numbers of it.
        self.weight = torch.cat(list(halves), 1).permute(1, 2, 3, 0).to(torch.float32).contiguous()
        self.nbytes = self.weight.numel() * self.weight.element_size()

    def __call__(self, c: Tensor, x: Tensor | None) -> Tensor:
        """``c`` ``[T, B, C, h, w]`` at ``x`` ``[B, C, H, W]``, which is read only where it has both signs."""
        g = self.geometry
        rows = None if x is None or self.positive_input else x.permute(0, 2, 3, 1)
        where = g.stride, g.padding, g.dilation, self.size
        out = ops.depthwise(c.permute(0, 1, 3, 4, 2), self.weight, None, rows, *where, True, False)
        return out.permute(0, 1, 4, 2, 3)


# Of float32 and single pixels on CPUs: from here on a product on tiles takes two thirds of the time of oneDNN's
# convolution, and below, or of bfloat16, not less (bench/LOG.md, "pointwise convolutions").
_PIXEL_CHANNELS = 128


def convolution(
    weight: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool = False, size: Sequence[int] = ()
) -> PixelForward | ConvForward | DepthwiseForward:
    """:class:`ConvForward`, or what is faster for images that it makes ``size`` large."""
    if geometry.depthwise(weight) and weight.dtype == torch.float32:
        return DepthwiseForward(weight, bias, geometry, relu)
    pixels = geometry.pixels(weight)
    few = pixels and weight.device.type == "cpu" and 0 < math.prod(size) < FEW_ROWS and len(size) == 2
    pixels = pixels and weight.dtype == torch.float32
    enough = weight.shape[1] >= _PIXEL_CHANNELS or weight.device.type != "cpu"
    if few or (pixels and enough and ops.multiplies(weight.flatten(1))):
        return PixelForward(weight, bias, geometry.stride, relu)
    return ConvForward(weight, bias, geometry, relu)


def fuses_convolutions(precision: Precision, device: torch.device) -> bool:
    """Whether what follows a convolution of images is computed in its own pass: by oneDNN on CPUs.

    With coefficients in bfloat16: the sign of a BatchNorm's input is told from its output then, wrongly where it hangs
    on rounding, which shows beside float32 coefficients and does not beside these (bench/LOG.md, "fused convolutions").
    """
    mixed = precision.forward == torch.float32 and precision.pullback == torch.bfloat16
    return ops.cpu_kernels(device) and mixed and private_operators.convolves()


class ConvForward:
    """``conv(x, weight) + bias + addend``, with ``relu`` no less than zero; channels last on CPUs.

    oneDNN's ReLU makes zeros of NaN. Where NaN can be, ``apart`` says to compute the ReLU by itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool = False) -> None:
        self.bias, self.geometry, self.relu = bias, geometry, relu
        dtype = str(weight.dtype).removeprefix("torch.")
        self.packed = private_operators.packs_convolution(weight)
        self.kernel = f"{'onednn' if self.packed else 'aten'}-{dtype}"
        self.nbytes = weight.numel() * weight.element_size()
        self.weight = weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
        self.reordered: tuple[tuple[int, ...], Tensor] | None = None

    def _weight_for(self, x: Tensor) -> Tensor:
        # The packed layout depends on the image size. Other threads may be here with images of another one.
        key = tuple(x.shape)
        cached = self.reordered
        if cached is None or cached[0] != key:
            g = self.geometry
            weight = private_operators.pack_convolution(self.weight, g.padding, g.stride, g.dilation, g.groups, key)
            cached = self.reordered = (key, weight)
        return cached[1]

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        growth, offset = (float(t) for t in _largest(self.weight, self.bias))
        return growth, offset

    def __call__(self, x: Tensor, addend: Tensor | None = None, *, apart: bool = False) -> Tensor:
        if apart and self.relu:
            return self._linear(x, addend, False).relu_()
        return self._linear(x, addend, self.relu)

    def _linear(self, x: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
        g = self.geometry
        # PyTorch 2.11 cannot add to single pixels.
        fuses = addend is None or addend.shape[2:].numel() > 1
        if not (self.packed and x.numel() and fuses):
            y = torch.convolution(x, self.weight, self.bias, g.stride, g.padding, g.dilation, False, [0], g.groups)
            y = y if addend is None else y + addend
            return y.relu() if relu else y
        x = x.contiguous(memory_format=torch.channels_last)
        if addend is not None:
            addend = addend.contiguous(memory_format=torch.channels_last)
        where = g.padding, g.stride, g.dilation, g.groups
        return private_operators.convolution(x, self._weight_for(x), self.bias, *where, relu, addend)


class ConvPullback:
    """The transpose of a convolution: ``[N, out, h, w]`` to ``[N, in, H, W]``."""

    def __init__(self, weight: Tensor, geometry: Geometry, size: tuple[int, ...]) -> None:
        self.geometry, self.size = geometry, size
        dtype = str(weight.dtype).removeprefix("torch.")
        self.nbytes = weight.numel() * weight.element_size()
        spatial = weight.shape[2:]
        plain = all(s == 1 for s in geometry.stride) and weight.dim() == 4
        inner = [d * (k - 1) - p for d, k, p in zip(geometry.dilation, spatial, geometry.padding, strict=True)]
        self.independent = False
        self.direct: PixelForward | ConvForward | DepthwiseForward | None = None
        self.apart = geometry.pixels(weight) and not plain
        if self.apart or (plain and all(p >= 0 for p in inner)):
            # With stride one the transpose is a convolution with the flipped, transposed weight; of single pixels with
            # any stride, which then lie apart.
            turned = weight.unflatten(0, (geometry.groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
            plain_geometry = Geometry([1, 1], inner, geometry.dilation, geometry.groups)
            self.direct = convolution(turned, None, plain_geometry, size=() if self.apart else size)
            self.independent = getattr(self.direct, "independent", False)
            self.kernel = self.direct.kernel
        else:
            self.weight = weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
            self.packed = private_operators.packs_transposed(weight) and geometry.groups == 1
            self.reordered: tuple[tuple[int, ...], Tensor] | None = None
            self.kernel = f"{'onednn' if self.packed else 'aten'}-transposed-{dtype}"
            reach = [
                (o - 1) * s - 2 * p + d * (k - 1) + 1
                for o, s, p, d, k in zip(
                    geometry.outputs(spatial, size),
                    geometry.stride,
                    geometry.padding,
                    geometry.dilation,
                    spatial,
                    strict=True,
                )
            ]
            self.output_padding = [have - r for have, r in zip(size, reach, strict=True)]

    def __call__(self, c: Tensor) -> Tensor:
        if self.direct is not None:
            return self._apart(self.direct(c)) if self.apart else self.direct(c)
        g = self.geometry
        if self.packed and c.numel():
            c = c.contiguous(memory_format=torch.channels_last)
            key = tuple(c.shape)
            cached = self.reordered
            if cached is None or cached[0] != key:
                weight = private_operators.pack_transposed(
                    self.weight, g.padding, self.output_padding, g.stride, g.dilation, g.groups, key
                )
                cached = self.reordered = (key, weight)
            return private_operators.transposed(
                c, cached[1], g.padding, self.output_padding, g.stride, g.dilation, g.groups
            )
        return torch.convolution(
            c, self.weight, None, g.stride, g.padding, g.dilation, True, self.output_padding, g.groups
        )

    def _apart(self, pixels: Tensor) -> Tensor:
        shape = (*pixels.shape[:2], *self.size)
        out = torch.empty(shape, dtype=pixels.dtype, device=pixels.device, memory_format=torch.channels_last)
        down, right = self.geometry.stride
        out.zero_()[:, :, ::down, ::right] = pixels
        return out


class SidedForward:
    """``P x+ + N x- + b``: a layer with one weight for positive and one for negative inputs, as one product.

    Parameters
    ----------
    positive, negative : Tensor [out, in] or [out, in / groups, kh, kw]
    bias : Tensor [out] or None
    geometry : Geometry or None
        Of a convolution.
    size : sequence of int
        Of the images that a convolution makes.
    dtype : torch.dtype
        Of the product; inputs may be wider.
    """

    def __init__(
        self,
        positive: Tensor,
        negative: Tensor,
        bias: Tensor | None,
        geometry: Geometry | None,
        size: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self.groups = dtype, 0 if geometry is None else geometry.groups
        # In every group of input channels the positive parts, then the negative ones.
        both, offset = torch.cat([positive, negative], 1).to(dtype), None if bias is None else bias.to(dtype)
        self.function: Matrix | PixelForward | ConvForward | DepthwiseForward
        self.function = Matrix(both, offset) if geometry is None else convolution(both, offset, geometry, size=size)
        self.independent = getattr(self.function, "independent", False)
        self.kernel, self.nbytes = self.function.kernel, self.function.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if not self.groups:
            return self.function(ops.sides(x, 1, self.dtype).flatten(-3))
        return self.function(ops.sides(x.permute(0, 2, 3, 1), self.groups, self.dtype).flatten(-3).permute(0, 3, 1, 2))


class SidedPullback:
    """Its transpose: ``P^T c`` where the input is positive, ``N^T c`` where it is negative, 0 where it is 0.

    Parameters as for :class:`SidedForward`; ``size`` is that of a convolution's input.
    """

    def __init__(
        self, positive: Tensor, negative: Tensor, geometry: Geometry | None, size: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        both = torch.cat([positive, negative], 1).to(dtype)
        self.groups = 0 if geometry is None else geometry.groups
        self.function: Matrix | ConvPullback
        self.function = Matrix(both.t()) if geometry is None else ConvPullback(both, geometry, size)
        self.kernel, self.nbytes = f"{self.function.kernel} by sign", self.function.nbytes

    def select(self, acc: Tensor, x: Tensor) -> Tensor:
        """From both ``[T, ..., 2 in]``, of images ``[T, B, 2 in, H, W]``, what the sign of ``x`` asks for."""
        if not self.groups:
            width = x.shape[-1]
            cells = acc.reshape(acc.shape[0], 1, -1, 1, 1, 1, 2, width)
            return ops.select_phases(cells, x.reshape(1, -1, 1, width), 0, 0).view(acc.shape[0], *x.shape)
        # Groups of channels as if they were pixels: of each there are two halves.
        pixels = x.permute(0, 2, 3, 1)
        cells = acc.permute(0, 1, 3, 4, 2).unflatten(-1, (self.groups, 1, 1, 2, -1)).flatten(3, 4)
        chosen = ops.select_phases(cells, pixels.unflatten(-1, (self.groups, -1)).flatten(2, 3), 0, 0)
        return chosen.view(acc.shape[0], *pixels.shape).permute(0, 1, 4, 2, 3)


class SubpixelSelection:
    """:class:`Selection` for a convolution of images: of stride one, to all inputs of a cell of ``stride`` at once.

    Input ``s m + r`` gets tap ``s j + r + padding`` of output ``m - j``: for every phase r the same few j. A transposed
    convolution would have as few outputs as an image has channels, twice, which its routine is slow for.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, size: tuple[int, ...]) -> None:
        self.stride = geometry.stride
        axes = zip(weight.shape[2:], self.stride, geometry.padding, size, strict=True)
        taps, padding, self.first, phases = [], [], [], []
        for kernel, s, pad, n in axes:
            reach = [(-((r + pad) // s), (kernel - 1 - r - pad) // s) for r in range(s)]
            low, high = min(a for a, _ in reach), max(b for _, b in reach)
            outputs, cells = (n + 2 * pad - kernel) // s + 1, -(-n // s)
            around = max(high, cells - outputs - low, 0)
            taps.append(high - low + 1)
            padding.append(around)
            self.first.append(around - high)
            phases.append([[s * (high - t) + r + pad for t in range(high - low + 1)] for r in range(s)])
        halves = torch.stack([positive_part(weight), negative_part(weight)])  # [2, out, in, kh, kw]
        down, right = self.stride
        spread = halves.new_zeros(down, right, 2, weight.shape[1], weight.shape[0], *taps)
        for r, rows in enumerate(phases[0]):
            for q, columns in enumerate(phases[1]):
                for t, row in enumerate(rows):
                    for u, column in enumerate(columns):
                        if 0 <= row < weight.shape[2] and 0 <= column < weight.shape[3]:
                            spread[r, q, :, :, :, t, u] = halves[:, :, :, row, column].transpose(1, 2)
        self.conv = ConvForward(spread.flatten(0, 3), None, Geometry([1, 1], padding, [1, 1], 1))
        self.kernel, self.nbytes = f"{self.conv.kernel} W+|W-", self.conv.nbytes

    @staticmethod
    def pays(weight: Tensor, geometry: Geometry) -> bool:
        """Whether it is faster than the transposed convolution."""
        plain = weight.dim() == 4 and geometry.groups == 1 and geometry.dilation == [1, 1]
        inside = all(p < k for p, k in zip(geometry.padding, weight.shape[2:], strict=True))
        few = 2 * weight.shape[1] * math.prod(geometry.stride) <= _SUBPIXEL_OUTPUTS
        return plain and inside and few and ops.cpu_kernels(weight.device)

    def __call__(self, c: Tensor) -> Tensor:
        """``c`` ``[T, B, out, h, w]`` to ``[T, B, rows, columns, s, s, 2, in]``, of W+ and of W-."""
        acc = self.conv(c.flatten(0, 1)).permute(0, 2, 3, 1)
        return acc.reshape(*c.shape[:2], *acc.shape[1:3], *self.stride, 2, -1)

    def select(self, acc: Tensor, x: Tensor) -> Tensor:
        """What is chosen by ``x`` ``[B, in, H, W]``, ``[T, B, in, H, W]``."""
        return ops.select_phases(acc, x.permute(0, 2, 3, 1), *self.first).permute(0, 1, 4, 2, 3)


# Outputs of a sub-pixel convolution: with more, a transposed convolution is faster (bench/LOG.md, "steps around
# convolutions").
_SUBPIXEL_OUTPUTS = 64
