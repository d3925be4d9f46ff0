"""What is asked of a plan: which classes or which seed, against what, in which scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ramp_fast._checks import finite_samples, flag
from ramp_fast.errors import InputError
from ramp_fast.graph import Graph
from ramp_fast.plan import Plan
from ramp_fast.rules.rule import Rule
from ramp_fast.runtime.inspection import Balance, Inspection, shape_of_sample
from ramp_fast.runtime.run import pull_back, run_forward

NORMALIZATIONS = ("max", "sum", "none")
IMAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Target:
    """The classes or the seed that was asked for, checked.

    Where values are not to be looked at, ``invalid`` ``[B, K]`` says on their device which are wrong.
    """

    def __init__(
        self,
        target: int | Tensor | Callable[[Tensor], Tensor] | None,
        batch: int,
        classes: int,
        contrast: str,
        check: bool | None = None,
    ) -> None:
        self.classes, self.contrast, self.check = classes, contrast == "others", check
        self.invalid: Tensor | None = None
        self.given: Tensor | None = None
        self.ids: Tensor | None = None
        self.several = False
        self.function: Callable[[Tensor], Tensor] | None = None
        if not isinstance(target, Tensor) and callable(target):
            self.function, target = target, None
            self._require_no_contrast()
        if self.contrast and classes < 2:
            raise InputError('contrast="others" needs at least two classes; pass contrast="none"')
        if isinstance(target, bool) or not (target is None or isinstance(target, (int, Tensor))):
            raise InputError(f"target must be None, an int, a Tensor or a callable, got {type(target).__name__}")
        if isinstance(target, int):
            if _unlike_a_class(target) or (check is not False and not 0 <= target < classes):
                raise InputError(f"target must be between 0 and {classes - 1}, got {target}")
            target = torch.full((batch,), target, device="cpu")
        if isinstance(target, Tensor):
            self._check(target, batch)
        self.count = self.ids.shape[1] if self.ids is not None else 1

    def _check(self, target: Tensor, batch: int) -> None:
        check_dense("target", target)
        if target.is_floating_point():
            if target.dtype not in IMAGE_DTYPES:
                raise InputError(f"a seed must be floating point of 16 bits or more, got {target.dtype}")
            if target.shape != (batch, self.classes):
                raise InputError(f"a seed must be [{batch}, {self.classes}] (batch, classes), got {list(target.shape)}")
            self._require_no_contrast()
            if not validates(target, self.check):
                self.invalid = ~finite_samples(target).unsqueeze(1)
            elif not bool(finite_samples(target).all()):
                raise InputError("the seed has values that are not finite")
            self.given = target
            return
        if target.dtype == torch.bool or target.is_complex():
            raise InputError(f"target must be integers (classes) or floating point (a seed), got {target.dtype}")
        if target.dim() not in (1, 2) or target.shape[0] != batch or (target.dim() == 2 and target.shape[1] == 0):
            raise InputError(f"target must be [{batch}] or [{batch}, K], got {list(target.shape)}")
        looks = validates(target, self.check)
        ids = target.long()  # first: unsigned integers have no extremes in PyTorch
        if looks and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.classes):
            raise InputError(
                f"target must be between 0 and {self.classes - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        self.several = target.dim() == 2
        self.ids = ids.reshape(batch, target.shape[1] if self.several else 1)
        if not looks:
            self.invalid = (self.ids < 0) | (self.ids >= self.classes)

    def _require_no_contrast(self) -> None:
        if self.contrast:
            raise InputError('a seed holds the relevance for and against every class: pass contrast="none"')

    @property
    def seeded(self) -> bool:
        """Whether a seed was given or is computed, and no classes."""
        return self.given is not None or self.function is not None

    def operands(self, here: slice) -> tuple[Tensor, ...]:
        """What was given for the images ``here``: seed or classes, and which are wrong where nobody has looked yet."""
        return tuple(t[here] for t in (self.ids if self.given is None else self.given, self.invalid) if t is not None)

    def split(self, operands: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Operands, on whatever device by now, as seed or classes (or nothing), and which are wrong."""
        return (operands, None) if self.invalid is None else (operands[:-1], operands[-1])

    def seed(self, logits: Tensor, given: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
        """Classes ``[b, K]`` or the seed ``[b, classes]``, and coefficients ``[maps, b, classes]``."""
        start = rule.conservation.start
        if self.seeded:
            seed = self._computed(logits) if given is None else given.to(logits)
            return seed, start(rule.start, seed.unsqueeze(0), None, logits)
        ids = logits.argmax(-1, keepdim=True) if given is None else given
        positive = torch.zeros(ids.shape[1], *logits.shape, dtype=logits.dtype, device=logits.device)
        positive.scatter_(2, ids.t().unsqueeze(-1).clamp(0, self.classes - 1), 1.0)  # invalid ones may be outside
        negative = rule.others(positive, logits) if self.contrast else None
        return ids, start(rule.start, positive, negative, logits)

    def _computed(self, logits: Tensor) -> Tensor:
        assert self.function is not None
        seed = self.function(logits.clone())
        if not isinstance(seed, Tensor) or not seed.is_floating_point() or seed.shape != logits.shape:
            found = f"{seed.dtype} {list(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
            raise InputError(
                f"target, a callable, must return a floating-point seed {list(logits.shape)} (images, classes) for "
                f"these logits; it returned {found}"
            )
        return seed.detach().to(logits)

    def undefined(self, logits: Tensor, explained: Tensor) -> Tensor:
        """Which maps ``[b, K]`` are not defined, since the model's own numbers are not.

        A logit of minus infinity, which models give to classes that they leave out, counts where it is explained.
        """
        wrong = ~(logits < math.inf).all(-1, keepdim=True)
        if self.seeded:
            finite = explained.isfinite() & ((explained == 0) | (logits > -math.inf))
            return wrong | ~finite.all(-1, keepdim=True)
        return wrong | (logits.gather(1, explained.clamp(0, self.classes - 1)) == -math.inf)


class Explained(NamedTuple):
    """What comes of images that went through a plan together.

    Attributes
    ----------
    maps : Tensor
        ``[b, K, C, H, W]``.
    logits : Tensor
        ``[b, classes]``, the scores that are explained.
    target : Tensor
        Classes ``[b, K]``, or the seed ``[b, classes]``.
    inspected : tuple of Tensor
        What an inspection has found, ``[b, K, ...]``: relevance of inner layers, and totals.
    """

    maps: Tensor
    logits: Tensor
    target: Tensor
    inspected: tuple[Tensor, ...] = ()

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it side by side."""
        return self.maps, self.logits, self.target, *self.inspected

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Explained:
        """The inverse of :meth:`tensors`."""
        maps, logits, target, *inspected = tensors
        return cls(maps, logits, target, tuple(inspected))


@dataclass(frozen=True)
class Request:
    """What one call asks for, for each of its images.

    Attributes
    ----------
    target : Target
    normalize : {"max", "sum", "none"}
    validated : bool
        Whether the images' values have been looked at.
    layers : sequence of str
        Modules whose relevance is asked for.
    masks : mapping of str to Tensor
        What is kept of modules' relevance under K conditions, ``[K, *shape]``; K maps of one target are made then.
    balanced : bool
        Whether totals before and after every step are asked for.
    """

    target: Target
    normalize: str
    validated: bool
    layers: Sequence[str] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    balanced: bool = False

    @property
    def count(self) -> int:
        """Maps of every image."""
        return max([self.target.count, *(len(mask) for mask in self.masks.values())])

    @property
    def inspects(self) -> bool:
        """Whether anything but maps is asked for, or a condition."""
        return bool(self.layers or self.masks or self.balanced)

    def unfilled(self, plan: Plan, images: Tensor) -> tuple[Tensor, ...]:
        """Memory for what :meth:`finished` gives of all images together."""
        kind, target = plan.precision.output, self.target
        batch, maps = (images.shape[0],), (images.shape[0], self.count)
        explained = ((target.classes,), kind) if target.seeded else ((target.count,), torch.long)
        rooms: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((*maps, *images.shape[1:]), kind),
            ((*batch, target.classes), kind),
            ((*batch, *explained[0]), explained[1]),
            *(((*maps, *shape_of_sample(plan, plan.graph.observed[name])), kind) for name in self.layers),
        ]
        if self.balanced:
            rooms.append(((*maps, len(Balance.steps(plan)), 2), torch.float64))
        return tuple(torch.empty(shape, dtype=dtype, device=images.device) for shape, dtype in rooms)

    def key(self) -> tuple[Any, ...]:
        """Everything that :meth:`explain` depends on besides its operands."""
        return self.target.given is None, self.target.contrast, self.normalize

    def explain(self, plan: Plan, images: Tensor, *given: Tensor) -> Explained:
        """Forward pass and pull-back of images in the plan's dtype, with classes or a seed as operands."""
        target, rule = self.target, plan.rule
        forward = run_forward(plan, images, keep_all=self.balanced)
        logits = forward.logits
        explained, c = target.seed(logits, given[0] if given else None, rule)
        inspection = None
        if self.inspects:
            c = c.repeat_interleave(self.count // target.count, 0)
            inspection = Inspection(plan, images, self.count, self.layers, self.masks, self.balanced)
        pulled = pull_back(plan, forward, c, target.contrast, inspection)
        maps = rule.conservation.maps_of(pulled, self.count)
        inspected = [] if inspection is None else inspection.results()
        if target.seeded:
            if self.normalize == "none":
                maps = rule.conservation.scaled_to_seed(maps, explained)
            inspected = [rule.conservation.scaled_to_seed(found, explained) for found in inspected]
        maps = normalized(maps, self.normalize)
        return Explained(maps.transpose(0, 1), logits, explained, tuple(t.transpose(0, 1) for t in inspected))

    def finished(self, explained: Explained, images: Tensor, invalid: Tensor | None, plan: Plan) -> Explained:
        """As the caller gets it: NaN where a map is not defined, the model's logits, output dtypes."""
        wrong = self.target.undefined(explained.logits, explained.target)
        if not self.validated:
            wrong = wrong | ~finite_samples(images).unsqueeze(1)
        if invalid is not None:
            wrong = wrong | invalid
        kind = plan.precision.output
        maps = nan_where(explained.maps, wrong).to(kind)
        inspected = tuple(nan_where(found, wrong) for found in explained.inspected)
        return Explained(maps, returned(explained.logits, plan.graph).to(kind), explained.target, inspected)


_ENDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "log_softmax": lambda scores: scores.log_softmax(-1),
    "log": torch.log,
}


def returned(scores: Tensor, graph: Graph) -> Tensor:
    """What the model makes of the scores that are explained."""
    for name in graph.ending:
        scores = _ENDINGS[name](scores)
    return scores


def validates(values: Tensor, check: bool | None) -> bool:
    """Whether values are looked at before anything is computed."""
    return values.device.type == "cpu" if check is None else check


def nan_where(maps: Tensor, wrong: Tensor) -> Tensor:
    """``maps`` ``[B, K, ...]``, NaN where ``wrong`` (``[B, 1]`` or ``[B, K]``)."""
    if wrong.device.type == "cpu" and not bool(wrong.any()):
        return maps
    return maps.masked_fill(wrong.view(*wrong.shape, *[1] * (maps.dim() - 2)), math.nan)


def normalized(maps: Tensor, how: str) -> Tensor:
    """Maps ``[K, B, C, H, W]`` in the scale that was asked for."""
    if how == "none":
        return maps
    size = maps.abs().flatten(2)
    scale = size.amax(-1) if how == "max" else size.sum(-1, dtype=torch.float64).to(maps.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return maps / scale.view(*scale.shape, 1, 1, 1)


def check_images(images: Any, check: bool | None) -> None:
    """Raise an InputError where images are not what an engine takes."""
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if check is not None:
        flag("images", "check", check)
    check_dense("images", images)
    if images.dim() != 4:
        raise InputError(f"images must be [B, C, H, W], got shape {list(images.shape)}")
    if images.dtype not in IMAGE_DTYPES:
        raise InputError(
            "images must be floating point (16 bits or more) and preprocessed as the model wants them, got "
            f"{images.dtype}"
        )
    if validates(images, check) and not bool(finite_samples(images).all()):
        raise InputError("images have values that are not finite")


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose values do not lie in memory one by one."""
    kinds = {
        "nested": tensor.is_nested,
        "on the meta device, without values": tensor.is_meta,
        "quantised": tensor.is_quantized,
        f"in the layout {tensor.layout}": tensor.layout != torch.strided,
    }
    found = next((kind for kind, is_kind in kinds.items() if is_kind), None)
    if found is not None:
        raise InputError(f"{name} must be an ordinary dense tensor, this one is {found}")


def _unlike_a_class(target: int) -> bool:
    return not -(2**63) <= target < 2**63
