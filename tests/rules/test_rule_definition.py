"""Every kind of operation against the general definition of the rule (definition.py), through the public engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from definition import HANDLERS, constant, explain
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast import graph as g
from ramp_fast.rules import AbsLRP
from ramp_fast.rules.abslrp import TABLE

# Both sides are float64; a few hundred roundings, magnified where a junction's share or a denominator is small.
TOLERANCE = 1e-10

BATCH = 2


class Fn(nn.Module):
    """A function as a module; its logits are everything that it returns."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif part.is_floating_point():
                self.register_parameter(name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x).flatten(1)


class Case(NamedTuple):
    """A model, the kinds of operation it must be captured as, and how the definition is to read it."""

    model: Fn
    kinds: set[str]
    shape: tuple[int, int, int] = (2, 4, 6)
    # The same function written with operations whose definition is plain, where the engine sees one operation.
    reference: nn.Module | None = None
    picks: bool = False
    divided: bool = True
    maxpool: str = "auto"


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        assert name not in CASES
        CASES[name] = make
        return make

    return register


def simple(name: str, function: Callable[..., Tensor], kinds: str, **parts: Callable[[], nn.Module | Tensor]) -> None:
    """A case on images 2x4x6; parts are built anew for every test, after seeding."""
    CASES[name] = lambda: Case(Fn(function, **{k: make() for k, make in parts.items()}), set(kinds.split()))


def tokens(x: Tensor) -> Tensor:
    """[B, 2, 4, 6] as eight tokens of width 6."""
    return x.reshape(-1, 8, 6)


def heads(x: Tensor, count: int = 2) -> Tensor:
    """Tokens [B, T, D] by head: [B, count, T, D / count]."""
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# Weighted layers

simple("linear", lambda m, x: m.fc(x.flatten(1)), "linear", fc=lambda: nn.Linear(48, 7))
simple("linear without bias", lambda m, x: m.fc(tokens(x)), "linear", fc=lambda: nn.Linear(6, 5, bias=False))
simple("matrix on the right", lambda m, x: tokens(x) @ m.w, "linear", w=lambda: torch.randn(6, 5))
simple(
    "linear on non-negative input",
    lambda m, x: m.fc(x.relu().flatten(1)),
    "linear activation",
    fc=lambda: nn.Linear(48, 7),
)
for _name, _layer in {
    "plain": lambda: nn.Conv2d(2, 4, 3),
    "padding": lambda: nn.Conv2d(2, 4, 3, padding=(1, 2)),
    "stride": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1),
    "stride that leaves columns over": lambda: nn.Conv2d(2, 4, 3, stride=(2, 4)),
    "groups": lambda: nn.Conv2d(2, 6, 3, groups=2, padding=1),
    "groups and stride": lambda: nn.Conv2d(2, 4, 3, groups=2, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(2, 2, 3, groups=2, padding=1, bias=False),
    "dilation": lambda: nn.Conv2d(2, 3, 2, dilation=2, padding=1),
    "1x1": lambda: nn.Conv2d(2, 5, 1),
    "1x1 with stride": lambda: nn.Conv2d(2, 5, 1, stride=2),
    "patches": lambda: nn.Conv2d(2, 5, 2, stride=2),
    "more padding than reach": lambda: nn.Conv2d(2, 3, 2, padding=3),
    "same": lambda: nn.Conv2d(2, 3, 3, padding="same"),
}.items():
    simple(f"conv {_name}", lambda m, x: m.conv(x), "conv", conv=_layer)
simple("conv1d", lambda m, x: m.conv(tokens(x)), "conv", conv=lambda: nn.Conv1d(8, 4, 3, stride=2, padding=1))
simple(
    "conv on non-negative input",
    lambda m, x: m.conv(x.relu()),
    "conv",
    conv=lambda: nn.Conv2d(2, 6, 3, groups=2, stride=2),
)

# Normalisation


