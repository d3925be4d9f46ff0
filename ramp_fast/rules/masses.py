"""Relevance in flight: coefficients, the mass they stand for, and the scalings that keep the two equal.

Relevance is ``R = |x| * c``. A coefficient tensor has a leading axis of right-hand sides, ``[T, *shape]``:
with contrast the first half are ``P`` (positive), the second half ``D = P - N``, which keeps the difference
of two nearly equal maps from being rounded away (docs/rules.md, "Contrast").
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ramp_fast import ops
from ramp_fast.graph import BatchAxis
from ramp_fast.rules.conservation import Conservation, Contribution, Start

# How far two maps of equal classes were found apart below the last layer, in units of the last place of the largest
# coefficient: up to 20, of a thousand classes in float32. Coefficients in bf16 err twice, in N and in its scale: found
# were up to 0.1 of the square of bf16's unit.
_ROUNDING = 64


@dataclass
class Massed(Contribution):
    """Coefficients up to one positive factor per map and sample, and the mass that they stand for.

    Attributes
    ----------
    c : Tensor
        Coefficients ``[num_maps, *shape]``.
    target : Tensor
        The mass of this relevance, ``[num_maps, B]`` (of P and N with contrast).
    actual : Tensor or None
        The mass of ``c`` as it is, where it is known already.
    centred : bool
        Whether the last step has centred it (:meth:`Masses.centred`).
    """

    target: Tensor
    actual: Tensor | None = None
    centred: bool = False

    def moved(self, c: Tensor, *, copies: bool = False) -> Massed:
        """As :meth:`Contribution.moved`: only sums over copies can change the mass."""
        return Massed(c, self.target, None if copies else self.actual)


class Rows:
    """Tensors as one row per sample: ``[B, M]`` for activations, ``[T, B, M]`` for coefficients.

    Elementwise work needs no order inside a sample, so that memory order is kept: channels-last tensors and
    tensors whose batch axis leads are not copied.
    """

    def __init__(self, c: Tensor, axis: BatchAxis, batch: int) -> None:
        self.axis, self.batch = axis, batch
        # Also of some of the channels, which have to be copied: in the order in which they lie. Of fewer axes the third
        # last is that of the samples.
        self.channels_last = axis.leading and c.dim() >= 5 and not c.is_contiguous() and c.stride(-3) == 1

    def of(self, t: Tensor, lead: int) -> Tensor:
        """``t`` with ``lead`` axes before those of the operation's output."""
        if self.channels_last:
            t = t.movedim(-3, -1)
        if not self.axis.leading:
            at = lead + self.axis.axis
            t = t.unflatten(at, (self.axis.outer, self.batch, self.axis.inner)).movedim(at + 1, lead)
        return t.reshape(*t.shape[:lead], self.batch, -1)

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """``rows`` in the shape of the coefficients ``like``."""
        if self.axis.leading:
            if self.channels_last:
                return rows.view(like.movedim(-3, -1).shape).movedim(-1, -3)
            return rows.view(like.shape)
        at = 1 + self.axis.axis
        split = (*like.shape[:at], self.axis.outer, self.axis.inner, *like.shape[at + 1 :])
        inner = rows.view(rows.shape[0], self.batch, *split[1:])
        return inner.movedim(1, at + 1).reshape(like.shape)


