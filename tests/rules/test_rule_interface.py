"""The interface of a rule, proved by two rules that only this file knows: LRP-0 and z+ against modified autograd.

Both are linear: relevance is ``R = x c``. Activations pass relevance on (``c f(x) / x``), the statistics of LayerNorm
and the weights of attention are constants, sums give ``c`` to all operands. A modified forward pass whose gradient is
the same computes them independently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import modified_autograd as oracle
import pytest
import torch
import torch.nn.functional as F
from small_models import FAMILIES, images
from torch import Tensor, nn

from ramp_fast import Engine, gemm
from ramp_fast import graph as g
from ramp_fast.errors import UnsupportedModelError
from ramp_fast.gemm import Precision
from ramp_fast.graph import Node
from ramp_fast.rules import Rule
from ramp_fast.rules.base import Flow, Fusion, Operation, Values, reduce_to, vjp
from ramp_fast.rules.rearrange import Join, Rearrange, Split, SplitOutput
from ramp_fast.rules.weighted import Weighted


class Jacobian(Operation):
    """``J(x)^T c``, of what is linear or a choice of its inputs."""

    def needs(self) -> list[Node]:
        return [self.node.operands[0]]

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source = self.node.operands[0]
        yield Flow(source, part.moved(vjp(self.function(values), values[source], part.c)))

    def function(self, values: Values) -> Callable[[Tensor], Tensor]:
        return lambda u: values.call_at(self.node, self.node.operands[0], u)


class PassOn(Jacobian):
    """``c f(x) / x``."""

    def needs(self) -> list[Node]:
        return [self.node.operands[0], self.node]

    def function(self, values: Values) -> Callable[[Tensor], Tensor]:
        x, y = values[self.node.operands[0]], values[self.node]
        return lambda u: u * torch.where(x == 0, 0.0, y / x)


class Norm(Jacobian):
    def function(self, values: Values) -> Callable[[Tensor], Tensor]:
        return norm(values[self.node.operands[0]], values[self.node.params.weight], self.node.params.eps)


def norm(at: Tensor, weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    sigma = (at.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return lambda u: weight * (u - u.mean(-1, keepdim=True)) / sigma


class Sum(Operation):
    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        for operand in self.node.sources:
            yield Flow(operand, part.moved(reduce_to(part.c, kept[operand])))

    def forward(self, values: Values) -> tuple[Any, Any]:
        return values.call(self.node), {n: values[n].shape for n in self.node.sources}


class Attend(Operation):
    """To the values alone."""

    def needs(self) -> list[Node]:
        return list(self.node.operands)

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        _, _, value = self.node.operands
        pulled = vjp(lambda u: values.call_at(self.node, value, u), values[value], part.c)
        yield Flow(value, part.moved(pulled))


class Signed:
    """``W+`` and ``W-``, packed apart."""

    def __init__(self, weight: Tensor) -> None:
        self.positive, self.negative = gemm.Matrix(weight.clamp(min=0)), gemm.Matrix(weight.clamp(max=0))
        self.up, self.down = gemm.Matrix(weight.clamp(min=0).t()), gemm.Matrix(weight.clamp(max=0).t())
        self.kernel, self.nbytes = "W+ and W-", 4 * self.positive.nbytes


class ZeroLinear(Weighted["gemm.Matrix"]):
    """``W^T c``."""

    def pack(self, constants: dict[Node, Any]) -> tuple[gemm.LinearOp, gemm.Matrix]:
        weight, bias = self.effective(constants)
        return gemm.Matrix(weight, bias), gemm.Matrix(weight.t())

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        yield Flow(self.node.operands[0], part.moved(self.pullback_map(part.c)))


class PlusLinear(Weighted[Signed]):
    """``W+^T s`` where x > 0, ``W-^T s`` where x < 0, with ``s = c z / (W+ x+ + W- x-)``."""

    def pack(self, constants: dict[Node, Any]) -> tuple[gemm.LinearOp, Signed]:
        weight, bias = self.effective(constants)
        return gemm.Matrix(weight, bias), Signed(weight)

    def needs(self) -> list[Node]:
        return [self.node.operands[0], self.node]

    def pullback(self, parts: list[Any], values: Values, kept: Any, conservation: Any) -> Iterator[Flow]:
        part = self.merged(parts, values, conservation)
        source, packed = self.node.operands[0], self.pullback_map
        x, z = values[source], values[self.node]
        below = packed.positive(x.clamp(min=0)) + packed.negative(x.clamp(max=0))
        s = part.c * torch.where(below == 0, 0.0, z / below)
        c = torch.where(x > 0, packed.up(s), torch.where(x < 0, packed.down(s), 0.0))
        yield Flow(source, part.moved(c))


class PlusConv(Jacobian):
    def needs(self) -> list[Node]:
        return [self.node.operands[0], self.node]

    def function(self, values: Values) -> Callable[[Tensor], Tensor]:
        p = self.node.params
        return plus(
            values[self.node.operands[0]],
            values[self.node],
            lambda u, part: F.conv2d(u, part(values[p.weight]), None, p.stride, p.padding, p.dilation, p.groups),
        )


Parted = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


def plus(x: Tensor, z: Tensor, layer: Parted) -> Callable[[Tensor], Tensor]:
    """A function with the gradient of z+ at ``x``; ``layer(u, part)`` has ``part`` of the weights and no bias."""

    def positive(u: Tensor) -> Tensor:
        return layer(u * (x > 0), lambda w: w.clamp(min=0)) + layer(u * (x < 0), lambda w: w.clamp(max=0))

    below = positive(x).detach()
    ratio = torch.where(below == 0, 0.0, z / below)  # behind a ReLU nothing may be left
    return lambda u: positive(u) * ratio


LINEAR = {
    g.BATCH_NORM: Jacobian,
    g.LAYER_NORM: Norm,
    g.ACTIVATION: PassOn,
    g.ADD: Sum,
    g.ATTENTION: Attend,
    g.MAX_POOL: Jacobian,
    g.LINEAR_POOL: Jacobian,
    g.SPLIT: Split,
    g.SPLIT_OUTPUT: SplitOutput,
}
TABLES: dict[str, dict[str, type[Operation]]] = {
    "zero": {**LINEAR, g.LINEAR: ZeroLinear, g.CONV: Jacobian},
    "plus": {**LINEAR, g.LINEAR: PlusLinear, g.CONV: PlusConv},
}


@dataclass(frozen=True)
class Linear(Rule):
    """LRP-0 ("zero") or z+ ("plus")."""

    table: str

    @property
    def name(self) -> str:
        return f"lrp-{self.table}"

    def start(self, seed: Tensor, logits: Tensor) -> Tensor:
        return seed  # the relevance of a logit is the logit

    def relevance(self, c: Tensor, x: Tensor) -> Tensor:
        return x * c

    def operation(self, node: Node, precision: Precision, fusion: Fusion) -> Operation:
        if node.kind == g.REARRANGE:
            return (Join if node.params.how in ("cat", "stack") else Rearrange)(node, precision, fusion)
        if node.kind not in TABLES[self.table]:
            raise UnsupportedModelError(f"{self.name} has no pull-back for {node.kind}")
        return TABLES[self.table][node.kind](node, precision, fusion)


# The same as gradients of a network with other functions: all of attention goes to the values.
ORACLES: dict[str, oracle.LayerOracle | None] = {
    "zero": None,
    "plus": oracle.parts(
        lambda w: (w.clamp(min=0), w.clamp(max=0)), first=1.0, second=0.0, gated=False, eps=0.0, bias=False
    ),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_of_modified_autograd(family: str, table: str) -> None:
    model = FAMILIES[family]().double()
    x, target = images(2).double(), torch.tensor([3, 7])
    mode = oracle.Modified(ORACLES[table], values_only=True)
    expected = oracle.relevance(model, x, torch.nn.functional.one_hot(target, 10).double(), mode)
    found = Engine(model, Linear(table), "float64").attribute(x, target, "none", "none").maps
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("table", TABLES)
def test_contrast_is_a_signed_seed(table: str) -> None:
    model, x = FAMILIES["vit"]().double(), images(1).double()
    engine = Engine(model, Linear(table), "float64")
    each = engine.attribute(x.expand(10, -1, -1, -1), torch.arange(10), "none", "none").maps
    found = engine.attribute(x, 4, "others", "none").maps[0]
    others = (each.sum(0) - each[4]) / 9
    torch.testing.assert_close(found, each[4] - others, rtol=1e-9, atol=1e-12)
    several = engine.attribute(x, torch.tensor([[4, 2]]), "others", "none").maps[0]
    torch.testing.assert_close(several[0], found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rules", [("abslrp", "zero", "plus"), ("plus", "zero", "abslrp")])
def test_engines_of_several_rules_share_a_model(rules: tuple[str, ...]) -> None:
    # Packed weights are shared between engines: each rule must get those that it packs.
    x = images(2).double()

    def maps(model: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
        engines = [Engine(model, name if name == "abslrp" else Linear(name), "float64") for name in names]
        return [engine.attribute(x, 3).maps for engine in engines]

    together = maps(FAMILIES["vit"]().double(), rules)
    for name, found in zip(rules, together, strict=True):
        assert torch.equal(found, maps(FAMILIES["vit"]().double(), (name,))[0])


def test_a_rule_refuses_what_it_does_not_know() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.GroupNorm(1, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    with pytest.raises(UnsupportedModelError, match=r"lrp-zero has no pull-back for group_norm \(1, 2\)") as refusal:
        Engine(model.eval(), Linear("zero"), input_shape=(3, 8, 8))
    assert refusal.value.operations == (("group_norm", "1"), ("group_norm", "2"))
