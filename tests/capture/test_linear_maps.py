"""Transposes of small linear maps, as sums of products with permutations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast import graph as g
from ramp_fast.capture.linear_maps import LinearMap
from ramp_fast.graph import Node


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * cos + turned * sin


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos - torch.cat([b, -a], -1) * sin


def rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Not within the last axis."""
    return x * cos + torch.cat([x[:, 1:], x[:, :1]], 1) * sin


def summed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """No permutation."""
    return x * cos + x[..., :1].expand(x.shape) * sin


class Turned(nn.Module):
    def __init__(self, turn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.turn, self.first, self.last = turn, nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("cos", torch.randn(4, 6))
        self.register_buffer("sin", torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.turn(self.first(x.flatten(1).view(-1, 4, 8)), self.cos, self.sin)).mean(1)


def map_of(turn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Node, dict[Node, Tensor]]:
    torch.manual_seed(0)
    plan = Engine(Turned(turn).eval(), precision="float64", input_shape=(2, 4, 4)).plan
    (node,) = (n for n in plan.graph.nodes if n.kind == g.LINEAR_MAP and isinstance(n.target, LinearMap))
    return node, plan.constants


@pytest.mark.parametrize(("turn", "swaps"), [(neighbours, True), (halves, False)])
def test_the_transpose_of_a_rotary_embedding(turn: Callable[..., Tensor], swaps: bool) -> None:
    node, known = map_of(turn)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    constants = [known[n].double() if n in known else len(x) for n in node.args[1:]]
    terms = node.target.terms(x, *constants)
    assert [t.swaps for t in terms] == [False, swaps]
    assert [t.weight.shape for t in terms] == [(1, 4, 6)] * 2
    c = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    for own, absolute in ((node.target, False), (node.target.absolute, True)):
        u = torch.randn_like(x).requires_grad_()
        expected = torch.stack([torch.autograd.grad(own(u, *constants), u, side)[0] for side in c])
        found = sum(t.moved(c) * (t.weight.abs() if absolute else t.weight) for t in terms)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_neighbours_are_swapped_to_the_bit(dtype: torch.dtype) -> None:
    node, known = map_of(neighbours)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    _, term = node.target.terms(x, *(known[n].double() if n in known else len(x) for n in node.args[1:]))
    c = torch.randn(2, 3, 4, 6).to(dtype)  # every bit of them counts
    c[0] = torch.tensor([1.0, -2.0, 0.0, -0.0, float("nan"), float("inf")], dtype=dtype)
    from_an_odd_place = torch.cat([c.new_zeros(1), c.flatten()])[1:].view(c.shape)
    for own in (c, c.mT.contiguous().mT, from_an_odd_place):
        moved = term.moved(own)
        assert torch.equal(moved.nan_to_num(7), own[..., [1, 0, 3, 2, 5, 4]].nan_to_num(7))
        assert torch.equal(moved.signbit(), own[..., [1, 0, 3, 2, 5, 4]].signbit())


@pytest.mark.parametrize("turn", [rows, summed])
def test_other_maps_have_no_such_terms(turn: Callable[..., Tensor]) -> None:
    node, known = map_of(turn)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    constants = [known[n].double() if n in known else len(x) for n in node.args[1:]]
    assert node.target.terms(x, *constants) is None
