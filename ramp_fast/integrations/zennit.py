"""zennit's Attributor, computed by the engine."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ramp_fast import graph as g
from ramp_fast.engine import Engine
from ramp_fast.errors import InputError, UnsupportedModelError
from ramp_fast.gemm import Precision
from ramp_fast.graph import Node
from ramp_fast.rules import AlphaBeta, Composite, Epsilon, Flat, Gamma, LayerRule, Rule, WSquare, ZBox, ZPlus, resolve
from ramp_fast.rules.base import Fusion, Operation
from ramp_fast.rules.signed import PassOn

__all__ = ["Attributor", "rule_of"]

Output = Tensor | Callable[[Tensor], Tensor] | None


class Attributor:
    """``zennit.attribution.Gradient`` for classifiers of images: relevance of the input, by the engine.

    BatchNorm is folded and sums are LRP's own, as with zennit's canonizers; no canonizer is needed.

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode, ``[N, C, H, W]`` to logits ``[N, classes]``.
    composite : str, zennit composite, ramp_fast.rules.Rule, ramp_fast.rules.LayerRule or None
        A composite's name, zennit's ("epsilon_plus_flat") or the engine's ("lrp-gamma:gamma=0.1"), a rule, or an object
        of zennit's composites, which :func:`rule_of` reads; None is the gradient.
    attr_output : Tensor or callable, optional
        Relevance of the logits ``[N, classes]``, or a function of the logits of all images that computes it; by default
        the logits themselves. Of a model that ends in softmax or log_softmax these are the scores below it.
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
            rule = rule_of(composite, model)
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
            As :meth:`ramp_fast.Engine.attribute`; ``attr_output`` is, or returns, no Tensor ``[N, classes]``.
        """
        wanted = self.attr_output if attr_output is None else attr_output
        if wanted is not None and not callable(wanted):
            _checked(wanted, None)
        images = input.detach() if isinstance(input, Tensor) else input
        if wanted is None:
            found = self.engine.attribute(images, lambda scores: self._seed(scores, scores), "none", "none")
            return found.logits, found.maps
        # The relevance of an image may depend on those beside it, of which the engine takes a few at a time.
        _, scores = self.engine.logits_and_scores(images)
        relevance = wanted(scores.clone()) if callable(wanted) else wanted.detach()
        seed = self._seed(scores, _checked(relevance, scores))
        found = self.engine.attribute(images, seed, "none", "none")
        return found.logits, found.maps

    def _seed(self, scores: Tensor, relevance: Tensor) -> Tensor:
        """The engine's seed for logits with this relevance; of gradients it is the gradient of the logits."""
        rule = self.engine.rule
        if rule.seeds_are_coefficients and getattr(rule, "times_input", True):
            return (relevance / scores).masked_fill(scores == 0, 0.0)
        return relevance


def _checked(relevance: Any, scores: Tensor | None) -> Tensor:
    """Relevance of the logits, in their shape, dtype and device; of what is no Tensor an error."""
    if not isinstance(relevance, Tensor):
        raise InputError(
            "attr_output must be a Tensor [N, classes], or a function that makes one of the logits; "
            f"got {type(relevance).__name__}"
        )
    if scores is None:
        return relevance
    try:
        return relevance.to(scores).expand(scores.shape)
    except RuntimeError:
        raise InputError(
            f"attr_output must be a Tensor {list(scores.shape)}, as the logits are; got {list(relevance.shape)}"
        ) from None


@dataclass(frozen=True, repr=False)
class _Mapped(Composite):
    """A composite of zennit for one model, whose modules have hooks.

    Parameters
    ----------
    modules : tuple of (str, object)
        By the name of a module its rule for layers, the stabilizer of a sum or pool, "pass" of a BatchNorm that hands
        on the relevance of its output, or why it is refused. Operations of modules that are not named are called as
        functions, where zennit has no hooks.
    pools : float
        Stabilizer of pools that are called as functions.
    """

    modules: Any = ()
    pools: float = 0.0

    @cached_property
    def _by_module(self) -> dict[str, Any]:
        return dict(self.modules)

    def layer_rule(self, node: Node, first: bool) -> LayerRule:
        """As :meth:`ramp_fast.rules.signed.Signed.layer_rule`."""
        found = self._by_module.get(node.module)
        if isinstance(found, _Refused):
            raise UnsupportedModelError(f"{self.name}: {found.why}")
        return found if isinstance(found, LayerRule) else Epsilon(0.0)

    def stabilizer_of(self, node: Node) -> float:
        """As :meth:`ramp_fast.rules.signed.Signed.stabilizer_of`."""
        found = self._by_module.get(node.module)
        if isinstance(found, float):
            return found
        return self.pools if node.kind == g.LINEAR_POOL else self.stabilizer

    def operation(self, node: Node, precision: Precision, fusion: Fusion) -> Operation:
        """As :meth:`ramp_fast.rules.Rule.operation`."""
        found = self._by_module.get(node.module)
        if isinstance(found, _Refused) and node.kind in _HOOKED:
            raise UnsupportedModelError(f"{self.name}: {found.why}")
        if found == _PASS and node.kind == g.BATCH_NORM:
            return PassOn(node, precision, fusion, self)
        return super().operation(node, precision, fusion)


