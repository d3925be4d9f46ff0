"""absLRP as one of captum's attribution methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ramp_fast.engine import CONTRASTS, NORMALIZATIONS, Engine
from ramp_fast.errors import InputError
from ramp_fast.rules.abslrp import AbsLRP as Rule

_F = TypeVar("_F", bound=Callable[..., Any])

try:
    from captum.attr import Attribution
    from captum.log import log_usage
except ImportError:  # the class works without captum, as nothing but its base is captum's
    Attribution = object

    def log_usage(*_: Any, **__: Any) -> Callable[[_F], _F]:
        """No log without captum."""
        return lambda function: function


__all__ = ["AbsLRP"]


class AbsLRP(Attribution):  # type: ignore[misc]  # captum has no types, and may not be there
    """absLRP with captum's interface: a ``captum.attr.Attribution`` where captum is installed.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier in eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``.
    rule, precision, strict
        As for :class:`ramp_fast.Engine`.
    contrast : {"others", "none"}
        As for :meth:`ramp_fast.Engine.attribute`.
    normalize : {"max", "sum", "none"}
        As for :meth:`ramp_fast.Engine.attribute`.
    **options
        Further arguments of :class:`ramp_fast.Engine`.

    Raises
    ------
    UnsupportedModelError, ValueError, TypeError
        As :class:`ramp_fast.Engine`.

    Examples
    --------
    >>> method = AbsLRP(model)
    >>> method.attribute(images, target=281).shape
    torch.Size([8, 3, 224, 224])
    >>> captum.attr.NoiseTunnel(method).attribute(images, target=281, stdevs=0.1)
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule = "abslrp",
        precision: str = "mixed",
        strict: bool = True,
        *,
        contrast: str = "others",
        normalize: str = "max",
        **options: Any,
    ) -> None:
        for name, value, known in (("contrast", contrast, CONTRASTS), ("normalize", normalize, NORMALIZATIONS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
        if Attribution is object:
            self.forward_func = model
        else:
            super().__init__(model)
        self.engine = Engine(model, rule, precision, strict, **options)
        self.contrast, self.normalize = contrast, normalize

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]  # NoiseTunnel calls what captum's decorator wraps
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: int | list[int] | Tensor | None = None,
        additional_forward_args: None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Relevance maps.

        Parameters
        ----------
        inputs : Tensor [N, C, H, W] or tuple of one such Tensor
            Preprocessed for the model.
        target : int, list of int or integer Tensor [N] or [1], optional
            The classes to explain; None: the predicted ones.
        additional_forward_args : None
            For captum's callers; the engine's models take images alone.

        Returns
        -------
        Tensor or tuple of one Tensor
            Like ``inputs``: shape, dtype, device.

        Raises
        ------
        InputError
            An argument is not as described.
        """
        if additional_forward_args is not None:
            raise InputError("additional_forward_args: the engine's models take images alone, pass None")
        images = inputs
        if isinstance(inputs, tuple):
            if len(inputs) != 1:
                raise InputError(f"the engine's models take one input, the images; got {len(inputs)}")
            images = inputs[0]
        if not isinstance(images, Tensor):
            raise InputError(f"inputs must be a Tensor [N, C, H, W], got {type(images).__name__}")
        maps = self.engine.attribute(
            images, _classes(target, images.shape[0]), contrast=self.contrast, normalize=self.normalize
        ).maps.to(images)
        return (maps,) if isinstance(inputs, tuple) else maps

    def attribute_future(self) -> None:
        """Not there, as for most of captum's methods.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError("AbsLRP has no attribute_future: call attribute")

    def has_convergence_delta(self) -> bool:
        """False: nothing is approximated."""
        return False

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: maps are relevance, not sensitivity."""
        return True


def _classes(target: Any, count: int) -> int | Tensor | None:
    """Captum's ways to name classes in the engine's."""
    if isinstance(target, list):
        if not all(isinstance(t, int) and not isinstance(t, bool) for t in target) or len(target) != count:
            raise InputError(f"target must be a list of {count} classes, one per image; got {target!r}")
        return torch.tensor(target)
    if isinstance(target, Tensor) and target.numel() == 1 and target.dim() < 2 and not target.is_floating_point():
        return target.reshape(1).expand(count)  # one class for all images
    if target is None or isinstance(target, (int, Tensor)):
        if isinstance(target, Tensor) and (target.dim() != 1 or target.is_floating_point()):
            raise InputError(f"target must be integers [{count}], got {list(target.shape)}, {target.dtype}")
        return target
    raise InputError(f"target must be an int, a list of int, an integer Tensor or None, got {type(target).__name__}")
