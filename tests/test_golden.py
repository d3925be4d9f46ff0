"""The engine against the maps in golden/: five small networks, both rules, three precisions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ramp_fast import Engine, ops

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

import recipe  # noqa: E402  # scripts beside the files that they explain, not a package
from agreement import RULES, TOLERANCE, error, expected  # noqa: E402

build = lru_cache(maxsize=1)(recipe.build)


def check(actual: Tensor, reference: Tensor, precision: str, what: str) -> None:
    assert actual.shape == reference.shape
    found = error(actual, reference)
    assert found < TOLERANCE[precision, what], f"{what} in {precision}: relative error {found:.2e}"  # NaN fails too


@pytest.fixture(params=recipe.CASES, scope="module")
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("rule", RULES)
def test_float64(case: str, rule: str) -> None:
    model, images, target = build(case)
    golden, prefix = expected(case), RULES[rule]
    engine = Engine(model, rule=rule, precision="float64")
    positive = engine.attribute(images, target, contrast="none", normalize="sum")
    check(positive.logits, golden["logits"], "float64", "logits")
    check(positive.maps, golden[prefix + "positive"], "float64", "map")
    classes = positive.logits.shape[1]
    others = (1 - F.one_hot(target, classes).double()) / (classes - 1)
    negative = engine.attribute(images, others, contrast="none", normalize="sum").maps
    if prefix:
        check(negative, golden["release_negative"], "float64", "map")
    pair = positive.maps - negative
    relevance = golden[prefix + "relevance"]
    check(pair / pair.abs().flatten(1).amax(1).view(-1, 1, 1, 1), relevance, "float64", "relevance")
    check(engine.attribute(images, target).maps, relevance, "float64", "relevance")


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("rule", RULES)
def test_reduced_precision(case: str, rule: str, precision: str) -> None:
    model, images, target = build(case)
    maps = Engine(model, rule=rule, precision=precision).attribute(images.float(), target).maps
    assert maps.dtype == torch.float32
    check(maps, expected(case)[RULES[rule] + "relevance"], precision, "relevance")


@pytest.mark.parametrize("isa", ops.cpu_isas())
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_every_instruction_set(case: str, precision: str, isa: str, best_isa_afterwards: None) -> None:
    ops.set_cpu_isa(isa)
    model, images, target = build(case)
    maps = Engine(model, precision=precision).attribute(images.float(), target).maps
    check(maps, expected(case)["relevance"], precision, "relevance")


@pytest.fixture
def best_isa_afterwards() -> Iterator[None]:
    yield
    if ops.cpu_isas():
        ops.set_cpu_isa(ops.cpu_isas()[-1])


def test_the_rules_differ() -> None:
    """With junctions the two rules give different maps; a plain chain has none."""
    assert error(expected("vit")["release_positive"], expected("vit")["positive"]) > 0.1
    assert error(expected("vgg")["release_positive"], expected("vgg")["positive"]) < 1e-7
