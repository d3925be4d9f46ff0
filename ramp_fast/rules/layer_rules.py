"""Rules for one linear layer ``z = W x + b``: how it hands the relevance of its outputs to its inputs.

Relevance is signed here, ``R = x c``. ``W+`` and ``W-`` are the positive and the negative entries of a weight, ``x+``
and ``x-`` those of an input; ``/`` is a division that gives 0 where the denominator is 0. Stabilizers have the sign of
what they are added to (plus for 0), as in zennit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ramp_fast._checks import flag, is_number
from ramp_fast.gemm import LinearOp, Packed
from ramp_fast.rules.base import selected


@dataclass(frozen=True)
class Layer:
    """A layer as its rule sees it when weights are packed.

    Attributes
    ----------
    weight : Tensor
        ``[out, in]``, or ``[out, in / groups, *kernel]`` of a convolution.
    bias : Tensor or None
        ``[out]``.
    groups : int
    positive : bool
        Whether inputs are never negative.
    product : callable
        From a weight and a bias (or None) to the function ``x -> W x + b``.
    transposed : callable
        From a weight to the function ``s -> W^T s``, of ``s`` ``[N, *output]``.
    sided : callable, optional
        From weights P and N and a bias (or None) to the function ``x -> P x+ + N x- + b``, where that is one step.
    sided_transposed : callable, optional
        From weights P and N to the function that gives ``P^T s`` where the input is positive and ``N^T s`` where it is
        negative; there is one where there is ``sided``.
    channels : int, optional
        Of the input; None where no axis is known to be that of channels.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int
    positive: bool
    product: Callable[[Tensor, Tensor | None], LinearOp]
    transposed: Callable[[Tensor], LinearOp]
    sided: Callable[[Tensor, Tensor, Tensor | None], LinearOp] | None = None
    sided_transposed: Callable[[Tensor, Tensor], Packed] | None = None
    channels: int | None = None

    def along_outputs(self, values: Tensor) -> Tensor:
        """``values`` ``[out]`` with axes for the pixels of a convolution."""
        return values.view(-1, *[1] * (self.weight.dim() - 2))


class LayerContext(ABC):
    """Relevance at the output of a layer, with the values of the layer.

    Attributes
    ----------
    wide : torch.dtype
        Of divisions: float32 at least.
    """

    wide: torch.dtype

    @property
    @abstractmethod
    def x(self) -> Tensor:
        """The input ``[B, *in]``."""

    @property
    @abstractmethod
    def z(self) -> Tensor:
        """The output ``[B, *out]``, with its bias."""

    @abstractmethod
    def coefficients(self) -> Tensor:
        """``c = R / z`` ``[maps, B, *out]``, in the dtype of the pull-back's products."""

    @abstractmethod
    def ratio(self, denominator: Tensor, stabilizer: float, side: int = 0) -> Tensor:
        """``R / (d + stabilizer sign(d))``, 0 where that divides by 0; with a side only where ``z`` is on it."""

    @property
    @abstractmethod
    def narrow_x(self) -> Tensor:
        """The input in the dtype of the pull-back's products."""

    @abstractmethod
    def product(self, function: LinearOp, x: Tensor) -> Tensor:
        """``W x + b``, in the dtype of the pull-back's products."""

    @abstractmethod
    def product_of_input(self, function: LinearOp) -> Tensor:
        """The same of the layer's input."""

    @abstractmethod
    def transposed(self, function: LinearOp, s: Tensor) -> Tensor:
        """``W^T s`` ``[maps, B, *in]`` for ``s`` ``[maps, B, *out]``."""

    @abstractmethod
    def sided(self, function: Packed, s: Tensor) -> Tensor:
        """The same with the weight that the sign of the input asks for, of what ``sided_transposed`` made."""


