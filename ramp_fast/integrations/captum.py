"""The engine's rules as captum's attribution methods."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ramp_fast.engine import Engine
from ramp_fast.errors import InputError
from ramp_fast.explainer import CONTRASTS
from ramp_fast.explainer import Attribution as Found
from ramp_fast.rules import LayerRule, Rule
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


__all__ = ["LRP", "AbsLRP", "LayerLRP"]

_NO_DELTA = "absLRP has no convergence delta: its maps are normalised and do not add up to the logit"


class _Method(Attribution):  # type: ignore[misc]  # captum has no types, and may not be there
    """What captum's callers know of a method, around an engine."""

    def __init__(
        self, model: nn.Module, rule: str | Rule | LayerRule, precision: str, strict: bool, **options: Any
    ) -> None:
        if Attribution is object:
            self.forward_func = model
        else:
            super().__init__(model)
        self.engine = Engine(model, rule, precision, strict, **options)

    def _checked(self, inputs: Any, target: Any, additional_forward_args: Any) -> tuple[Tensor, int | Tensor]:
        """The images and the classes to explain, of what captum's callers pass."""
        if not (
            additional_forward_args is None
            or (isinstance(additional_forward_args, tuple) and not additional_forward_args)
        ):
            raise InputError(
                "additional_forward_args: the engine's models take images alone, pass None; a module around the model "
                "can hold what else it takes"
            )
        images = inputs
        if isinstance(inputs, tuple):
            if len(inputs) != 1:
                raise InputError(f"the engine's models take one input, the images; got {len(inputs)}")
            images = inputs[0]
        if not isinstance(images, Tensor):
            raise InputError(f"inputs must be a Tensor [N, C, H, W], got {type(images).__name__}")
        return images, self._classes(target, images)

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
        raise NotImplementedError(f"{type(self).__name__} has no attribute_future: call attribute")

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: maps are relevance, not sensitivity."""
        return True


class AbsLRP(_Method):
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
        rule: str | Rule | LayerRule = "abslrp",
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
        super().__init__(model, rule, precision, strict, **options)
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
        if return_convergence_delta:
            raise InputError(f"return_convergence_delta: {_NO_DELTA}")
        images, classes = self._checked(inputs, target, additional_forward_args)
        contrast = self.contrast
        if contrast == "others" and images.dim() == 4 and self.engine.classes(images[:1]) == 1:
            contrast = "none"
        maps = self.engine.attribute(
            images, classes, contrast=contrast, normalize=self.normalize, batch_size=internal_batch_size
        ).maps.to(images)
        return (maps,) if isinstance(inputs, tuple) else maps

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


class LRP(_Method):
    """LRP with the interface of ``captum.attr.LRP``, for every model and rule of the engine.

    Maps add up to the explained logit but for what the rule leaves in biases and stabilizers, as captum's do.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier in eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``.
    rule, precision, strict
        As for :class:`ramp_fast.Engine`; a signed rule. By default captum's: epsilon with 1e-9 in every layer.
    **options
        Further arguments of :class:`ramp_fast.Engine`.

    Raises
    ------
    InputError
        Modules carry captum's rules (``module.rule``): name them as ``rules.Composite(..., by_name=...)``.
    UnsupportedModelError, ValueError, TypeError
        As :class:`ramp_fast.Engine`; the rule's maps are not relevance that is conserved.

    Examples
    --------
    >>> LRP(model, "epsilon-plus-flat").attribute(images, target=281).shape
    torch.Size([8, 3, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule | LayerRule = "lrp-epsilon:epsilon=1e-9",
        precision: str = "mixed",
        strict: bool = True,
        **options: Any,
    ) -> None:
        carrying = [name for name, module in model.named_modules() if getattr(module, "rule", None) is not None]
        if carrying:
            raise InputError(
                f"the modules {', '.join(carrying[:3])}{' and others' if len(carrying) > 3 else ''} carry rules in "
                "their attribute `rule`, which captum reads and the engine does not: pass them here, as "
                "rule=rules.Composite({...}, by_name={...}), and delete the attributes"
            )
        super().__init__(model, rule, precision, strict, **options)
        self.engine.rule.check_balance()

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]  # as above
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: int | tuple[int, ...] | list[int] | list[tuple[int, ...]] | Tensor | None = None,
        additional_forward_args: tuple[()] | None = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        *,
        internal_batch_size: int | None = None,
    ) -> Any:
        """Relevance maps.

        Parameters
        ----------
        inputs, target, additional_forward_args, internal_batch_size
            As for :meth:`AbsLRP.attribute`.
        return_convergence_delta : bool
            Also return what of the logit is missing in the sum of the map.
        verbose : bool
            Also print how much relevance every module has kept (``Attribution.conservation``).

        Returns
        -------
        Tensor or tuple of one Tensor
            Like ``inputs``: shape, dtype, device. With ``return_convergence_delta`` a tuple of that and ``[N]``.

        Raises
        ------
        InputError
            An argument is not as described.
        """
        images, classes = self._checked(inputs, target, additional_forward_args)
        found, explained = self._found(images, classes, internal_batch_size, verbose)
        maps = found.maps.to(images)
        result = (maps,) if isinstance(inputs, tuple) else maps
        if not return_convergence_delta:
            return result
        return result, self.compute_convergence_delta(maps, explained)

    def _found(
        self,
        images: Tensor,
        classes: int | Tensor,
        batch_size: int | None,
        verbose: bool,
        layers: Sequence[str] = (),
    ) -> tuple[Found, Tensor]:
        """What the engine finds, in the scale of the logits, and the logits that are explained ``[N]``."""
        found = self.engine.attribute(
            images, classes, "none", "none", batch_size=batch_size, layers=layers, check_conservation=verbose
        )
        if verbose:
            print(found.conservation)
        scores = found.logits
        if self.engine.plan.graph.ending:  # of a softmax, below which relevance starts
            scores = self.engine.logits_and_scores(images)[1]
        if isinstance(classes, int):
            return found, scores[:, classes]
        return found, scores.gather(1, classes.to(scores.device, torch.long).view(-1, 1)).squeeze(1)

    def has_convergence_delta(self) -> bool:
        """True."""
        return True

    def compute_convergence_delta(self, attributions: Tensor | tuple[Tensor, ...], output: Tensor) -> Tensor:
        """What of the explained logits ``output`` ``[N]`` is missing in the sums of ``attributions``, ``[N]``."""
        maps = attributions if isinstance(attributions, tuple) else (attributions,)
        sums = sum(m.flatten(1).sum(1, dtype=torch.float64) for m in maps)
        return (output.flatten() - sums).to(output.dtype)