def batch_norm(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def affine(norm: nn.Module) -> nn.Module:
    nn.init.normal_(norm.weight)
    if getattr(norm, "bias", None) is not None:
        nn.init.normal_(norm.bias)
    return norm


simple("batch norm", lambda m, x: m.norm(x), "batch_norm", norm=lambda: batch_norm(nn.BatchNorm2d(2)))
simple(
    "batch norm without weights",
    lambda m, x: m.norm(x),
    "batch_norm",
    norm=lambda: batch_norm(nn.BatchNorm2d(2, affine=False)),
)
simple("batch norm 1d", lambda m, x: m.norm(x.flatten(1)), "batch_norm", norm=lambda: batch_norm(nn.BatchNorm1d(48)))
simple("layer norm", lambda m, x: m.norm(tokens(x)), "layer_norm", norm=lambda: affine(nn.LayerNorm(6)))
simple("layer norm over two axes", lambda m, x: m.norm(x), "layer_norm", norm=lambda: affine(nn.LayerNorm((4, 6))))
simple(
    "layer norm without weights",
    lambda m, x: m.norm(tokens(x)),
    "layer_norm",
    norm=lambda: nn.LayerNorm(6, elementwise_affine=False),
)
simple(
    "layer norm without bias",
    lambda m, x: m.norm(tokens(x)),
    "layer_norm",
    norm=lambda: affine(nn.LayerNorm(6, bias=False)),
)
simple(
    "layer norm into linear",  # one step of the plan
    lambda m, x: m.fc(m.norm(tokens(x))),
    "layer_norm linear",
    norm=lambda: affine(nn.LayerNorm(6)),
    fc=lambda: nn.Linear(6, 5),
)
simple(
    "layer norm with two readers",
    lambda m, x: m.a(m.norm(tokens(x))) + m.b(m.norm(tokens(x))),
    "layer_norm linear add",
    norm=lambda: affine(nn.LayerNorm(6)),
    a=lambda: nn.Linear(6, 5),
    b=lambda: nn.Linear(6, 5),
)
simple("group norm", lambda m, x: m.norm(m.conv(x)), "group_norm", conv=lambda: nn.Conv2d(2, 6, 1),
       norm=lambda: affine(nn.GroupNorm(3, 6)))  # fmt: skip
simple("group norm of one group", lambda m, x: m.norm(x), "group_norm", norm=lambda: affine(nn.GroupNorm(1, 2)))
simple("rms norm", lambda m, x: m.norm(tokens(x)), "rms_norm", norm=lambda: affine(nn.RMSNorm(6, eps=1e-3)))
simple("rms norm defaults", lambda m, x: m.norm(tokens(x)), "rms_norm", norm=lambda: affine(nn.RMSNorm(6)))

# Activations: every function of the vocabulary, at arguments on both sides of its bends

for _name, _f in {
    "relu": F.relu,
    "relu6": lambda x: F.relu6(9 * x),
    "relu6 as a module": lambda x: nn.ReLU6()(9 * x),
    "relu6 as a clamp": lambda x: (9 * x).clamp(0, 6),
    "relu as a clamp": lambda x: x.clamp_min(0),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": lambda x: F.hardswish(2 * x),
    "hardsigmoid": lambda x: F.hardsigmoid(2 * x),
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "log sigmoid": lambda x: 1.0 * F.logsigmoid(x) + 1.0 * x.sigmoid(),
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp min": lambda x: x.clamp_min(0.1),
    "clamp max": lambda x: x.clamp_max(0.3),
    "abs": torch.abs,
    "square": torch.square,
    "exp": torch.exp,
    "sqrt": lambda x: x.square().sqrt(),
    "rsqrt": lambda x: x.square().rsqrt(),
    "pow": lambda x: x**3,
    "reciprocal": lambda x: (x.abs() + 0.5).reciprocal(),
    "log": lambda x: (x.abs() + 0.5).log(),
    "expm1": torch.expm1,
    "erf": torch.erf,
    "sin": torch.sin,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.3, 0.0),
}.items():
    simple(f"activation {_name}", lambda m, x, f=_f: m.b(f(m.a(x))), "activation", a=lambda: nn.Conv2d(2, 6, 1),
           b=lambda: nn.Conv2d(6, 2, 1))  # fmt: skip
simple("activation prelu", lambda m, x: m.act(x), "activation", act=lambda: nn.PReLU(2))

# Sums

simple(
    "add", lambda m, x: m.a(x) + m.b(x), "add", a=lambda: nn.Conv2d(2, 3, 1), b=lambda: nn.Conv2d(2, 3, 3, padding=1)
)
simple("residual", lambda m, x: m.b(x + m.a(x)), "add", a=lambda: nn.Conv2d(2, 2, 1), b=lambda: nn.Conv2d(2, 3, 1))
simple(
    "residual blocks",  # relevance of two readers merges right above a junction
    lambda m, x: (lambda y: y + m.b(y))(x + m.a(x)),
    "add",
    a=lambda: nn.Conv2d(2, 2, 1),
    b=lambda: nn.Conv2d(2, 2, 1),
)
simple("sub", lambda m, x: m.a(x) - m.b(x), "add", a=lambda: nn.Conv2d(2, 3, 1), b=lambda: nn.Conv2d(2, 3, 1))
simple(
    "add of a broadcast tensor", lambda m, x: x + m.a(x).mean((2, 3), keepdim=True), "add", a=lambda: nn.Conv2d(2, 2, 1)
)
simple("add of itself", lambda m, x: x + x, "add")
simple(
    "add of three", lambda m, x: m.a(x) + m.b(x) + x, "add", a=lambda: nn.Conv2d(2, 2, 1), b=lambda: nn.Conv2d(2, 2, 1)
)