class LayerPullback(ABC):
    """The packed pull-back of one layer: called with :class:`LayerContext`, it returns ``[maps, B, *in]``.

    Attributes
    ----------
    kernel : str
        For ``print(engine.plan)``.
    functions : sequence
        What was packed.
    """

    kernel: str = ""

    def __init__(self, *functions: Packed) -> None:
        self.functions: tuple[Any, ...] = functions
        self.kernel = " ".join([functions[-1].kernel, self.kernel]).strip()

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.functions)

    @abstractmethod
    def __call__(self, at: LayerContext) -> Tensor: ...


@dataclass(frozen=True)
class LayerRule(ABC):
    """How a linear layer or convolution hands relevance to its inputs.

    Attributes
    ----------
    gives_relevance : bool
        What it gives its inputs is their relevance itself, not coefficients: for layers that read the images, whose
        rules do not multiply by the pixels.
    reads_input, reads_output : bool
        Whether its pull-back reads the layer's input, its output. Relevance of outputs is ``z c`` and reads them.
    multiplies_output : bool
        Whether nothing but relevance of the output counts, so that a ReLU behind the layer may be computed with it.
    """

    gives_relevance: ClassVar[bool] = False
    reads_input: ClassVar[bool] = True
    reads_output: ClassVar[bool] = True
    multiplies_output: ClassVar[bool] = False

    @abstractmethod
    def pack(self, layer: Layer) -> LayerPullback:
        """The pull-back of a layer."""


def _number(rule: LayerRule, setting: str, least: float = 0.0) -> None:
    value = getattr(rule, setting)
    if not is_number(value) or value < least:
        raise ValueError(f"{type(rule).__name__}: {setting} must be a number of at least {least:g}, got {value!r}")


@dataclass(frozen=True)
class Epsilon(LayerRule):
    """``R_i = sum_j x_i w_ij R_j / (z_j + epsilon sign(z_j))``, the bias with its share (Bach et al. 2015).

    Parameters
    ----------
    epsilon : float
        0 is LRP-0: then ``c_x = W^T c``, and nothing is divided.
    zero_bias : bool
        Leave the bias out of ``z``.
    """

    epsilon: float = 1e-6
    zero_bias: bool = False
    reads_input: ClassVar[bool] = False

    @property
    def reads_output(self) -> bool:  # type: ignore[override]  # not at epsilon 0
        """As of :class:`LayerRule`."""
        return self.epsilon > 0 or self.zero_bias

    def __post_init__(self) -> None:
        _number(self, "epsilon")
        flag("Epsilon", "zero_bias", self.zero_bias)

    def pack(self, layer: Layer) -> LayerPullback:
        back = layer.transposed(layer.weight)
        bias = layer.along_outputs(layer.bias) if self.zero_bias and layer.bias is not None else None
        return _Plain(back) if self.epsilon == 0 and bias is None else _Ratio(back, self.epsilon, bias)


class _Plain(LayerPullback):
    def __call__(self, at: LayerContext) -> Tensor:
        return at.transposed(self.functions[0], at.coefficients())


class _Ratio(LayerPullback):
    kernel = "ratio"

    def __init__(self, back: LinearOp, epsilon: float, bias: Tensor | None) -> None:
        super().__init__(back)
        self.epsilon, self.bias = epsilon, bias

    def __call__(self, at: LayerContext) -> Tensor:
        z = at.z if self.bias is None else at.z - self.bias.to(at.z)
        return at.transposed(self.functions[0], at.ratio(z, self.epsilon))


