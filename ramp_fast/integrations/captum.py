"""absLRP as one of captum's attribution methods."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ramp_fast.engine import Engine
from ramp_fast.errors import InputError
from ramp_fast.explainer import CONTRASTS
from ramp_fast.rules.abslrp import AbsLRP as Rule
from ramp_fast.runtime.targets import NORMALIZATIONS

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

_NO_DELTA = "absLRP has no convergence delta: its maps are normalised and do not add up to the logit"


class AbsLRP(Attribution):  # type: ignore[misc]  # captum has no types, and may not be there
    """absLRP with captum's interface: a ``captum.attr.Attribution`` where captum is installed.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier in eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``.
    rule, precision, strict
        As for :class:`ramp_fast.Engine`.
    contrast : {"others", "none"}
        As for :meth:`ramp_fast.Engine.attribute`; a model of one logit has no others, and is explained with "none".
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
        target: int | tuple[int, ...] | list[int] | list[tuple[int, ...]] | Tensor | None = None,
        additional_forward_args: tuple[()] | None = None,
        *,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Relevance maps.

        Parameters
        ----------
        inputs : Tensor [N, C, H, W] or tuple of one such Tensor
            Preprocessed for the model.
        target : int, tuple of one int, list of either, integer Tensor or array [N] or [1]
            The classes to explain. None is for models of one logit, as in captum: NoiseTunnel, infidelity and
            sensitivity call this function with noisy copies, each of which might be predicted as another class.
        additional_forward_args : None or ()
            For captum's callers; the engine's models take images alone.
        internal_batch_size : int, optional
            Work on this many images at a time. Results do not depend on it.
        return_convergence_delta : False
            For captum's callers; there is no delta.

        Returns
        -------
        Tensor or tuple of one Tensor
            Like ``inputs``: shape, dtype, device.

        Raises
        ------
        InputError
            An argument is not as described.
        """
        if not (
            additional_forward_args is None
            or (isinstance(additional_forward_args, tuple) and not additional_forward_args)
        ):
            raise InputError(
                "additional_forward_args: the engine's models take images alone, pass None; a module around the model "
                "can hold what else it takes"
            )
        if return_convergence_delta:
            raise InputError(f"return_convergence_delta: {_NO_DELTA}")
        images = inputs
        if isinstance(inputs, tuple):
            if len(inputs) != 1:
                raise InputError(f"the engine's models take one input, the images; got {len(inputs)}")
            images = inputs[0]
        if not isinstance(images, Tensor):
            raise InputError(f"inputs must be a Tensor [N, C, H, W], got {type(images).__name__}")
        classes = self._classes(target, images)
        contrast = self.contrast
        if contrast == "others" and images.dim() == 4 and self.engine.classes(images[:1]) == 1:
            contrast = "none"
        maps = self.engine.attribute(
            images, classes, contrast=contrast, normalize=self.normalize, batch_size=internal_batch_size
        ).maps.to(images)
        return (maps,) if isinstance(inputs, tuple) else maps

    def _classes(self, target: Any, images: Tensor) -> int | Tensor:
        """Captum's ways to name classes in the engine's."""
        if target is None:
            count = self.engine.classes(images)
            if count != 1:
                raise InputError(
                    f"target is None, and the model has {count} classes: name those to explain, for example "
                    "target=model(images).argmax(1), so that noisy copies of an image are explained for one class"
                )
            return 0
        return _classes(target, images.shape[0])

    def attribute_future(self) -> None:
        """Not there, as for most of captum's methods.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError("AbsLRP has no attribute_future: call attribute")

    def has_convergence_delta(self) -> bool:
        """False: maps do not add up to the logit, so nothing is left over to be a delta."""
        return False

    def compute_convergence_delta(self, *_: Any, **__: Any) -> Tensor:
        """Not there: see :meth:`has_convergence_delta`.

        Raises
        ------
        NotImplementedError
            Always, as for captum's methods without a delta.
        """
        raise NotImplementedError(_NO_DELTA)

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: maps are relevance, not sensitivity."""
        return True


def _classes(target: Any, count: int) -> int | Tensor:
    """Captum's ways to name classes in the engine's."""
    if isinstance(target, np.ndarray):
        try:
            target = torch.as_tensor(target.astype(np.int64) if target.dtype.kind in "iu" else target)
        except (TypeError, ValueError) as error:
            raise InputError(f"target must be integers [{count}], got an array of {target.dtype}") from error
    if isinstance(target, Tensor):
        whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
        if whole and target.numel() == 1 and target.dim() < 2:
            return target.reshape(1).expand(count)  # one class for all images
        if not whole or target.shape != (count,):
            raise InputError(f"target must be integers [{count}], got {list(target.shape)}, {target.dtype}")
        return target
    if isinstance(target, list):
        if len(target) != count:
            raise InputError(f"target must be a list of {count} classes, one per image; got {target!r}")
        return torch.tensor([_class(t) for t in target], dtype=torch.long)
    return _class(target)


def _class(target: Any) -> int:
    """One class: an integer, or a tuple of one as captum has it for outputs of one axis behind the batch's."""
    if isinstance(target, tuple):
        if len(target) != 1:
            raise InputError(
                f"target must have one index, the class, as the model returns [N, classes]; got {target!r}"
            )
        target = target[0]
    try:
        if not isinstance(target, bool):
            return operator.index(target)
    except TypeError:  # also of arrays and Tensors of several numbers
        pass
    raise InputError(
        f"target must be a class, a tuple of one, a list of these or an integer Tensor; got "
        f"{type(target).__name__} {target!r}"
    )