@case("constants take their share")
def _position() -> Case:
    def f(m: Fn, x: Tensor) -> Tensor:
        t = tokens(x) + m.position
        return m.a(t) + m.b(tokens(x))

    return Case(Fn(f, position=torch.randn(1, 8, 6), a=nn.Linear(6, 5), b=nn.Linear(6, 5)), {"add"})


simple("constant minus tensor", lambda m, x: m.b(m.c - tokens(x)) + tokens(x), "add", c=lambda: torch.randn(8, 6),
       b=lambda: nn.Linear(6, 6))  # fmt: skip
simple("number minus tensor", lambda m, x: m.b(1 - tokens(x)) + tokens(x), "add", b=lambda: nn.Linear(6, 6))
simple("tensor plus number", lambda m, x: m.b(tokens(x) + 0.5) + tokens(x), "add", b=lambda: nn.Linear(6, 6))

# Products and scales

simple("mul", lambda m, x: m.a(x) * m.b(x), "mul", a=lambda: nn.Conv2d(2, 3, 1), b=lambda: nn.Conv2d(2, 3, 1))
simple("square as a product", lambda m, x: x * x, "mul")
simple(
    "swiglu",
    lambda m, x: m.out(F.silu(m.gate(tokens(x))) * m.up(tokens(x))) + tokens(x),
    "mul activation add",
    gate=lambda: nn.Linear(6, 9),
    up=lambda: nn.Linear(6, 9),
    out=lambda: nn.Linear(9, 6),
)
simple(
    "squeeze and excitation",
    lambda m, x: m.a(x) * m.up(m.down(m.a(x).mean((2, 3), keepdim=True)).relu()).sigmoid() + x,
    "mul linear_pool activation",
    a=lambda: nn.Conv2d(2, 2, 1),
    down=lambda: nn.Conv2d(2, 3, 1),
    up=lambda: nn.Conv2d(3, 2, 1),
)
simple(
    "product with a row", lambda m, x: tokens(x) * m.a(tokens(x)).mean(2, keepdim=True), "mul linear_pool",
    a=lambda: nn.Linear(6, 6),
)  # fmt: skip
simple("scale by a number", lambda m, x: m.a(x * -0.3) + x / 7.0, "scale add", a=lambda: nn.Conv2d(2, 2, 1))
simple("scale by a parameter of one entry", lambda m, x: x * m.s + m.a(x), "scale", s=lambda: torch.randn(1),
       a=lambda: nn.Conv2d(2, 2, 1))  # fmt: skip
simple("scale by a vector", lambda m, x: tokens(x) * m.s, "scale", s=lambda: torch.randn(6))
simple("division by a vector", lambda m, x: tokens(x) / m.s, "scale", s=lambda: torch.randn(6))
simple("scale that broadcasts the tensor", lambda m, x: x.mean(1, keepdim=True) * m.s, "scale",
       s=lambda: torch.randn(1, 3, 1, 1))  # fmt: skip
simple("negation", lambda m, x: m.a(-x) + x, "scale", a=lambda: nn.Conv2d(2, 2, 1))
simple("division by a statistic", lambda m, x: x / x.square().mean((1, 2, 3), keepdim=True).sqrt(), "div")
simple(
    "division by a statistic in a network",
    lambda m, x: m.a(tokens(x) / (tokens(x).sum(-1, keepdim=True) + 3.0)) + tokens(x),
    "div",
    a=lambda: nn.Linear(6, 6),
)


@case("layer scale")
def _layer_scale() -> Case:
    fc, gamma = nn.Linear(6, 6).double(), torch.randn(6).double()
    folded = nn.Linear(6, 6).double()
    with torch.no_grad():
        folded.weight.copy_(fc.weight * gamma[:, None])
        folded.bias.copy_(fc.bias * gamma)
    model = Fn(lambda m, x: tokens(x) + m.fc(tokens(x)) * m.gamma, fc=fc, gamma=gamma)
    return Case(model, {"linear", "add"}, reference=Fn(lambda m, x: tokens(x) + m.fc(tokens(x)), fc=folded))


@case("layer scale of a convolution")
def _layer_scale_conv() -> Case:
    conv, gamma = nn.Conv2d(2, 2, 1).double(), torch.randn(2, 1, 1).double()
    folded = nn.Conv2d(2, 2, 1).double()
    with torch.no_grad():
        folded.weight.copy_(conv.weight * gamma[..., None])
        folded.bias.copy_(conv.bias * gamma.flatten())
    return Case(
        Fn(lambda m, x: x + m.conv(x) * m.gamma, conv=conv, gamma=gamma),
        {"conv", "add"},
        reference=Fn(lambda m, x: x + m.conv(x), conv=folded),
    )


# Matrix products and attention