@dataclass(frozen=True)
class Masses(Conservation):
    """The mass ``sum |R|`` of every sample is kept: what absLRP conserves.

    With contrast the first half of the maps are P, of the target, and the second half D = P - N, where N is the map of
    the other classes. Masses of the second half are those of N.
    """

    @classmethod
    def start(cls, coefficients: Start, positive: Tensor, negative: Tensor | None, logits: Tensor) -> Tensor:
        """As :meth:`ramp_fast.rules.Conservation.start`: (P, D) with contrast."""
        p = coefficients(positive, logits)
        return p if negative is None else torch.cat([p, p - coefficients(negative, logits)])

    @classmethod
    def maps_of(cls, relevance: Tensor, targets: int) -> Tensor:
        """As :meth:`ramp_fast.rules.Conservation.maps_of`: D where there is one."""
        return relevance[-targets:]

    @classmethod
    def scaled_to_seed(cls, maps: Tensor, seed: Tensor) -> Tensor:
        """As :meth:`ramp_fast.rules.Conservation.scaled_to_seed`: maps have mass 1, and get that of the seed."""
        mass = seed.abs().sum(-1, dtype=torch.float64).to(maps.dtype)
        return maps * mass.view(1, -1, *[1] * (maps.dim() - 2))

    def begin(self, c: Tensor) -> Massed:
        """As :meth:`ramp_fast.rules.Conservation.begin`: mass 1."""
        return Massed(c, c.new_ones(c.shape[:2]))

    def piece(self, whole: Massed, x: Tensor, c: Tensor, axis: BatchAxis) -> Massed:
        """As :meth:`ramp_fast.rules.Conservation.piece`: it keeps the mass that it carries."""
        mass = self.mass(x, c, axis)
        return Massed(c, mass, mass)

    def cut(
        self,
        x: Tensor,
        part: Massed,
        axis: BatchAxis,
        dim: int,
        lengths: Sequence[int] | None,
        axes: Sequence[BatchAxis],
    ) -> list[Massed]:
        """As :meth:`ramp_fast.rules.Conservation.cut`: operands keep the mass that they carry."""
        both = [_pixels(x, 0), _pixels(part.c, 1)]
        dense = [t for t in both if t is not None and t.is_contiguous()]
        if lengths is None or dim != 1 or len(dense) < 2 or not axis.plain or not ops.cpu_kernels(x.device):
            return super().cut(x, part, axis, dim, lengths, axes)
        images, rows = dense
        # Nothing is scaled or copied: who reads the pieces knows what they have and what they stand for.
        masses = ops.piece_masses(rows, images, list(lengths), self.contrast)
        scale, _ = ops.scale_to(part.target, masses.sum(0))
        pieces = zip(part.c.split(list(lengths), 2), masses * scale, masses, strict=True)
        return [Massed(c, target, actual) for c, target, actual in pieces]

    def together(self, c: Tensor, parts: Iterable[Massed]) -> Massed:
        """As :meth:`ramp_fast.rules.Conservation.together`: masses add."""
        target = total(
            part.target
            if part.actual is None or part.actual is part.target
            else ops.scale_to(part.target, part.actual)[1]  # none where all of it is zero
            for part in parts
        )
        return Massed(c, target, target)

    def measured(self, x: Tensor, part: Massed, axis: BatchAxis) -> Massed:
        """As :meth:`ramp_fast.rules.Conservation.measured`: with the mass of its coefficients."""
        actual = part.actual if part.actual is not None else self.mass(x, part.c, axis)
        return Massed(part.c, part.target, actual)

    def settled(self, part: Massed, axis: BatchAxis) -> Massed:
        """As :meth:`ramp_fast.rules.Conservation.settled`."""
        return self.exact(part.c, part, axis)  # its mass is known

    def settled_together(self, parts: Sequence[Massed], c: Sequence[Tensor]) -> Tensor | None:
        """As :meth:`ramp_fast.rules.Conservation.settled_together`: parts are scaled while they are copied."""
        if all(part.actual is part.target for part in parts) or not ops.cpu_kernels(c[0].device):
            return None
        masses = [[part.target, part.target if part.actual is None else part.actual] for part in parts]
        scale, _ = ops.scale_to(*(torch.stack(some) for some in zip(*masses, strict=True)))
        windows = c[0].shape[1] // self.batch  # side by side with their sample
        return ops.rescale_pieces(c, scale if windows == 1 else scale.repeat_interleave(windows, -1), self.contrast)

    def within(
        self, x: Tensor, part: Massed, axis: BatchAxis, dtype: torch.dtype, relevance: Callable[..., Tensor]
    ) -> Tensor:
        """As :meth:`ramp_fast.rules.Conservation.within`: with the mass that it stands for."""
        return relevance(self.exact(x, Massed(part.c.to(dtype), part.target), axis).c, x.to(dtype))

    def restricted(self, x: Tensor, part: Massed, mask: Tensor, axis: BatchAxis) -> Massed:
        """As :meth:`ramp_fast.rules.Conservation.restricted`: it keeps the mass that is left."""
        exact = self.exact(x, part, axis)
        return self.piece(exact, x, exact.c * mask.to(exact.c.dtype), axis)

    def finish(
        self, images: Tensor, part: Massed, axis: BatchAxis, dtype: torch.dtype, relevance: Callable[..., Tensor]
    ) -> Tensor:
        """As :meth:`ramp_fast.rules.Conservation.finish`: mass 1, or 0 where there is none."""
        scaled = self.exact(images, Massed(part.c.to(dtype), unit_mass(part.target)), axis)
        return relevance(scaled.c, images.to(dtype))

    def rows(self, c: Tensor, axis: BatchAxis) -> Rows:
        return Rows(c, axis, self.batch)

    def mass(self, x: Tensor, c: Tensor, axis: BatchAxis) -> Tensor:
        """``sum |x| |c|`` of every sample, ``[T, B]``; for the second half with contrast, of N."""
        rows = self.rows(c, axis)
        return ops.mass(rows.of(x, 0), rows.of(c, 1), self.contrast)

    def rescale(self, c: Tensor, scale: Tensor, axis: BatchAxis) -> Tensor:
        """Multiply P by its scale and N by its own, on the pair (P, D)."""
        rows = self.rows(c, axis)
        return rows.back(ops.rescale(rows.of(c, 1), scale, self.contrast), c)

    def diagonal(self, part: Massed, factor: Tensor, axis: BatchAxis) -> Massed:
        """``factor * c`` for a factor of the activation's shape, centred, in the memory order of ``c``."""
        rows = self.rows(part.c, axis)
        c, flat = rows.of(part.c, 1), rows.of(factor, 0)
        scaled = ops.scale_by(c, flat, self._centring(c, flat))
        return Massed(rows.back(scaled, part.c), part.target, centred=True)

    def gate(self, part: Massed, x: Tensor, axis: BatchAxis) -> Massed:
        """``2 [x > 0] c``, centred, in the memory order of ``c``."""
        rows = self.rows(part.c, axis)
        c, flat = rows.of(part.c, 1), rows.of(x, 0)
        gated = ops.gate(c, flat, self._centring(c, flat, gate=True))
        return Massed(rows.back(gated, part.c), part.target, centred=True)

    def affine(self, part: Massed, y: Tensor, gain: Tensor, shift: Tensor, relu: bool) -> Massed:
        """:func:`ramp_fast.ops.affine_pullback` at ``y`` ``[B * tiles, C, H, W]``, centred."""
        c, x = self.channels_last(part.c, 1), self.channels_last(y, 0)
        n_scale = ops.centring(c, x, gain, shift, relu) if self.contrast else None
        pulled = ops.affine_pullback(c, x, gain, shift, relu, n_scale)
        return Massed(self.channels_first(pulled, y), part.target, centred=True)

    def product(self, part: Massed, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`ramp_fast.ops.mul_pullback` of ``a`` ``[B, C, H, W]`` and ``b`` ``[B, C, 1, 1]``, in their shapes."""
        c, x = self.channels_last(part.c, 1), self.channels_last(a, 0)
        c_a, c_b, mass = ops.mul_pullback(c, x, b.flatten(1), self.contrast)
        return self.channels_first(c_a, a), c_b.view(*c_b.shape, 1, 1), mass

    def spread(self, c: Tensor, target: Tensor, x: Tensor) -> Massed:
        """:func:`ramp_fast.ops.spread` of ``c`` ``[T, B, C]`` over the pixels of images ``x`` ``[B, C, H, W]``."""
        c, mass = ops.spread(c, self.channels_last(x, 0), self.contrast)
        return Massed(self.channels_first(c, x), target, mass)

    def in_rows(self, c: Tensor, samples: Sequence[Tensor], axis: BatchAxis) -> tuple[Tensor, list[Tensor]]:
        """Coefficients ``[T, B, rows, width]`` and what they belong to ``[B, rows, width]``, of a leading batch axis.

        Without copies where samples are parts of the last axis of something, or of every sample of it.
        """
        if self.rows(c, axis).channels_last:
            c, samples = c.movedim(-3, -1), [t.movedim(-3, -1) for t in samples]
        # One row where every sample lies in one run, or the last axis.
        runs = c.shape[1] == self.batch and all(t[:1].is_contiguous() for t in (c[0], *samples))
        width = c.shape[2:].numel() if runs else c.shape[-1]
        rows = [t.reshape(self.batch, -1, width) for t in samples]
        return c.reshape(c.shape[0], self.batch, -1, width), rows

    def channels_last(self, t: Tensor, lead: int) -> Tensor:
        """``[..., B * tiles, C, H, W]`` as ``[..., B, tiles * H * W, C]`` behind ``lead`` axes."""
        return t.movedim(lead + 1, -1).reshape(*t.shape[:lead], self.batch, -1, t.shape[lead + 1])

    def channels_first(self, c: Tensor, like: Tensor) -> Tensor:
        """Coefficients ``[T, B, tiles * H * W, C]`` of :meth:`channels_last` for a tensor of the shape of ``like``."""
        rows, channels, *size = like.shape
        return c.view(c.shape[0], rows, *size, channels).movedim(-1, 2)

    def merge(self, x: Tensor, parts: Sequence[Massed], axis: BatchAxis) -> Massed:
        """Relevance from several readers adds; each part has its target mass first."""
        if len(parts) == 1:
            return parts[0]
        together = self._merged_pieces(x, parts, axis)
        if together is not None:
            return together
        scaled = [(p.c, *self.scale(x, p, axis)) for p in parts]
        target = total([alive for _, _, alive in scaled])
        (first, first_scale, _), (second, second_scale, _), *others = scaled
        rows = self.rows(first, axis)
        c = rows.back(ops.merge(rows.of(first, 1), first_scale, rows.of(second, 1), second_scale, self.contrast), first)
        for other, scale, _ in others:
            c = c + self.rescale(other, scale, axis)
        # Masses add; the sum's own mass is smaller where relevance of opposite signs met.
        return Massed(c, target)

    def _merged_pieces(self, x: Tensor, parts: Sequence[Massed], axis: BatchAxis) -> Massed | None:
        """:meth:`merge` of more than two, or of slices, in one pass; None where they are no images, channels last."""
        if x.dim() != 4 or not axis.plain or not ops.cpu_kernels(x.device):
            return None
        rows = [c for c in (_pixels(p.c, 1) for p in parts) if c is not None]
        if len(rows) < len(parts) or any(c.dtype != rows[0].dtype for c in rows):
            return None
        if len(rows) == 2 and all(c.is_contiguous() for c in rows):
            return None
        actual = [self.mass(x, p.c, axis) if p.actual is None else p.actual for p in parts]
        scales, alive = ops.scale_to(torch.stack([p.target for p in parts]), torch.stack(actual))
        merged = ops.merge_pieces(rows, scales, self.contrast)
        # All readers have just been given their masses, of P and of N.
        return Massed(self.channels_first(merged, x), alive.sum(0), centred=True)

    def scale(self, x: Tensor, part: Massed, axis: BatchAxis) -> tuple[Tensor, Tensor]:
        """The factor that gives ``part`` its target mass, and the mass it then has (0 where it is all zero)."""
        actual = part.actual if part.actual is not None else self.mass(x, part.c, axis)
        return ops.scale_to(part.target, actual)

    def without_rounding(self, part: Massed, x: Tensor, axis: BatchAxis) -> Massed:
        """D is zero where N is a multiple of P but for rounding, as far as that can be told.

        ``x`` is what the coefficients are for: where it is zero they are no relevance.
        """
        if not self.contrast:
            return part
        rows = self.rows(part.c, axis)
        flat = rows.of(part.c, 1)
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        p, d = wide.masked_fill(rows.of(x, 0) == 0, 0).chunk(2)
        n, size = p - d, p.abs().sum(-1, keepdim=True)
        apart = (p - size / n.abs().sum(-1, keepdim=True) * n).abs().amax(-1)
        unit = torch.finfo(flat.dtype).eps
        rounding = max(_ROUNDING * torch.finfo(p.dtype).eps, unit**2) * p.abs().amax(-1)
        equal = (apart <= rounding) & (size.squeeze(-1) > 0)
        c = torch.cat([flat[: len(p)], flat[len(p) :].masked_fill(equal.unsqueeze(-1), 0)])

        def of_n(masses: Tensor) -> Tensor:
            own, other = masses.chunk(2)
            return torch.cat([own, torch.where(equal, own, other)])

        actual = None if part.actual is None else of_n(part.actual)
        return Massed(rows.back(c, part.c), of_n(part.target), actual, part.centred)

    def exact(self, x: Tensor, part: Massed, axis: BatchAxis) -> Massed:
        """``part`` scaled to its target mass."""
        if part.actual is part.target:
            return part
        scale, alive = self.scale(x, part, axis)
        return Massed(self.rescale(part.c, scale, axis), alive, alive)

    def centred(self, part: Massed, axis: BatchAxis) -> Massed:
        """``part`` with N scaled so that it is about as large as P, which makes D as small as it can be.

        Between two places where masses are restored P and N drift apart, and D would carry that drift through
        reduced-precision products only for it to cancel later. Any positive scale of N is allowed there; a
        sample of the coefficients is enough to choose one.
        """
        if part.centred or part.actual is not None:
            return part
        rows = self.rows(part.c, axis)
        flat = rows.of(part.c, 1)
        scale = self._centring(flat)
        if scale is None:
            return part
        both = torch.cat([torch.ones_like(scale), scale])
        return Massed(rows.back(ops.rescale(flat, both, True), part.c), part.target, centred=True)

    def _centring(self, c: Tensor, factor: Tensor | None = None, gate: bool = False) -> Tensor | None:
        """What N of ``factor * c`` (``[factor > 0] c``) has to be multiplied by, ``[T / 2, B]``; rows as of `Rows`."""
        return ops.centring(c, factor, gate=gate) if self.contrast else None


def _pixels(t: Tensor, lead: int) -> Tensor | None:
    """Images ``[..., C, H, W]`` behind ``lead + 1`` axes as ``[..., H W, C]``, if this is how they lie in memory."""
    if t.dim() != lead + 4 or t.stride(-3) != 1 or t.stride(-2) != t.stride(-1) * t.shape[-1]:
        return None
    return t.movedim(-3, -1).flatten(-3, -2)


def unit_mass(target: Tensor) -> Tensor:
    """A mass of one, and none where ``target`` says that no relevance is left."""
    return (target > 0).to(target.dtype)


def total(masses: Iterable[Tensor]) -> Tensor:
    """Their sum; these tensors are tiny, so the number of operations is what counts."""
    return functools.reduce(operator.add, masses)


def share(target: Tensor, masses: list[Tensor], shares: str) -> Sequence[Tensor]:
    """Target masses of a junction's operands."""
    if shares == "equal":
        return [unit_mass(target)] * len(masses)
    return ops.share(target, masses).unbind(0)
