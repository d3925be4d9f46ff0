"""What metrics and evaluations know of an engine, and what they ask of models and methods beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ramp_fast.errors import InputError
from ramp_fast.runtime.inspection import Balance


@dataclass(frozen=True)
class Attribution:
    """What :meth:`Engine.attribute` returns.

    Attributes
    ----------
    maps : Tensor
        Relevance of every pixel and channel, ``[B, C, H, W]`` (``[B, K, C, H, W]`` for K targets), float32
        (float64 under precision "float64"), on the images' device.
    target : Tensor
        Explained classes, ``[B]`` or ``[B, K]``; the seed itself where one was given or computed.
    logits : Tensor
        ``[B, classes]``, what the model returns. (Of a model that ends in softmax or log_softmax the scores below it
        are explained.)
    layers : dict of str to Tensor
        Relevance of the outputs of the modules that were named, ``[B, *output]`` (``[B, K, *output]`` for K targets),
        as the rule scales it (``normalize`` is for maps). Where an output has no axis of images alone, they are first.
    conservation : Balance or None
        How much relevance every module has kept, if that was asked for; ``print`` it.
    """

    maps: Tensor
    target: Tensor
    logits: Tensor
    layers: dict[str, Tensor] = field(default_factory=dict)
    conservation: Balance | None = None


class Explainer(ABC):
    """A model with a way to explain it.

    Attributes
    ----------
    model : torch.nn.Module
    """

    model: nn.Module

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables call it."""

    @abstractmethod
    def attribute(
        self,
        images: Tensor,
        target: int | Tensor | Callable[[Tensor], Tensor] | None = None,
        contrast: str = "others",
        normalize: str = "max",
        *,
        batch_size: int | None = None,
        check: bool | None = None,
    ) -> Attribution:
        """Relevance maps of ``images`` ``[B, C, H, W]``: see :meth:`ramp_fast.Engine.attribute`."""

    @abstractmethod
    def logits(self, images: Tensor, *, check: bool | None = None) -> Tensor:
        """The model's logits ``[B, classes]``, but for rounding."""

    @abstractmethod
    def computes_in(self, dtype: torch.dtype) -> bool:
        """Whether logits are computed in ``dtype`` or a wider one."""

    @abstractmethod
    def for_model(self, model: nn.Module) -> Explainer:
        """The same for another model (one with other weights, for example)."""


Method = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, images [N, C, H, W], target [N]) -> maps [N, C or 1, H, W]``."""

CONTRASTS = ("others", "none")

Model = nn.Module | Explainer
"""What metrics are made for: an engine stands for its model."""


def module_of(model: Model) -> nn.Module:
    """A model, or that of an engine."""
    return model.model if isinstance(model, Explainer) else model


def logits_of(model: Model, images: Tensor) -> Tensor:
    """Logits ``[N, classes]`` of images that go through a model together. An engine's have no gradients.

    An engine computes them where that is its model's function but for rounding: on CPUs, in no less than the images'
    precision. Values that a model returns are not looked at, and may lie in the memory of the images.

    Raises
    ------
    InputError
        The model returns something else than a floating point Tensor ``[N, classes]``. Of an engine: the images are not
        finite. (A ReLU that is computed with a convolution would hide it.)
    """
    if isinstance(model, Explainer) and images.device.type == "cpu" and model.computes_in(images.dtype):
        return model.logits(images)
    model = module_of(model)
    return _checked_logits(model(images), model, images.shape[0])


def _checked_logits(found: Any, model: nn.Module, count: int) -> Tensor:
    """What a model returned for ``count`` images, where it is logits ``[count, classes]``."""
    if not isinstance(found, Tensor):
        what, then = type(found).__name__, "wrap it in a module whose forward returns the logits alone"
    elif found.dim() == 2 and found.shape[0] == count and found.shape[1] and found.is_floating_point():
        return found
    else:
        what, then = f"{list(found.shape)}, {found.dtype}", "wrap it in a module whose forward returns that"
        if found.shape == (count,):
            then = "let it return one logit as [N, 1], for example nn.Sequential(model, nn.Unflatten(0, (-1, 1)))"
        elif found.dim() > 2 and found.shape[0] == count and found[0].numel() == found.shape[1]:
            then = "let it return [N, classes], for example nn.Sequential(model, nn.Flatten())"
    raise InputError(
        f"{type(model).__name__} returns {what} for {count} images; logits must be a floating point Tensor "
        f"[N, classes]: {then}"
    )


def method_name(method: Method | Explainer) -> str:
    """What messages and tables call it."""
    if isinstance(method, Explainer):
        return f"{type(method).__name__}({method.name})"
    return str(getattr(method, "__name__", type(method).__name__))