def qkv(m: Fn, x: Tensor, count: int = 2) -> tuple[Tensor, ...]:
    return tuple(heads(layer(tokens(x)), count) for layer in (m.q, m.k, m.v))


def projections(query: int = 6, key: int = 6) -> dict[str, Callable[[], nn.Module]]:
    return {"q": lambda: nn.Linear(6, query), "k": lambda: nn.Linear(6, key), "v": lambda: nn.Linear(6, key)}


simple(
    "product of two matrices", lambda m, x: m.q(tokens(x)) @ m.k(tokens(x)).transpose(1, 2), "matmul", **projections()
)
simple("softmax", lambda m, x: m.q(tokens(x)).softmax(-1), "softmax", q=lambda: nn.Linear(6, 6))
simple("softmax over channels", lambda m, x: x.softmax(1), "softmax")
simple(
    "softmax that is not attention",
    lambda m, x: m.q(tokens(x)).softmax(-1) * m.k(tokens(x)),
    "softmax mul",
    **projections(),
)


def written_out(m: Fn, x: Tensor) -> Tensor:
    """Attention in three dimensions, which stays three operations."""
    q, k, v = m.q(tokens(x)), m.k(tokens(x)), m.v(tokens(x))
    return (q * 0.4 @ k.mT).softmax(-1) @ v


simple("attention in three dimensions", written_out, "matmul softmax scale", **projections())


def scaled_after(m: Fn, x: Tensor) -> Tensor:
    q, k, v = m.q(tokens(x)), m.k(tokens(x)), m.v(tokens(x))
    return ((q @ k.mT) * 0.4).softmax(-1) @ v


simple("scores scaled after the product", scaled_after, "matmul softmax scale", **projections())
simple(
    "attention written out by head",
    lambda m, x: merged((lambda q, k, v: (q * 0.4 @ k.transpose(-2, -1)).softmax(-1) @ v)(*qkv(m, x))),
    "attention",
    **projections(),
)
simple("attention", lambda m, x: merged(F.scaled_dot_product_attention(*qkv(m, x))), "attention", **projections())
simple(
    "attention with a scale",
    lambda m, x: merged(F.scaled_dot_product_attention(*qkv(m, x), scale=1.7)),
    "attention",
    **projections(),
)
simple(
    "causal attention",
    lambda m, x: merged(F.scaled_dot_product_attention(*qkv(m, x), is_causal=True)),
    "attention",
    **projections(),
)
simple(
    "attention with a bias",
    lambda m, x: merged(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=m.bias)),
    "attention",
    **projections(),
    bias=lambda: torch.randn(1, 2, 8, 8),
)
simple(
    "attention with a bias shared by heads",
    lambda m, x: merged(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=m.bias)),
    "attention",
    **projections(),
    bias=lambda: torch.randn(8, 8),
)


def hidden_pairs() -> Tensor:
    keep = torch.rand(8, 8) > 0.4
    keep.fill_diagonal_(True)
    return keep


simple(
    "attention with a boolean mask",
    lambda m, x: merged(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=m.mask)),
    "attention",
    **projections(),
    mask=hidden_pairs,
)


@case("attention with -100 as mask")
def _minus_100() -> Case:
    mask = torch.where(hidden_pairs(), torch.randn(8, 8), -100.0)
    return Case(
        Fn(
            lambda m, x: merged(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=m.mask)),
            mask=mask,
            **{k: make() for k, make in projections().items()},
        ),
        {"attention"},
    )


@case("attention with minus infinity as mask")
def _minus_infinity() -> Case:
    mask = torch.where(hidden_pairs(), 0.0, float("-inf"))
    return Case(
        Fn(
            lambda m, x: merged(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=m.mask)),
            mask=mask,
            **{k: make() for k, make in projections().items()},
        ),
        {"attention"},
    )


simple(
    "grouped-query attention",
    lambda m, x: merged(
        F.scaled_dot_product_attention(
            heads(m.q(tokens(x)), 4), heads(m.k(tokens(x)), 2), heads(m.v(tokens(x)), 2), enable_gqa=True
        )
    ),
    "attention",
    **projections(12, 6),
)
simple(
    "attention with fewer queries",
    lambda m, x: merged(
        F.scaled_dot_product_attention(heads(m.q(tokens(x)[:, :3])), heads(m.k(tokens(x))), heads(m.v(tokens(x))))
    ),
    "attention",
    **projections(),
)


def qk_norm(m: Fn, x: Tensor) -> Tensor:
    t = tokens(x)
    q, k, v = (part.transpose(1, 2) for part in m.qkv(t).reshape(-1, 8, 3, 2, 3).unbind(2))
    return m.out(merged(F.scaled_dot_product_attention(m.qn(q), m.kn(k), v))) + t


