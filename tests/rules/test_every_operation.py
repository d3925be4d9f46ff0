"""Every kind of operation under signed rules: a map, or a refusal that says why.

The networks are those of test_rule_definition.py, and some of the kinds that it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from test_rule_definition import BATCH, CASES, Fn, build
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast import graph as g
from ramp_fast.errors import UnsupportedModelError
from ramp_fast.rules import signed
from ramp_fast.rules.abslrp import TABLE

KINDS = {value for name, value in vars(g).items() if name.isupper() and isinstance(value, str)} - {g.INPUT, *g.CONSTANT}

OTHERS: dict[str, Callable[[], Fn]] = {
    g.BILINEAR: lambda: Fn(
        lambda m, x: torch.einsum("bchw,bdhw->bcd", m.a(x), m.b(x)), a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(2, 4, 1)
    ),
    g.MAX_REDUCTION: lambda: Fn(lambda m, x: m.a(x).amax(1), a=nn.Conv2d(2, 3, 1)),
    "largest and its place": lambda: Fn(lambda m, x: 0.5 * m.a(x).max(1)[0], a=nn.Conv2d(2, 3, 1)),
    "smallest and its place": lambda: Fn(lambda m, x: 0.5 * m.a(x).min(-1, keepdim=True).values, a=nn.Conv2d(2, 3, 1)),
    "standard deviation": lambda: Fn(lambda m, x: m.a(x).std((2, 3)), a=nn.Conv2d(2, 3, 1)),
    g.REDUCTION: lambda: Fn(lambda m, x: m.a(x).norm(dim=1), a=nn.Conv2d(2, 3, 1)),
}


def test_tables_have_every_kind() -> None:
    assert set(signed.TABLE) == KINDS
    assert set(TABLE) | {g.REARRANGE} == KINDS


def example(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Float64: a model, images and a seed of both signs."""
    if name in CASES:
        _, model, images, seed = build(name)
        return model, images, seed
    torch.manual_seed(0)
    model, images = OTHERS[name]().double().eval(), torch.randn(BATCH, 2, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        return model, images, torch.randn_like(model(images))


# What the definition of a rule leaves out, in its words.
REFUSALS = {
    "gradient-x-input": "is the network's gradient, and div reads a statistic of the images",
    "lrp-undivided": "is for networks of layers, BatchNorm, activations, pools and sums, and has no pull-back for "
    "(attention|softmax|matmul|mul|bilinear|div|shift|reduction|layer_norm|rms_norm|group_norm)",
}
STATISTICS = {"division by a statistic", "division by a statistic in a network"}


@pytest.mark.parametrize("name", [*sorted(CASES), *OTHERS])
def test_gradient_x_input_is_autograd_s(name: str) -> None:
    model, x, seed = example(name)
    if name in STATISTICS:
        with pytest.raises(UnsupportedModelError, match=REFUSALS["gradient-x-input"]):
            Engine(model, "gradient-x-input", "float64", input_shape=tuple(x.shape[1:]))
        return
    engine = Engine(model, "gradient-x-input", "float64", input_shape=tuple(x.shape[1:]))
    found = engine.attribute(x, seed, "none", "none").maps
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model(given) * seed).sum(), given)
    assert (found - x * gradient).norm() < 1e-9 * (x * gradient).norm()


@pytest.mark.parametrize("name", [*sorted(CASES), *OTHERS])
def test_a_map_or_a_reason(name: str) -> None:
    """Under "mixed": finite, not zero, and the same for an image alone."""
    model, x, seed = example(name)
    x, seed = x.float(), seed.float()
    model = model.float()
    try:
        for rule in ("attnlrp", "ramp", "lrp-undivided"):
            refusal = ""
            try:
                engine = Engine(model, rule, input_shape=tuple(x.shape[1:]))
            except UnsupportedModelError as error:
                refusal = str(error)
            if refusal:
                assert rule in REFUSALS, refusal
                assert re.search(REFUSALS[rule], refusal)
                continue
            found = engine.attribute(x, seed, "none", "none").maps
            assert found.isfinite().all()
            assert found.any()
            assert torch.equal(found[1:], engine.attribute(x[1:], seed[1:], "none", "none").maps)
    finally:
        model.double()  # `build` keeps it