class LayerLRP(LRP):
    """Relevance of inner layers, with the interface of ``captum.attr.LayerLRP``.

    Parameters
    ----------
    model, rule, precision, strict, **options
        As for :class:`LRP`.
    layer : torch.nn.Module or list of torch.nn.Module
        Modules of the model whose outputs' relevance is wanted.

    Raises
    ------
    InputError
        A layer is not a module of the model; as for :class:`LRP`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | Sequence[nn.Module],
        rule: str | Rule | LayerRule = "lrp-epsilon:epsilon=1e-9",
        precision: str = "mixed",
        strict: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, rule, precision, strict, **options)
        names = {id(module): name for name, module in model.named_modules() if name}
        self.layer = layer
        self._several = isinstance(layer, Sequence) and not isinstance(layer, nn.Module)
        wanted: list[Any] = list(layer) if self._several else [layer]  # type: ignore[arg-type]  # a sequence
        for module in wanted:
            if id(module) not in names:
                what = type(module).__name__ if isinstance(module, nn.Module) else repr(module)
                raise InputError(f"layer must be a module inside the model, or a list of them; {what} is none")
        self._names = [names[id(module)] for module in wanted]

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]  # as above
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: int | tuple[int, ...] | list[int] | list[tuple[int, ...]] | Tensor | None = None,
        additional_forward_args: tuple[()] | None = None,
        attribute_to_layer_input: bool = False,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        *,
        internal_batch_size: int | None = None,
    ) -> Any:
        """Relevance of the layers' outputs.

        Parameters
        ----------
        inputs, target, additional_forward_args, return_convergence_delta, verbose, internal_batch_size
            As for :meth:`LRP.attribute`; the delta is that of the layers.
        attribute_to_layer_input : False
            For captum's callers; the input of a layer is the output of the one before it: name that.

        Returns
        -------
        Tensor or list of Tensor
            In the shapes of the layers' outputs, with the images first, and the dtype of ``inputs``. With
            ``return_convergence_delta`` a tuple of that and ``[N]``, or a list of these.

        Raises
        ------
        InputError
            An argument is not as described; a module has no output of its own (:meth:`ramp_fast.Engine.attribute`).
        """
        if attribute_to_layer_input:
            raise InputError("attribute_to_layer_input: name the layer before it; its output is the input of this one")
        images, classes = self._checked(inputs, target, additional_forward_args)
        found, explained = self._found(images, classes, internal_batch_size, verbose, self._names)
        relevance = [found.layers[name].to(images) for name in self._names]
        deltas = [self.compute_convergence_delta(r, explained) for r in relevance]
        if not self._several:
            return (relevance[0], deltas[0]) if return_convergence_delta else relevance[0]
        return (relevance, deltas) if return_convergence_delta else relevance


def _classes(target: Any, count: int) -> int | Tensor:
    """Captum's ways to name classes in the engine's."""
    if isinstance(target, np.ndarray):
        try:
            target = torch.as_tensor(target.astype(np.int64) if target.dtype.kind in "iu" else target, device="cpu")
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
        return torch.tensor([_class(t) for t in target], dtype=torch.long, device="cpu")
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
