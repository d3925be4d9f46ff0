"""Composites: signed rules that give every layer a rule by its kind, its name or its place, as zennit's do."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ramp_fast import graph as g
from ramp_fast._checks import flag, is_number, nearest, one_of
from ramp_fast.errors import InputError
from ramp_fast.gemm import Precision
from ramp_fast.graph import Graph, Node
from ramp_fast.rules.base import Fusion
from ramp_fast.rules.layer_rules import Epsilon, LayerRule
from ramp_fast.rules.signed import Signed, layer_kind

_KINDS = ("linear", "conv")
_EPSILON = Epsilon()


@dataclass(frozen=True, repr=False)
class Composite(Signed):
    """A signed rule put together from rules for layers.

    Activations hand on the relevance of their output; of sums every operand has the relevance of its own part; norms
    have a constant deviation; of products every factor has half (docs/signed-rules.md). BatchNorm is folded into the
    layer before it, and is a layer ``c_x = g c`` where there is none.

    Parameters
    ----------
    layers : LayerRule or mapping
        The rule of all layers, or of kinds of layers: ``{"conv": ZPlus(), "linear": Epsilon()}``. What is not named
        follows ``Epsilon()``.
    by_name : mapping, optional
        Rules by the name of the module, as in ``model.named_modules()``, or a pattern such as ``"layer4.*"``. The first
        that fits goes before everything else; one that fits no layer is an error when the model is known.
    first : LayerRule or mapping, optional
        The rule of layers that read the images with no other layer between; of kinds of layers, as for ``layers``.
    activations : {"pass", "gradient", "guided", "deconvnet", "smooth"}
        All but "pass": activations, norms, products and attention have their gradient. "guided", "deconvnet", "smooth":
        ReLUs have that of guided backpropagation, of DeconvNet, and ``sigmoid(beta_smooth x)``.
    attention : {"all", "values"}
        Half of the relevance of attention goes to the values, and a quarter each to queries and keys; or all of it to
        the values.
    residual_gamma : float
        In sums of two tensors an operand with the sign of the sum counts ``1 + gamma`` times.
    stabilizer : float
        Sums of two tensors and average pools hand on ``c z / (z + stabilizer sign(z))``, as zennit's do.
    times_input : bool
        Maps are coefficients times pixels; with False the coefficients alone, as of guided backpropagation.
    fold_batchnorm : bool
        Fold BatchNorm into the layer before it.
    label : str
        The rule's name in tables.
    beta_smooth : float
        Of smooth activations; larger is nearer to the gradient.

    Raises
    ------
    ValueError
        Unknown kinds or settings.

    Examples
    --------
    >>> rule = Composite({"conv": Gamma(0.25), "linear": Epsilon()}, by_name={"fc": Epsilon(0.1)}, first=Flat())
    >>> Engine(model, rule)
    """

    layers: Any = _EPSILON
    by_name: Any = ()
    first: Any = ()
    activations: str = "pass"
    attention: str = "all"
    residual_gamma: float = 0.0
    stabilizer: float = 0.0
    times_input: bool = True
    fold_batchnorm: bool = True
    label: str = ""
    beta_smooth: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _by_kind("layers", self.layers))
        object.__setattr__(self, "first", _by_kind("first", self.first))
        object.__setattr__(self, "by_name", _pairs("by_name", self.by_name))
        one_of("activations", self.activations, ("pass", "gradient", "guided", "deconvnet", "smooth"))
        one_of("attention", self.attention, ("all", "values"))
        if not isinstance(self.label, str):
            raise TypeError(f"Composite: label must be text, got {type(self.label).__name__}")
        flag("Composite", "times_input", self.times_input)
        flag("Composite", "fold_batchnorm", self.fold_batchnorm)
        for setting in ("residual_gamma", "stabilizer"):
            value = getattr(self, setting)
            if not is_number(value) or value < 0:
                raise ValueError(f"Composite: {setting} must be a number that is not negative, got {value!r}")
        if not is_number(self.beta_smooth) or self.beta_smooth <= 0:
            raise ValueError(f"Composite: beta_smooth must be a positive number, got {self.beta_smooth!r}")

    @property
    def name(self) -> str:
        """The label, or the options."""
        return self.label or repr(self)

    @property
    def divides_nowhere(self) -> bool:  # type: ignore[override]  # as the layers' rules are
        """As of :class:`ramp_fast.rules.signed.Signed`."""
        given = dict(self.layers)
        own = [*given.values(), *(rule for _, rule in (*self.by_name, *self.first))]
        return set(given) == set(_KINDS) and all(rule == Epsilon(0.0) for rule in own)

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain = {name: field.default for name, field in self.__dataclass_fields__.items()}
        plain["layers"] = _by_kind("layers", plain["layers"])
        options = [
            f"{name}={dict(value) if isinstance(value, tuple) else value!r}"
            for name, value in given.items()
            if value != plain[name]
        ]
        return f"Composite({', '.join(options)})"

    def fuse(self, graph: Graph, precision: Precision) -> Mapping[Node, Fusion]:
        """As :meth:`ramp_fast.rules.Rule.fuse`.

        Raises
        ------
        InputError
            A name of ``by_name`` fits no layer.
        """
        modules = sorted({node.module for node in graph.nodes if layer_kind(node) is not None})
        patterns = [f"{'.'.join(m.split('.')[:depth])}.*" for m in modules for depth in range(1, m.count(".") + 1)]
        for pattern, rule in self.by_name:
            if not fnmatch.filter(modules, pattern):
                some = ", ".join(modules[:5]) + (", ..." if len(modules) > 5 else "")
                raise InputError(
                    f"by_name: {pattern!r}, for {rule}, fits no linear layer or convolution of this model"
                    f"{nearest(pattern, modules + patterns)}; there are {some}"
                )
        return super().fuse(graph, precision)

    def layer_rule(self, node: Node, first: bool) -> LayerRule:
        """As :meth:`ramp_fast.rules.signed.Signed.layer_rule`."""
        kind = "linear" if layer_kind(node) == g.LINEAR else "conv"
        named = (rule for pattern, rule in self.by_name if fnmatch.fnmatchcase(node.module, pattern))
        found: LayerRule | None = next(named, None)
        if found is None and first:
            found = dict(self.first).get(kind)
        return found or dict(self.layers).get(kind, Epsilon())


def _by_kind(name: str, value: Any) -> tuple[tuple[str, LayerRule], ...]:
    """``{"conv": ..., "linear": ...}`` as pairs."""
    if value is None:
        return ()
    if isinstance(value, LayerRule):
        return tuple((kind, value) for kind in _KINDS)
    pairs = _pairs(name, value)
    for kind, _ in pairs:
        if kind not in _KINDS:
            raise ValueError(f"{name}: {kind!r} is no kind of layer{nearest(kind, _KINDS)}; kinds are {_KINDS}")
    return pairs


def _pairs(name: str, value: Any) -> tuple[tuple[str, LayerRule], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(
        isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) and isinstance(p[1], LayerRule) for p in pairs
    ):
        raise ValueError(f"{name} must map names to rules for layers, such as Epsilon(); got {value!r}")
    return pairs