class _TwoSided(LayerRule):
    """Rules with one weight ``U`` for contributions on one side of zero, and one, ``L``, for the others.

    ``d_1 = U x+ + L x- + b_U`` and ``d_2 = L x+ + U x- + b_L``; with ``s_1``, ``s_2`` of :meth:`messages` inputs above
    zero have ``c = U^T s_1 + L^T s_2``, and those below ``c = L^T s_1 + U^T s_2``.
    """

    zero_bias: bool
    second: ClassVar[bool] = True
    multiplies_output: ClassVar[bool] = True

    @abstractmethod
    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``U`` and ``L`` of a weight, ``b_U`` and ``b_L`` of a bias."""

    @abstractmethod
    def messages(self, at: LayerContext, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        """``s_1`` and ``s_2`` from the relevance of the outputs and the denominators.

        Without ``second`` in the class there is no second denominator, and the first is given in its place.
        """

    def pack(self, layer: Layer) -> LayerPullback:
        one_step = layer.sided is not None and not layer.positive
        return _SidedPullback(self, layer) if one_step else _TwoSidedPullback(self, layer)


class _TwoSidedPullback(LayerPullback):
    """Of inputs that are never negative, or where nothing computes both sides in one step."""

    kernel = "ratio of parts"

    def __init__(self, rule: _TwoSided, layer: Layer) -> None:
        self.rule, self.positive = rule, layer.positive
        upper, lower, biases = _parts(rule, layer)
        # Of each denominator the product with x+, with the bias, and the one with x-.
        pairs = [((upper, biases[0]), (lower, None)), ((lower, biases[1]), (upper, None))]
        kept = 1 if self.positive else 2
        self.below = [[layer.product(*each) for each in pair[:kept]] for pair in pairs[: 2 if rule.second else 1]]
        self.up = layer.transposed(upper)
        self.down = None if self.positive and not rule.second else layer.transposed(lower)
        super().__init__(*[f for pair in self.below for f in pair], *[f for f in (self.down, self.up) if f is not None])

    def __call__(self, at: LayerContext) -> Tensor:
        below = []
        if self.positive:
            below = [at.product_of_input(function) for (function,) in self.below]
        else:
            x = at.narrow_x
            sides = [x.clamp_min(0), x.clamp_max(0)]
            for functions in self.below:
                first, second = (at.product(f, side) for f, side in zip(functions, sides, strict=True))
                below.append(first.to(at.wide) + second)
        one, two = self.rule.messages(at, below[0], below[-1])

        def pulled(first: LinearOp | None, second: LinearOp | None) -> Tensor:
            assert first is not None
            c = at.transposed(first, one)
            if two is not None:
                assert second is not None
                c = c + at.transposed(second, two)
            return c

        if self.positive:
            return pulled(self.up, self.down)
        return selected(pulled(self.up, self.down), pulled(self.down, self.up), at.narrow_x)


class _SidedPullback(LayerPullback):
    """Both sides in one step, forwards and back."""

    kernel = "ratio of parts"

    def __init__(self, rule: _TwoSided, layer: Layer) -> None:
        assert layer.sided is not None
        assert layer.sided_transposed is not None
        self.rule = rule
        upper, lower, biases = _parts(rule, layer)
        turns = [(upper, lower), (lower, upper)][: 2 if rule.second else 1]
        self.below = [layer.sided(*turn, bias) for turn, bias in zip(turns, biases, strict=False)]
        self.back = [layer.sided_transposed(*turn) for turn in turns]
        super().__init__(*self.below, *self.back)

    def __call__(self, at: LayerContext) -> Tensor:
        below = [at.product_of_input(function) for function in self.below]
        messages = [s for s in self.rule.messages(at, below[0], below[-1]) if s is not None]
        c, *others = (at.sided(back, s) for back, s in zip(self.back, messages, strict=True))
        return c + others[0] if others else c


def _parts(rule: _TwoSided, layer: Layer) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    upper, lower = rule.parts(layer.weight)
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if layer.bias is not None and not rule.zero_bias:
        biases = rule.parts(layer.bias)
    return upper, lower, biases


@dataclass(frozen=True)
class ZPlus(_TwoSided):
    """``R_i = sum_j (x_i w_ij)+ R_j / sum_i' (x_i' w_i'j)+`` (Montavon et al. 2017); inputs may have both signs.

    Parameters
    ----------
    stabilizer : float
        Added to the denominator.
    zero_bias : bool
        Leave the positive part of the bias out of the denominator.
    """

    stabilizer: float = 1e-6
    zero_bias: bool = False
    second: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _number(self, "stabilizer")
        flag("ZPlus", "zero_bias", self.zero_bias)

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.clamp_min(0), weight.clamp_max(0)

    def messages(self, at: LayerContext, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        return at.ratio(first, self.stabilizer), None


@dataclass(frozen=True)
class AlphaBeta(_TwoSided):
    """``alpha`` times the rule of positive contributions minus ``beta`` times that of negative ones (Bach et al. 2015).

    ``alpha - beta`` must be 1. ``stabilizer``, ``zero_bias``: as of :class:`ZPlus`, of both denominators.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6
    zero_bias: bool = False

    def __post_init__(self) -> None:
        for setting in ("alpha", "beta", "stabilizer"):
            _number(self, setting)
        flag("AlphaBeta", "zero_bias", self.zero_bias)
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(f"AlphaBeta: alpha - beta must be 1, got {self.alpha!r} - {self.beta!r}")

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.clamp_min(0), weight.clamp_max(0)

    def messages(self, at: LayerContext, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        one, two = (at.ratio(below, self.stabilizer) for below in (first, second))
        return self.alpha * one, -self.beta * two


@dataclass(frozen=True)
class Gamma(_TwoSided):
    """Contributions of the output's own sign count ``1 + gamma`` times.

    The rule of Montavon et al. 2019 for inputs that are not negative, generalised to both signs as in zennit (Andeol et
    al. 2021): with ``U = W + gamma W+`` and ``L = W + gamma W-``, outputs above zero divide by ``U x+ + L x-``, those
    below by ``L x+ + U x-``.

    Parameters
    ----------
    gamma : float
    stabilizer, zero_bias
        As of :class:`ZPlus`.
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6
    zero_bias: bool = False

    def __post_init__(self) -> None:
        for setting in ("gamma", "stabilizer"):
            _number(self, setting)
        flag("Gamma", "zero_bias", self.zero_bias)

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight + self.gamma * weight.clamp_min(0), weight + self.gamma * weight.clamp_max(0)

    def messages(self, at: LayerContext, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        return at.ratio(first, self.stabilizer, 1), at.ratio(second, self.stabilizer, -1)


@dataclass(frozen=True)
class SameSign(_TwoSided):
    """Only contributions of the output's own sign: ``R_i = sum_j (x_i w_ij)^s R_j / sum_i' (x_i' w_i'j)^s``.

    ``s`` is the sign of ``z_j``; the bias takes nothing. The limit of :class:`Gamma` for large gamma.
    """

    zero_bias: bool = True

    def __post_init__(self) -> None:
        flag("SameSign", "zero_bias", self.zero_bias)

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.clamp_min(0), weight.clamp_max(0)

    def messages(self, at: LayerContext, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        return at.ratio(first, 0.0, 1), at.ratio(second, 0.0, -1)


@dataclass(frozen=True)
class Flat(LayerRule):
    """``R_i = sum_j R_j / n_j``: all ``n_j`` inputs that an output reads get the same (Lapuschkin et al. 2019)."""

    stabilizer: float = 1e-6
    gives_relevance: ClassVar[bool] = True
    multiplies_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _number(self, "stabilizer")

    def pack(self, layer: Layer) -> LayerPullback:
        return _Constant(layer, torch.ones_like(layer.weight), None, self.stabilizer)


@dataclass(frozen=True)
class WSquare(LayerRule):
    """``R_i = sum_j w_ij^2 R_j / (sum_i' w_i'j^2 + b_j^2)`` (Montavon et al. 2017)."""

    stabilizer: float = 1e-6
    zero_bias: bool = False
    gives_relevance: ClassVar[bool] = True
    multiplies_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _number(self, "stabilizer")
        flag("WSquare", "zero_bias", self.zero_bias)

    def pack(self, layer: Layer) -> LayerPullback:
        bias = None if self.zero_bias or layer.bias is None else layer.along_outputs(layer.bias.square())
        return _Constant(layer, layer.weight.square(), bias, self.stabilizer)


class _Constant(LayerPullback):
    """With ones in the place of the inputs."""

    kernel = "constant shares"

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None, stabilizer: float) -> None:
        self.forward, self.back = layer.product(weight, None), layer.transposed(weight)
        self.bias, self.stabilizer = bias, stabilizer
        super().__init__(self.forward, self.back)

    def __call__(self, at: LayerContext) -> Tensor:
        below = at.product(self.forward, torch.ones_like(at.narrow_x[:1])).to(at.wide)
        below = below if self.bias is None else below + self.bias.to(below)
        everywhere = torch.empty_like(at.z).copy_(below)  # in the layout of z, so that no other one is copied
        return at.transposed(self.back, at.ratio(everywhere, self.stabilizer))


@dataclass(frozen=True)
class ZBox(LayerRule):
    """``x w - low w+ - high w-`` in the place of ``x w``, for inputs from ``low`` to ``high`` (Montavon et al. 2017).

    Parameters
    ----------
    low, high : float or sequence of float
        The least and the largest value of an input; one for all, or one per channel. Of preprocessed images these are
        ``(0 - mean) / std`` and ``(1 - mean) / std``.
    stabilizer : float
    """

    low: Any
    high: Any
    stabilizer: float = 1e-6
    gives_relevance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _number(self, "stabilizer")
        for setting in ("low", "high"):
            value = getattr(self, setting)
            values = value.flatten().tolist() if isinstance(value, Tensor) else value
            values = [values] if is_number(values) else values
            if not isinstance(values, (list, tuple)) or not values or not all(is_number(v) for v in values):
                raise ValueError(f"ZBox: {setting} must be a number, or one for every channel, got {value!r}")
            object.__setattr__(self, setting, tuple(float(v) for v in values))
        if 1 != len(self.low) != len(self.high) != 1:
            raise ValueError(f"ZBox: low has {len(self.low)} values and high {len(self.high)}; give one per channel")
        count = max(len(self.low), len(self.high))
        for low, high in zip(_repeated(self.low, count), _repeated(self.high, count), strict=True):
            if low > high:
                raise ValueError(f"ZBox: low must not be above high, got {low:g} and {high:g}")

    def pack(self, layer: Layer) -> LayerPullback:
        for setting in ("low", "high"):
            count = len(getattr(self, setting))
            if count not in (1, layer.channels):
                has = "no axis of channels" if layer.channels is None else f"{layer.channels} channels"
                raise ValueError(f"ZBox: {setting} has {count} values; the layer's input has {has}")
        return _Box(self, layer)


def _repeated(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    return values * count if len(values) == 1 else values


class _Box(LayerPullback):
    kernel = "box"

    def __init__(self, rule: ZBox, layer: Layer) -> None:
        self.stabilizer = rule.stabilizer
        weights = layer.weight, layer.weight.clamp_min(0), layer.weight.clamp_max(0)
        self.forward = [layer.product(w, None) for w in weights[1:]]
        self.back = [layer.transposed(w) for w in weights]
        wide = layer.weight
        self.bounds = [wide.new_tensor(v).view(-1, *[1] * (wide.dim() - 2)) for v in (rule.low, rule.high)]
        biases = (layer.bias.clamp_min(0), layer.bias.clamp_max(0)) if layer.bias is not None else ()
        self.biases = [layer.along_outputs(b) for b in biases]
        super().__init__(*self.forward, *self.back)

    def __call__(self, at: LayerContext) -> Tensor:
        x = at.x
        boxes = [bound.to(x).expand_as(x[:1]).contiguous() for bound in self.bounds]
        below = at.z.to(at.wide)
        for function, box in zip(self.forward, boxes, strict=True):
            below = below - at.product(function, box)
        for bias in self.biases:
            below = below - bias.to(below)
        s = at.ratio(below, self.stabilizer)
        own, positive, negative = (at.transposed(f, s) for f in self.back)
        return x * own - boxes[0] * positive - boxes[1] * negative
