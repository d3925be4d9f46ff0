"""zennit's Attributor, computed by the engine."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ramp_fast.engine import Engine
from ramp_fast.rules import AlphaBeta, Composite, Epsilon, Flat, Gamma, LayerRule, Rule, WSquare, ZBox, ZPlus, resolve

__all__ = ["Attributor", "rule_of"]

Output = Tensor | Callable[[Tensor], Tensor] | None


class Attributor:
    """``zennit.attribution.Gradient`` for classifiers of images: relevance of the input, by the engine.

    BatchNorm is folded and sums are LRP's own, as with zennit's canonizers; no canonizer is needed.

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``.
    composite : str, zennit composite, ramp_fast.rules.Rule or ramp_fast.rules.LayerRule
        A composite's name, zennit's ("epsilon_plus_flat") or the engine's ("lrp-gamma:gamma=0.1"), a rule, or an object
        of zennit's composites, which :func:`rule_of` reads.
    attr_output : Tensor or callable, optional
        Relevance of the logits ``[N, classes]``, or a function of the logits that computes it; by default the logits
        themselves.
    **options
        Of :class:`ramp_fast.Engine`: ``precision``, ``strict``, ...

    Raises
    ------
    ValueError
        A composite or rule that is not known; the message names what is missing.

    Examples
    --------
    >>> with Attributor(model, "epsilon_plus_flat") as attributor:
    ...     output, relevance = attributor(images, torch.eye(1000)[targets])
    """

    def __init__(self, model: nn.Module, composite: Any, attr_output: Output = None, **options: Any) -> None:
        self.model, self.composite, self.attr_output = model, composite, attr_output
        if isinstance(composite, str):
            rule: Rule = resolve(composite.replace("_", "-"))
        elif isinstance(composite, (Rule, LayerRule)):
            rule = resolve(composite)
        else:
            rule = rule_of(composite)
        self.engine = Engine(model, rule, **options)

    def __enter__(self) -> Attributor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, input: Tensor, attr_output: Output = None) -> tuple[Tensor, Tensor]:
        """Logits ``[N, classes]`` and relevance like ``input``.

        Parameters
        ----------
        input : Tensor [N, C, H, W]
        attr_output : Tensor [N, classes] or callable, optional
            In place of the one that the attributor was made with.

        Raises
        ------
        InputError
            As :meth:`ramp_fast.Engine.attribute`.
        """
        wanted = self.attr_output if attr_output is None else attr_output

        gradient = not getattr(self.engine.rule, "times_input", True)

        def seed(logits: Tensor, relevance: Tensor) -> Tensor:
            """Coefficients of logits with this relevance; of gradients the seed itself."""
            relevance = relevance.to(logits).expand(logits.shape)
            return relevance if gradient else (relevance / logits).masked_fill(logits == 0, 0.0)

        images = input.detach()
        if callable(wanted):
            function = wanted
            found = self.engine.attribute(images, lambda logits: seed(logits, function(logits)), "none", "none")
        elif wanted is None:
            found = self.engine.attribute(images, lambda logits: seed(logits, logits), "none", "none")
        else:
            # One row for every image, of which the engine takes a few at a time: seeds for all of them.
            given = seed(self.engine.logits(images), wanted.detach())
            found = self.engine.attribute(images, given, "none", "none")
        return found.logits, found.maps


def rule_of(composite: Any) -> Composite:
    """The rule that a composite of zennit describes.

    Parameters
    ----------
    composite : zennit.core.Composite
        Of the classes of ``zennit.composites``; hooks of ``zennit.rules``.

    Raises
    ------
    ValueError
        It has hooks that are not known here, or maps modules in a way of its own.
    """
    from zennit import composites, layer

    parts = list(_flattened(composite))
    by_name: dict[str, LayerRule] = {}
    layers: dict[str, LayerRule] = {}
    first: dict[str, LayerRule] = {}
    activations, stabilizer, beta = "pass", 0.0, 10.0
    for part in parts:
        if isinstance(part, composites.NameMapComposite):
            by_name |= {name: _layer_rule(hook) for names, hook in part.name_map for name in names}
            continue
        for kind, module in (("conv", nn.Conv2d), ("linear", nn.Linear)):
            own = _hook(part.layer_map, module)
            if own is not None:
                layers.setdefault(kind, _layer_rule(own))
            special = _hook(getattr(part, "first_map", ()), module)
            if special is not None:
                first.setdefault(kind, _layer_rule(special))
        changed = {"ReLUGuidedBackprop": "guided", "ReLUDeconvNet": "deconvnet", "ReLUBetaSmooth": "smooth"}
        hook = _hook(part.layer_map, nn.ReLU)
        relu = type(hook).__name__
        beta = float(getattr(hook, "beta_smooth", beta))
        activations = changed.get(relu, activations)
        if relu not in (*changed, "Pass", "NoneType"):
            raise ValueError(f"zennit's {relu} has no counterpart here; known for ReLUs: Pass, {', '.join(changed)}")
        total = _hook(part.layer_map, layer.Sum)
        stabilizer = _stabilizer(total) if total is not None else stabilizer
    gradient = activations != "pass"
    plain = {kind: Epsilon(0.0) for kind in ("conv", "linear")}
    if not composite.canonizers:
        warnings.warn(
            "this composite has no canonizers, with which zennit leaves BatchNorm apart and sums to autograd; the "
            "engine folds BatchNorm and shares sums, as with zennit's canonizers for the model",
            stacklevel=2,
        )
    return Composite(
        plain | layers,
        by_name=by_name,
        first=first,
        activations=activations,
        stabilizer=stabilizer,
        times_input=not gradient,
        beta_smooth=beta,
        label=type(composite).__name__,
    )


def _flattened(composite: Any) -> Iterator[Any]:
    from zennit import composites

    if isinstance(composite, composites.MixedComposite):
        for part in composite.composites:
            yield from _flattened(part)
    elif isinstance(composite, (composites.LayerMapComposite, composites.NameMapComposite)):
        yield composite
    else:
        raise ValueError(
            f"{type(composite).__name__} maps modules in a way of its own; known are zennit's LayerMapComposite, "
            "SpecialFirstLayerMapComposite, NameMapComposite and MixedComposite, or use ramp_fast.rules.Composite"
        )


def _hook(layer_map: Any, module: type) -> Any:
    return next((hook for types, hook in layer_map if issubclass(module, types)), None)


def _layer_rule(hook: Any) -> LayerRule:
    """The rule for layers of one of zennit's hooks, whose settings are in its functions."""
    name = type(hook).__name__
    if name == "Epsilon":
        return Epsilon(_stabilizer(hook), _zero_bias(hook))
    if name == "ZPlus":
        return ZPlus(_stabilizer(hook), _zero_bias(hook))
    if name == "AlphaBeta":
        known = inspect.getclosurevars(hook.reducer).nonlocals
        return AlphaBeta(float(known["alpha"]), float(known["beta"]), _stabilizer(hook), _zero_bias(hook))
    if name == "Gamma":
        gamma = inspect.getclosurevars(hook.param_modifiers[0].modifier).nonlocals["gamma"]
        return Gamma(float(gamma), _stabilizer(hook), _zero_bias(hook))
    if name == "Flat":
        return Flat(_stabilizer(hook))
    if name == "WSquare":
        return WSquare(_stabilizer(hook), _zero_bias(hook))
    if name == "ZBox":
        bounds = [inspect.getclosurevars(f).nonlocals for f in hook.input_modifiers[1:]]
        return ZBox(_bound(bounds[0]["low"]), _bound(bounds[1]["high"]), _stabilizer(hook))
    raise ValueError(
        f"zennit's {name} has no counterpart here; known: Epsilon, ZPlus, AlphaBeta, Gamma, Flat, WSquare, ZBox"
    )


def _bound(value: Any) -> Any:
    """One number, or one for every channel, of a tensor ``[1, C, ...]``."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.dim() < 2:
        return value.flatten().tolist()
    channels = value.movedim(1, 0).flatten(1)
    if not bool((channels == channels[:, :1]).all()):
        raise ValueError("ZBox: low and high must be numbers, or one number for every channel")
    return channels[:, 0].tolist()


def _stabilizer(hook: Any) -> float:
    stabilizer = inspect.getclosurevars(hook.gradient_mapper).nonlocals["stabilizer_fn"]
    if getattr(stabilizer, "clip", False) or getattr(stabilizer, "norm_scale", False):
        raise ValueError("zennit's Stabilizer with clip or norm_scale has no counterpart here; pass a number")
    try:
        return float(stabilizer.epsilon)
    except AttributeError:
        raise ValueError("a function as stabilizer has no counterpart here; pass a number") from None


def _zero_bias(hook: Any) -> bool:
    zero = hook.param_modifiers[0].zero_params or ()
    names = [zero] if isinstance(zero, str) else list(zero)
    if set(names) - {"bias"}:
        raise ValueError(f"zero_params other than 'bias' have no counterpart here, got {names}")
    return bool(names)
