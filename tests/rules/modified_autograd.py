"""Signed rules by autograd: a model runs as it is, with functions of torch whose gradients are those of a rule.

Independent of the engine, which sees a captured graph: here calls are changed one by one while the model's code runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# From a layer as (function of weight and bias, x, weight, bias) to its output.
LayerOracle = Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor | None], Tensor]

_NAMES = "relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "elu", "mish"
ACTIVATIONS = frozenset(name + end for name in _NAMES for end in ("", "_"))


def with_gradient(value: Tensor, of: Tensor) -> Tensor:
    """``value``, whose gradient is that of ``of``."""
    return value.detach() + (of - of.detach())


def part(x: Tensor, share: float) -> Tensor:
    """``x`` with ``share`` of its gradient."""
    return with_gradient(x, share * x)


def stabilized(z: Tensor, eps: float) -> Tensor:
    return z + eps * ((z >= 0).to(z.dtype) * 2 - 1)  # of a number torch.where makes float32


def ratio(a: Tensor, b: Tensor) -> Tensor:
    return (a / b).masked_fill(b == 0, 0.0)


class Modified(TorchFunctionMode):
    """Calls of torch with the gradients of a signed rule."""

    def __init__(
        self,
        layer: LayerOracle | None = None,
        *,
        first: LayerOracle | None = None,
        windows: LayerOracle | None = None,
        values_only: bool = False,
        residual_gamma: float = 0.0,
        constants_take_nothing: bool = False,
    ) -> None:
        super().__init__()
        self.first, self.constants_take_nothing = first, constants_take_nothing
        self.windows = windows  # of convolutions of more than one pixel
        self.in_stem = True  # behind the first layer, and before a norm
        self.layer, self.values_only, self.residual_gamma = layer, values_only, residual_gamma
        self.layers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        handler = getattr(self, f"_{name.strip('_')}", None)
        if name in ACTIVATIONS:
            return self._activation(func, *args, **kwargs)
        if name in ("matmul", "__matmul__", "bmm", "mul", "__mul__", "__rmul__", "einsum"):
            return self._product(func, *args, **kwargs)
        if name in ("add", "__add__", "__radd__", "add_", "__iadd__"):
            return self._sum(func, *args, **kwargs)
        if name in ("div", "__truediv__", "divide") and _carries(args[1]):
            return func(args[0], args[1].detach())
        if name in ("linear", "conv2d"):
            return self._layer(func, *args, **kwargs)
        self.in_stem &= not name.endswith("_norm")
        if name in ("layer_norm", "rms_norm", "group_norm", "scaled_dot_product_attention", "softmax"):
            return handler(func, *args, **kwargs)  # type: ignore[misc]
        return func(*args, **kwargs)

    def _activation(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("inplace", None)
        y = func(x.clone(), *args, **kwargs)
        return with_gradient(y, x * ratio(y, x).detach())

    def _product(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        if sum(_carries(a) for a in args) == 2:
            args = tuple(part(a, 0.5) if _carries(a) else a for a in args)
        return func(*args, **kwargs)

    def _sum(self, func: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not (_carries(a) and _carries(b)) or not self.residual_gamma:
            own = a if _carries(a) else b
            if self.constants_take_nothing and self.in_stem and _carries(a) != _carries(b):
                z = func(a, b, *args, **kwargs).detach()
                return with_gradient(z, own * ratio(z, own.detach()))
            return func(a, b, *args, **kwargs)
        z = (a + b).detach()
        weights = [1 + self.residual_gamma * (t.detach() * z > 0) for t in (a, b)]
        share = ratio(z, weights[0] * a.detach() + weights[1] * b.detach())
        return with_gradient(z, weights[0] * share * a + weights[1] * share * b)

    def _layer(
        self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.layers += 1
        layer = self.layer
        if self.first is not None and self.layers == 1:
            layer = self.first
        elif self.windows is not None and weight[0, 0].numel() > 1:
            layer = self.windows
        if layer is None or not _carries(x):
            return func(x, weight, bias, *args, **kwargs)
        return layer(lambda u, w, b: func(u, w, b, *args, **kwargs), x, weight, bias)

    def _layer_norm(
        self, func: Any, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        axes = tuple(range(-len(shape), 0))
        centred = x - x.mean(axes, keepdim=True)
        sigma = (centred.square().mean(axes, keepdim=True) + eps).sqrt().detach()
        return _affine(centred / sigma, weight, bias)

    def _rms_norm(self, func: Any, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        axes = tuple(range(-len(shape), 0))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return _affine(x / (x.square().mean(axes, keepdim=True) + eps).sqrt().detach(), weight, None)

    def _group_norm(
        self, func: Any, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        rows = x.unflatten(1, (groups, -1)).flatten(2)
        centred = rows - rows.mean(-1, keepdim=True)
        sigma = (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach()
        shape = (-1, *[1] * (x.dim() - 2))
        views = [None if t is None else t.view(shape) for t in (weight, bias)]
        return _affine((centred / sigma).reshape(x.shape), *views)

    def _softmax(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = func(x, *args, **kwargs)
        return y.detach() if self.values_only else y

    def _scaled_dot_product_attention(
        self, func: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.values_only:
            return func(q.detach(), k.detach(), v, *args, **kwargs)
        return func(part(q, 0.25), part(k, 0.25), part(v, 0.5), *args, **kwargs)


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def relevance(model: nn.Module, x: Tensor, seed: Tensor | int, mode: Modified) -> Tensor:
    """``x`` times the modified gradient of the logits, weighted by ``seed`` ``[B, classes]`` or of one class."""
    before = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        x = x.clone().requires_grad_()
        with mode:
            logits = model(x)
        total = logits[:, seed].sum() if isinstance(seed, int) else (logits * seed).sum()
        (gradient,) = torch.autograd.grad(total, x)
    finally:
        for p, flag in zip(model.parameters(), before, strict=True):
            p.requires_grad_(flag)
    return x.detach() * gradient


def folded(model: nn.Module) -> nn.Module:
    """BatchNorm merged into the convolution that stands before it in its module."""
    for parent in model.modules():
        children = list(parent.children())
        for conv, norm in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                gain = (norm.running_var + norm.eps).rsqrt() * norm.weight.detach()
                shift = norm.bias.detach() - norm.running_mean * gain
                conv.weight = nn.Parameter(conv.weight.detach() * gain.view(-1, 1, 1, 1))
                conv.bias = nn.Parameter(shift if conv.bias is None else shift + conv.bias.detach() * gain)
                norm.reset_parameters()
                norm.eps = 1e-30
    return model


def epsilon(epsilon: float) -> LayerOracle:
    def layer(apply: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = apply(x, weight, bias)
        return with_gradient(z, apply(x, weight, None) * (z / stabilized(z, epsilon)).detach())

    return layer


def parts(
    split: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    first: float,
    second: float,
    gated: bool,
    eps: float,
    bias: bool = True,
) -> LayerOracle:
    """z+, alpha-beta and gamma: ``split`` gives U and L; ``gated``: by the sign of the output."""

    def layer(apply: Callable[..., Tensor], x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        z = apply(x, weight, offset)
        (up, low), biases = split(weight), split(offset) if bias and offset is not None else (None, None)
        above, below = x * (x > 0), x * (x < 0)
        total: Tensor | float = 0.0
        for (a, b), shift, factor, own in (
            ((up, low), biases[0], first, z > 0),
            ((low, up), biases[1], second, z < 0),
        ):
            if not factor:
                continue
            linear = apply(above, a, None) + apply(below, b, None)
            under = apply(above, a, shift) + apply(below, b, None)
            share = factor * ratio(z, stabilized(under, eps))
            total = total + linear * (share * own if gated else share).detach()
        assert isinstance(total, Tensor)
        return with_gradient(z, total)

    return layer


def ramp_of_tokens() -> Modified:
    """``ramp`` for a network with attention or LayerNorm."""
    return Modified(first=same_sign(), windows=same_sign(), constants_take_nothing=True)


def z_plus(eps: float = 1e-6) -> LayerOracle:
    return parts(lambda w: (w.clamp(min=0), w.clamp(max=0)), first=1.0, second=0.0, gated=False, eps=eps)


def alpha_beta(alpha: float, beta: float, eps: float = 1e-6) -> LayerOracle:
    return parts(lambda w: (w.clamp(min=0), w.clamp(max=0)), first=alpha, second=-beta, gated=False, eps=eps)


def gamma(value: float, eps: float = 1e-6) -> LayerOracle:
    def split(w: Tensor) -> tuple[Tensor, Tensor]:
        return w + value * w.clamp(min=0), w + value * w.clamp(max=0)

    return parts(split, first=1.0, second=1.0, gated=True, eps=eps)


def same_sign() -> LayerOracle:
    def layer(apply: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = apply(x, weight, bias).detach()
        above, below, total = x * (x > 0), x * (x < 0), torch.zeros_like(z)
        for sign in (1, -1):
            own = (sign * weight).clamp(min=0) * sign, (-sign * weight).clamp(min=0) * -sign
            linear = apply(above, own[0], None) + apply(below, own[1], None)
            total = total + linear * (ratio(z, linear.detach()) * (sign * z > 0))
        return with_gradient(z, total)

    return layer


def ramp_of_convolutions(model: nn.Module, x: Tensor, target: Tensor, contrast: str) -> Tensor:
    """Maps of ``ramp`` for a network without attention or LayerNorm, whose last layer has inputs that are not negative.

    z+ without bias in the layers, the signed head of :class:`ramp_fast.rules.ramp.RampHead`, and shares of equal size
    in the first layer.
    """
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    stem: list[Tensor] = []
    pooled: list[Tensor] = []
    spread: list[Callable[[Tensor], Tensor]] = []

    def first(apply: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stem.append(apply(x, weight, bias).detach().requires_grad_())
        with torch.enable_grad():
            u = torch.ones_like(x, requires_grad=True)
            count = apply(u, torch.ones_like(weight), None)
        spread.append(lambda r: torch.autograd.grad((count * (r / count.detach())).sum(), u)[0])
        return stem[0]

    layer = parts(lambda w: (w.clamp(min=0), w.clamp(max=0)), first=1.0, second=0.0, gated=False, eps=0.0, bias=False)
    model.requires_grad_(False)
    handle = head.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    with Modified(layer, first=first):
        logits = model(x.clone().requires_grad_()).detach()
    handle.remove()
    (p,), at = pooled, pooled[0].detach()
    one = nn.functional.one_hot(target, logits.shape[1]).to(x)
    others = torch.zeros_like(one)
    if contrast == "others":
        others = logits.masked_fill(one > 0, float("-inf")).softmax(-1)

    def unit(v: Tensor) -> Tensor:
        total = (at * v).abs().sum(-1, keepdim=True)
        return torch.where(total == 0, 0.0, v / total)

    u, positive = (others > 0) / logits.abs(), head.weight.clamp(min=0)
    c = 0.6 * unit((one - others) @ head.weight) + 0.4 * (unit(one @ positive) - unit(u @ positive))
    (gradient,) = torch.autograd.grad((p * c).sum(), stem[0])
    return spread[0]((stem[0] * gradient).detach())