simple(
    "one qkv layer, normalised queries and keys",
    qk_norm,
    "attention split split_output layer_norm add",
    qkv=lambda: nn.Linear(6, 18),
    qn=lambda: affine(nn.LayerNorm(3)),
    kn=lambda: affine(nn.LayerNorm(3)),
    out=lambda: nn.Linear(6, 6),
)


def pooling(m: Fn, x: Tensor) -> Tensor:
    """Attention pooling: a constant query attends to the tokens."""
    t = tokens(x)
    query = heads(m.q(m.latent.expand(x.shape[0], -1, -1)))
    return m.out(merged(F.scaled_dot_product_attention(query, heads(m.k(t)), heads(m.v(t)))))


def pooling_definition(m: Fn, x: Tensor) -> Tensor:
    """The same with the query as a constant that the definition can follow, as it has a batch of one."""
    t = tokens(x)
    k, v = heads(m.k(t)), heads(m.v(t))
    query = constant(heads(m.q(m.latent)), x)
    return m.out(merged(F.scaled_dot_product_attention(query, k, v)))


@case("attention pooling")
def _pooling() -> Case:
    parts = {k: make() for k, make in projections().items()}
    parts.update(latent=torch.randn(1, 1, 6), out=nn.Linear(6, 5))
    return Case(Fn(pooling, **parts), {"attention"}, reference=Fn(pooling_definition, **parts))


def windows(m: Fn, x: Tensor) -> Tensor:
    """Two shifted windows of four tokens with relative position bias and mask, and back."""
    t = tokens(x).roll(-2, 1).reshape(-1, 2, 4, 6).reshape(-1, 4, 6)
    q, k, v = (heads(layer(t)) for layer in (m.q, m.k, m.v))
    scores = q * 0.5 @ k.transpose(-2, -1) + m.bias
    scores = scores.view(-1, 2, 2, 4, 4) + m.mask.unsqueeze(1).unsqueeze(0)
    out = scores.view(-1, 2, 4, 4).softmax(-1) @ v
    return merged(out).reshape(-1, 8, 6).roll(2, 1) + tokens(x)


def window_mask() -> Tensor:
    mask = torch.zeros(2, 4, 4)
    mask[1, :2, 2:] = mask[1, 2:, :2] = -100.0
    return mask


simple("shifted windows", windows, "attention add rearrange", **projections(), bias=lambda: torch.randn(2, 4, 4),
       mask=window_mask)  # fmt: skip
# A mask stays one where the bias is so high that their sum is not so low.
simple("shifted windows with a high bias", windows, "attention add rearrange", **projections(),
       bias=lambda: torch.randn(2, 4, 4) + 5, mask=window_mask)  # fmt: skip

# Pools


@case("max pool, divided")
def _max_divided() -> Case:
    return Case(Fn(lambda m, x: F.max_pool2d(x, 3, 2, 1)), {"max_pool"}, maxpool="divided")


@case("max pool, undivided")
def _max_undivided() -> Case:
    return Case(Fn(lambda m, x: F.max_pool2d(x.relu(), 2)), {"max_pool"}, divided=False, maxpool="undivided")


@case("max pool that overlaps, undivided")
def _max_overlap() -> Case:
    return Case(Fn(lambda m, x: F.max_pool2d(x, 3, 1)), {"max_pool"}, divided=False, maxpool="undivided")


@case("max pool with rounding up")
def _max_ceil() -> Case:
    return Case(
        Fn(lambda m, x: F.max_pool2d(x, 3, 2, ceil_mode=True)), {"max_pool"}, divided=False
    )  # no residual sum: auto is undivided


@case("max pool of a residual network")
def _max_auto() -> Case:
    model = Fn(lambda m, x: (lambda y: y + m.a(y))(F.max_pool2d(x, 2)), a=nn.Conv2d(2, 2, 1))
    return Case(model, {"max_pool", "add"})


simple("mean over the image", lambda m, x: x.mean((2, 3)), "linear_pool")
simple("mean, kept axes", lambda m, x: x.mean((-1, -2), keepdim=True), "linear_pool")
simple("mean over tokens", lambda m, x: m.fc(tokens(x).mean(1)), "linear_pool linear", fc=lambda: nn.Linear(6, 5))
simple("sum", lambda m, x: x.sum(2), "linear_pool")
simple("global average pool", lambda m, x: F.adaptive_avg_pool2d(x, 1), "linear_pool")
simple("adaptive average pool", lambda m, x: F.adaptive_avg_pool2d(x, (3, 4)), "linear_pool")
simple("average pool", lambda m, x: F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False), "linear_pool")
simple("average pool with padding", lambda m, x: F.avg_pool2d(x, 3, 2, 1), "linear_pool")

# Tokens for the head


