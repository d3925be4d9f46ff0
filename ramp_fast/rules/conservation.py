"""What a rule keeps constant on the way from the logits to the pixels, as the runtime and operations see it.

Relevance in flight is a tensor of coefficients ``c`` ``[maps, *shape]``: of a tensor ``x`` it is what the rule's
``relevance(c, x)`` says, ``|x| c`` for absLRP and ``x c`` for the rules that are gradients in disguise. Operations that
only rearrange values are the same under every rule; what happens where relevance of several readers meets, and what has
to be restored besides, is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ramp_fast.graph import BatchAxis

# From a seed [K, B, classes] and the logits [B, classes] to coefficients at the logits: a rule's `start`.
Start = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Contribution:
    """What one reader of a tensor says about its relevance.

    Attributes
    ----------
    c : Tensor
        Coefficients ``[maps, *shape]``.
    """

    c: Tensor

    def moved(self, c: Tensor, *, copies: bool = False) -> Contribution:
        """The same relevance, its values moved elsewhere; ``copies``: some were read several times and are added."""
        return Contribution(c)


class Relevance(Contribution):
    """``c`` is relevance itself, of rules for first layers that do not multiply by the pixels."""

    def moved(self, c: Tensor, *, copies: bool = False) -> Contribution:
        """As :meth:`Contribution.moved`."""
        return Relevance(c)


@dataclass(frozen=True)
class Conservation:
    """How relevance adds up; this one, for linear rules, leaves coefficients as they are.

    Attributes
    ----------
    batch : int
        Samples.
    num_maps : int
        Coefficient tensors that are pulled back together.
    contrast : bool
        Whether the map of the other classes is subtracted.
    """

    batch: int
    num_maps: int
    contrast: bool

    @classmethod
    def start(cls, coefficients: Start, positive: Tensor, negative: Tensor | None, logits: Tensor) -> Tensor:
        """Coefficients at the logits ``[maps, B, classes]`` from seeds ``[K, B, classes]``.

        ``negative`` is the seed of the classes to contrast with: here one signed seed says both.
        """
        return coefficients(positive if negative is None else positive - negative, logits)

    @classmethod
    def maps_of(cls, relevance: Tensor, targets: int) -> Tensor:
        """``[K, ...]`` of ``[maps, ...]``."""
        return relevance

    @classmethod
    def scaled_to_seed(cls, maps: Tensor, seed: Tensor) -> Tensor:
        """Maps ``[K, B, ...]`` of a seed ``[B, classes]`` in its scale, which linear rules keep."""
        return maps

    def begin(self, c: Tensor) -> Contribution:
        """Relevance at the logits."""
        return Contribution(c)

    def merge(self, x: Tensor, parts: Sequence[Any], axis: BatchAxis) -> Any:
        """The relevance of ``x`` from that of its readers."""
        if any(isinstance(part, Relevance) for part in parts):
            first, *others = (part.c if isinstance(part, Relevance) else x * part.c for part in parts)
            return Relevance(sum(others, first))
        first, *others = (part.c for part in parts)
        return Contribution(sum(others, first))

    def exact(self, x: Tensor, part: Any, axis: BatchAxis) -> Any:
        """``part`` with everything that is known of its scale applied, so that it can be put beside others."""
        return part

    def measured(self, x: Tensor, part: Any, axis: BatchAxis) -> Any:
        """``part`` with what :meth:`settled` has to know of its scale, which takes ``x``."""
        return self.exact(x, part, axis)

    def settled(self, part: Any, axis: BatchAxis) -> Any:
        """A measured ``part`` as :meth:`exact` makes it."""
        return part

    def settled_together(self, parts: Sequence[Any], c: Sequence[Tensor]) -> Tensor | None:
        """:meth:`settled` parts, side by side: of ``c``, their coefficients as ``[maps, B, H, N, D]``, one tensor
        ``[maps, B, N, parts, H, D]``.

        None where that is no less work than to settle each and to copy it.
        """
        return None

    def piece(self, whole: Any, x: Tensor, c: Tensor, axis: BatchAxis) -> Any:
        """The relevance ``c`` of an operand ``x`` that was put together with others, cut out of an exact ``whole``."""
        return whole.moved(c)

    def cut(
        self, x: Tensor, part: Any, axis: BatchAxis, dim: int, lengths: Sequence[int] | None, axes: Sequence[BatchAxis]
    ) -> list[Any]:
        """The relevance of operands that were put together in ``x`` along ``dim``: concatenated, or else stacked.

        ``lengths`` are theirs along it, None where they were stacked; ``axes`` where their samples are.
        """
        whole = self.exact(x, part, axis)
        if lengths is None:
            own, pieces = x.unbind(dim), whole.c.unbind(dim + 1)
        else:
            own, pieces = x.split(list(lengths), dim), whole.c.split(list(lengths), dim + 1)
        return [self.piece(whole, *each) for each in zip(own, pieces, axes, strict=True)]

    def together(self, c: Tensor, parts: Iterable[Any]) -> Any:
        """The relevance ``c`` of a tensor that exact ``parts`` were cut out of."""
        return next(iter(parts)).moved(c)

    def aligned(self, parts: Sequence[Any]) -> list[Any]:
        """Exact parts of one tensor in one scale, before :meth:`together`."""
        return list(parts)

    def within(
        self, x: Tensor, part: Any, axis: BatchAxis, dtype: torch.dtype, relevance: Callable[..., Tensor]
    ) -> Tensor:
        """Relevance of ``x`` ``[maps, *x.shape]`` in ``dtype``, with the share that it has of the whole."""
        c: Tensor = part.c.to(dtype)
        return c if isinstance(part, Relevance) else relevance(c, x.to(dtype))

    def restricted(self, x: Tensor, part: Any, mask: Tensor, axis: BatchAxis) -> Any:
        """What of ``part`` is left of ``x`` times ``mask``, which broadcasts to ``c``."""
        return replace(part, c=part.c * mask.to(part.c.dtype))

    def finish(
        self, images: Tensor, part: Any, axis: BatchAxis, dtype: torch.dtype, relevance: Callable[..., Tensor]
    ) -> Tensor:
        """Relevance of the images ``[maps, B, C, H, W]`` in ``dtype``, as it is scaled in the end.

        ``relevance``: that of coefficients and what they belong to, by the rule.
        """
        return self.within(images, part, axis, dtype, relevance)