@dataclass(frozen=True)
class _Refused:
    """Why a module is refused, if the model calls it."""

    why: str


_PASS = "pass"
# What a module that has a hook, or should have one, computes.
_HOOKED = frozenset({g.ACTIVATION, g.GENERIC, g.LINEAR_POOL, g.BATCH_NORM})

_CHANGED = {"ReLUGuidedBackprop": "guided", "ReLUDeconvNet": "deconvnet", "ReLUBetaSmooth": "smooth"}


def rule_of(composite: Any, model: nn.Module) -> Composite:
    """The rule that a composite of zennit describes for a model: every module has the hook that zennit would give it.

    Parameters
    ----------
    composite : zennit.core.Composite or None
        Hooks of ``zennit.rules``. None, and one without hooks, is the gradient.
    model : torch.nn.Module
        Not changed: canonizers are not applied.

    Raises
    ------
    ValueError
        The composite gives a module a hook that is not known here, or mixes gradients and rules for layers.
    UnsupportedModelError
        By :class:`ramp_fast.Engine`: zennit would hand relevance through a layer, an average pool, an activation or a
        BatchNorm by its gradient.
    """
    from zennit import core, layer, types

    if composite is not None and not isinstance(composite, core.Composite):
        raise ValueError(
            f"composite must be a name, a composite of zennit, a rule, or None for the gradient; got "
            f"{type(composite).__name__}"
        )
    context: dict[Any, Any] = {}
    mapping = (lambda *_: None) if composite is None else composite.module_map
    hooks = [(name, module, mapping(context, name, module)) for name, module in model.named_modules()]
    # Those of the modules that canonizers put in the place of sums, and of pools that are functions.
    total, pool = (mapping(context, "", module) for module in (layer.Sum(), nn.AdaptiveAvgPool2d(1)))
    label = "gradient" if composite is None else type(composite).__name__
    changed = {_name(hook) for _, module, hook in hooks if isinstance(module, nn.ReLU)} & set(_CHANGED)
    given = any(hook is not None and _name(hook) not in _CHANGED for _, _, hook in hooks)
    if changed or not given:
        return _gradient(hooks, changed, label)
    rulings: dict[int, Any] = {}
    for name, module, hook in hooks:
        what, found = f"{name or 'the model'} ({type(module).__name__})", _name(hook)
        unmapped = _Refused(
            f"the composite gives no rule to {what}, through which zennit hands relevance by the gradient; map its "
            + "type "
            + ("to Norm()" if isinstance(module, types.AvgPool) else "to Pass()")
        )
        if isinstance(module, types.Linear):
            none = _Refused(unmapped.why.replace("to Pass()", "to a rule for layers, such as Epsilon()"))
            rulings[id(module)] = none if hook is None else _layer_rule(hook)
        elif isinstance(module, (types.AvgPool, layer.Sum)):
            rulings[id(module)] = unmapped if hook is None else _norm(hook, what)
        elif isinstance(module, types.BatchNorm):
            _known(hook, what, "Pass")
            rulings[id(module)] = unmapped if hook is None else _PASS
        elif isinstance(module, types.Activation):
            _known(hook, what if not isinstance(module, nn.ReLU) else "ReLUs", "Pass", *_CHANGED)
            if hook is None and not isinstance(module, (nn.ReLU, nn.MultiheadAttention)):
                rulings[id(module)] = unmapped
        elif hook is not None and not (found == "Pass" and isinstance(module, (nn.Identity, nn.Dropout))):
            raise ValueError(f"zennit's {found} for {what} has no counterpart here")
    modules = {
        name: rulings[id(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in rulings
    }
    _warn_of_norms(composite, model)
    return _Mapped(
        stabilizer=0.0 if total is None else _norm(total, "sums"),
        label=label,
        modules=tuple(modules.items()),
        pools=0.0 if pool is None else _norm(pool, "average pools"),
    )


def _gradient(hooks: list[tuple[str, nn.Module, Any]], changed: set[str], label: str) -> Composite:
    """The rule of gradients, with the ReLUs of a composite that changes them."""
    for name, module, hook in hooks:
        if hook is not None and not (isinstance(module, nn.ReLU) and _name(hook) in changed):
            raise ValueError(
                f"the composite changes gradients of ReLUs ({', '.join(sorted(changed))}) and has {_name(hook)} for "
                f"{name or 'the model'} ({type(module).__name__}): gradients with rules have no counterpart here"
            )
    own = {(_name(hook), getattr(hook, "beta_smooth", None)) for _, m, hook in hooks if isinstance(m, nn.ReLU)}
    if len(own) > 1:
        raise ValueError(f"the composite has several rules for ReLUs, {sorted(n for n, _ in own)}; one is known here")
    ((name, beta),) = own or {("", None)}
    return Composite(
        Epsilon(0.0),
        activations=_CHANGED.get(name, "gradient"),
        times_input=False,
        beta_smooth=10.0 if beta is None else float(beta),
        label=label,
    )


def _warn_of_norms(composite: Any, model: nn.Module) -> None:
    """Of BatchNorms that the composite's canonizers leave apart, and of a composite without canonizers."""
    from zennit import canonizers, core, types

    if not composite.canonizers:
        warnings.warn(
            "this composite has no canonizers, with which zennit leaves BatchNorm apart and sums to autograd; the "
            "engine folds BatchNorm and shares sums, as with zennit's canonizers for the model",
            stacklevel=4,
        )
        return
    merged: set[int] = set()
    for canonizer in _canonizers(composite.canonizers):
        if isinstance(canonizer, canonizers.NamedMergeBatchNorm):
            merged |= {id(model.get_submodule(norm)) for _, norm in canonizer.name_map}
        elif isinstance(canonizer, canonizers.SequentialMergeBatchNorm):
            leaves = list(core.collect_leaves(model))
            pairs = itertools.pairwise(leaves)
            merged |= {id(b) for a, b in pairs if isinstance(a, types.Linear) and isinstance(b, types.BatchNorm)}
    apart = [n for n, m in model.named_modules() if isinstance(m, types.BatchNorm) and id(m) not in merged]
    if apart:
        warnings.warn(
            f"the composite's canonizers do not merge the BatchNorms {', '.join(apart[:3])}"
            f"{', ...' if len(apart) > 3 else ''}; the engine folds every one that is behind a layer",
            stacklevel=4,
        )


def _canonizers(given: Any) -> Iterator[Any]:
    from zennit.canonizers import CompositeCanonizer

    for canonizer in given:
        if isinstance(canonizer, CompositeCanonizer):
            yield from _canonizers(canonizer.canonizers)
        else:
            yield canonizer


def _name(hook: Any) -> str:
    """The name of one of zennit's hooks; of a class of somebody else with its module."""
    from zennit import rules

    kind = type(hook)
    return kind.__name__ if getattr(rules, kind.__name__, None) is kind else f"{kind.__module__}.{kind.__name__}"


def _known(hook: Any, what: str, *names: str) -> None:
    if hook is not None and _name(hook) not in names:
        raise ValueError(f"zennit's {_name(hook)} has no counterpart here; known for {what}: {', '.join(names)}")


def _norm(hook: Any, what: str) -> float:
    """The stabilizer of a sum or an average pool."""
    _known(hook, what, "Norm", "Epsilon")
    return _stabilizer(hook)


def _layer_rule(hook: Any) -> LayerRule:
    """The rule for layers of one of zennit's hooks, whose settings are in its functions."""
    name = _name(hook)
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
    if value.numel() == 1:
        return float(value)
    if value.dim() < 2:
        raise ValueError(
            f"ZBox: low and high of several channels must be Tensors [1, C, 1, 1], got {list(value.shape)}, whose "
            "entries zennit takes for images"
        )
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