@case("class token")
def _class_token() -> Case:
    def f(m: Fn, x: Tensor) -> Tensor:
        t = m.a(tokens(x))
        t = t + m.b(t)
        return m.head(m.norm(t)[:, 0])

    parts = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "norm": affine(nn.LayerNorm(6)), "head": nn.Linear(6, 5)}
    return Case(Fn(f, **parts), {"select_tokens", "add"}, picks=True)


@case("class token after attention")
def _class_token_attention() -> Case:
    def f(m: Fn, x: Tensor) -> Tensor:
        t = tokens(x) + merged(F.scaled_dot_product_attention(*qkv(m, x)))
        return m.head(m.norm(t + m.mlp(t).relu())[:, 0])

    parts = {k: make() for k, make in projections().items()}
    parts.update(mlp=nn.Linear(6, 6), norm=affine(nn.LayerNorm(6)), head=nn.Linear(6, 5))
    return Case(Fn(f, **parts), {"select_tokens", "attention"}, picks=True)


@case("patch tokens of a slice")
def _patch_tokens() -> Case:
    def f(m: Fn, x: Tensor) -> Tensor:
        return m.head(m.norm(m.a(tokens(x)))[:, 2:].mean(1))

    parts = {"a": nn.Linear(6, 6), "norm": affine(nn.LayerNorm(6)), "head": nn.Linear(6, 5)}
    return Case(Fn(f, **parts), {"select_tokens", "linear_pool"}, picks=True)


@case("two tokens, two heads")
def _distilled() -> Case:
    def f(m: Fn, x: Tensor) -> Tensor:
        t = m.norm(m.a(tokens(x)))
        return (m.one(t[:, 0]) + m.two(t[:, 1])) / 2

    parts = {"a": nn.Linear(6, 6), "norm": affine(nn.LayerNorm(6)), "one": nn.Linear(6, 5), "two": nn.Linear(6, 5)}
    return Case(Fn(f, **parts), {"select_tokens", "add"}, picks=True)


# Rotary embeddings: one linear map with weights of both signs


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-second, first], -1).flatten(-2)
    return x * cos + turned * sin


def half_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rotary_case(turn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Case:
    angles = torch.randn(8, 3, dtype=torch.float64)
    per = angles.repeat_interleave(2, -1) if turn is rotary else torch.cat([angles, angles], -1)
    cos, sin = per.cos(), per.sin()
    eye = torch.eye(48, dtype=torch.float64).view(48, 8, 6)
    matrix = turn(eye, cos, sin).flatten(1).t().contiguous()  # [out, in]
    a, b = nn.Linear(6, 6), nn.Linear(6, 5)

    def reference(m: Fn, x: Tensor) -> Tensor:
        return m.b(F.linear(m.a(tokens(x)).flatten(1), m.matrix).reshape(-1, 8, 6))

    return Case(
        Fn(lambda m, x: m.b(turn(m.a(tokens(x)), m.cos, m.sin)), a=a, b=b, cos=cos, sin=sin),
        {"linear_map"},
        reference=Fn(reference, a=a, b=b, matrix=matrix),
    )


CASES["rotary embedding, interleaved"] = lambda: rotary_case(rotary)
CASES["rotary embedding, halves"] = lambda: rotary_case(half_rotary)

# Choices

simple(
    "maximum",
    lambda m, x: torch.maximum(m.a(x), m.b(x)),
    "choice",
    a=lambda: nn.Conv2d(2, 3, 1),
    b=lambda: nn.Conv2d(2, 3, 1),
)
simple(
    "minimum with a constant",
    lambda m, x: m.a(torch.minimum(x, m.low)) + m.b(x),
    "choice",
    a=lambda: nn.Conv2d(2, 3, 1),
    b=lambda: nn.Conv2d(2, 3, 1),
    low=lambda: torch.randn(2, 1, 1),
)
simple(
    "where, decided by the images",
    lambda m, x: m.b((lambda y: torch.where(y > 0, y, x * 0.1))(m.a(x))),
    "choice decision",
    a=lambda: nn.Conv2d(2, 2, 1),
    b=lambda: nn.Conv2d(2, 3, 1),
)
simple("log_softmax inside", lambda m, x: m.b(m.a(tokens(x)).log_softmax(-1)), "shift", a=lambda: nn.Linear(6, 5),
       b=lambda: nn.Linear(5, 4))  # fmt: skip

# Moves

simple(
    "cat",
    lambda m, x: torch.cat([m.a(x), m.b(x)], 1).sum(2),
    "rearrange",
    a=lambda: nn.Conv2d(2, 3, 1),
    b=lambda: nn.Conv2d(2, 2, 1),
)
simple(
    "cat with itself and a constant",
    lambda m, x: m.a(torch.cat([tokens(x), m.c.expand(x.shape[0], -1, -1), tokens(x)], 1)),
    "rearrange",
    a=lambda: nn.Linear(6, 4),
    c=lambda: torch.randn(1, 1, 6),
)
simple("stack", lambda m, x: torch.stack([m.a(x), x], 2).mean(1), "rearrange", a=lambda: nn.Conv2d(2, 2, 1))
simple("split", lambda m, x: (lambda p: torch.cat([m.a(p[0]), p[1]], 1))(x.split([1, 1], 1)), "split split_output",
       a=lambda: nn.Conv2d(1, 2, 1))  # fmt: skip
simple(
    "split with a part unused", lambda m, x: (lambda p: p[0] * p[2])(tokens(x).split(2, 2)), "split split_output mul"
)
simple(
    "chunk",
    lambda m, x: (lambda p: p[0] + m.a(p[1]))(tokens(x).chunk(2, -1)),
    "split split_output add",
    a=lambda: nn.Linear(3, 3),
)
simple("unbind", lambda m, x: (lambda p: p[0] * p[1] + p[0])(x.unbind(1)), "split split_output mul add")
simple("roll", lambda m, x: m.a(x.roll((1, -2), (2, 3))), "rearrange", a=lambda: nn.Conv2d(2, 3, 3))
simple("flip", lambda m, x: m.a(x.flip(3)), "rearrange", a=lambda: nn.Conv2d(2, 3, 3))
simple("pad", lambda m, x: m.a(F.pad(x, (1, 2, 0, 1))), "rearrange", a=lambda: nn.Conv2d(2, 3, 3))
simple(
    "slices",
    lambda m, x: m.a(x[:, :, ::2, 1::2]) + m.b(x[:, :, 1::2, ::2]),
    "rearrange add",
    a=lambda: nn.Conv2d(2, 3, 1),
    b=lambda: nn.Conv2d(2, 3, 1),
)
simple("expand", lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 6) * x, "rearrange mul")
simple("permute", lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).mean(2), "rearrange layer_norm",
       norm=lambda: affine(nn.LayerNorm(2)))  # fmt: skip
simple("pixel shuffle", lambda m, x: m.a(F.pixel_shuffle(m.b(x), 2)), "rearrange", a=lambda: nn.Conv2d(1, 3, 3),
       b=lambda: nn.Conv2d(2, 4, 1))  # fmt: skip
simple("repeated channels", lambda m, x: m.a(x.repeat_interleave(2, 1)), "rearrange", a=lambda: nn.Conv2d(4, 3, 3))


@lru_cache(maxsize=1)
def build(name: str) -> tuple[Case, nn.Module, Tensor, Tensor]:
    """The case in float64 with images and a seed of both signs."""
    torch.manual_seed(sum(map(ord, name)))
    built = CASES[name]()
    model = built.model.double().eval()
    rng = np.random.RandomState(0)
    images = torch.from_numpy(rng.standard_normal((BATCH, *built.shape)))
    with torch.no_grad():
        classes = model(images).shape[1]
    return built, model, images, torch.from_numpy(rng.standard_normal((BATCH, classes)))


# Without several operands there is nothing to share: one rule is enough.
SHARING = {g.ADD, g.MUL, g.MATMUL, g.ATTENTION, g.SPLIT, g.CHOICE}
BOTH = {name for name, make in CASES.items() if make().kinds & SHARING} | {"cat", "stack"}


@pytest.mark.parametrize(
    ("name", "shares"), [(n, s) for n in sorted(CASES) for s in ("kept", "equal") if s == "kept" or n in BOTH]
)
def test_definition(name: str, shares: str) -> None:
    built, model, images, seed = build(name)
    rule = AbsLRP(stabilizer=0.0, shares=shares, maxpool=built.maxpool)
    engine = Engine(model, rule=rule, precision="float64")
    result = engine.attribute(images, seed, contrast="none", normalize="sum")
    reference = model if built.reference is None else built.reference.double().eval()
    expected = explain(reference, images, seed, shares=shares, divided=built.divided, picks=built.picks)
    assert built.kinds <= {step.node.kind for step in engine.plan.steps}, str(engine.plan)
    with torch.no_grad():
        torch.testing.assert_close(result.logits, model(images), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(expected.abs().flatten(1).sum(1), torch.ones(BATCH, dtype=torch.float64))
    error = (result.maps - expected).detach().abs().flatten(1).sum(1)
    assert float(error.max()) < TOLERANCE, f"relative error {error.tolist()} (sum of absolute values)\n{engine.plan}"


# Tested below (strict=False) and in tests/capture/test_vocabulary.py.
ELSEWHERE = {g.GENERIC, g.BILINEAR, g.MAX_REDUCTION, g.REDUCTION}


def test_every_kind_has_a_case() -> None:
    covered = set().union(*(make().kinds for make in CASES.values()))
    assert set(TABLE) | {g.REARRANGE} <= covered | ELSEWHERE


class Erfinv(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.tanh() * 0.9).erfinv().flatten(1)


def test_unknown_elementwise_operation_follows_the_definition() -> None:
    """strict=False: the same pull-back as for activations."""
    model = Erfinv().double().eval()
    rng = np.random.RandomState(0)
    images, seed = (torch.from_numpy(rng.standard_normal(s)) for s in ((BATCH, 2, 2, 3), (BATCH, 12)))
    with pytest.warns(UserWarning, match=r"erfinv"):
        engine = Engine(model, rule=AbsLRP(stabilizer=0.0), precision="float64", strict=False, input_shape=(2, 2, 3))
    got = engine.attribute(images, seed, contrast="none", normalize="sum").maps
    handlers = {**HANDLERS, "erfinv": HANDLERS["tanh"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("definition.HANDLERS", handlers)
        expected = explain(model, images, seed)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh, F.hardsigmoid, torch.erf, torch.atan])
def test_even_slopes_leave_nothing_below_zero(function: Callable[[Tensor], Tensor], precision: str) -> None:
    """``f'(-x) = f'(x)``: the relevance of a class with a negative argument is zero, not a rounding error."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    classes = torch.arange(40)
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 40))
    model, x = nn.Sequential(body, Fn(lambda _, x: function(x))).to(dtype).eval(), torch.randn(3, 3, 2, 2, dtype=dtype)
    maps = Engine(model, precision=precision).attribute(x, classes.expand(3, -1), "none", "none").maps
    assert torch.equal(maps.flatten(2).any(2), body(x) > 0)


@pytest.mark.parametrize("precision", ["float64", "float32", "mixed"])
@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh])
def test_saturated_outputs_keep_their_relevance(function: Callable[[Tensor], Tensor], precision: str) -> None:
    """The slope is small, not zero: an output that is 1 to the last bit of float32 has a map, and not minus N."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    body[1].bias.data = torch.tensor([25.0, 1.0, 26.0])
    model = nn.Sequential(body, Fn(lambda _, x: function(x))).to(dtype).eval()
    engine, x = Engine(model, precision=precision), torch.randn(3, 3, 2, 2, dtype=dtype)
    plain = Engine(body.to(dtype), precision=precision).attribute(x, 0, "none", "sum").maps
    maps = engine.attribute(x, 0, "none", "sum").maps
    torch.testing.assert_close(maps, plain, rtol=1e-2, atol=1e-3)
    assert engine.attribute(x, 0, normalize="none").maps.abs().flatten(1).sum(1).min() > 0.1


def test_folded_batch_norm_is_the_folded_network() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 3, 3, padding=1), batch_norm(nn.BatchNorm2d(3))
    last = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(conv, norm, nn.ReLU(), last, nn.Flatten()).double().eval()
    folded = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
    reference = nn.Sequential(folded, nn.ReLU(), last, nn.Flatten()).eval()
    rng = np.random.RandomState(1)
    images = torch.from_numpy(rng.standard_normal((BATCH, 2, 5, 5)))
    seed = torch.from_numpy(rng.standard_normal((BATCH, 36)))
    rule = AbsLRP(stabilizer=0.0, fold_batchnorm=True)
    got = Engine(model, rule=rule, precision="float64").attribute(images, seed, contrast="none", normalize="sum")
    torch.testing.assert_close(got.maps, explain(reference, images, seed), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shares", ["kept", "equal"])
def test_contrast_is_the_difference_of_two_maps(shares: str) -> None:
    """One-hot minus uniform over the others, each with mass 1: carried as (P, P - N), equal to the pair."""
    _, model, images, _ = build("one qkv layer, normalised queries and keys")
    target = torch.tensor([3, 11])
    classes = 48
    onehot = F.one_hot(target, classes).double()
    pair = [explain(model, images, s, shares=shares) for s in (onehot, (1 - onehot) / (classes - 1))]
    rule = AbsLRP(stabilizer=0.0, shares=shares)
    got = Engine(model, rule=rule, precision="float64").attribute(images, target, normalize="none").maps
    torch.testing.assert_close(got, pair[0] - pair[1], rtol=0, atol=TOLERANCE)


def test_masks_of_any_form_agree() -> None:
    """A boolean mask, -100 and minus infinity say the same."""
    torch.manual_seed(3)
    parts = {k: make() for k, make in projections().items()}
    keep = hidden_pairs()
    images = torch.randn(BATCH, 2, 4, 6, dtype=torch.float64)
    maps = []
    for mask in (keep, torch.where(keep, 0.0, -1000.0), torch.where(keep, 0.0, float("-inf"))):
        model = Fn(
            lambda m, x: m.v(merged(F.scaled_dot_product_attention(*qkv(m, x), attn_mask=m.mask))), mask=mask, **parts
        )
        maps.append(Engine(model.double().eval(), precision="float64").attribute(images, 0).maps)
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(maps[0], maps[2], rtol=0, atol=1e-9)
