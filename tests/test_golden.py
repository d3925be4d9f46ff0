"""The engine against the maps in golden/: five small networks, both rules, three precisions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_once import export_once  # noqa: F401  # a fixture
from torch import Tensor

from ramp_fast import Engine, ops

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

import recipe  # noqa: E402  # a script beside the files that it explains, not a package

RULES = {"abslrp": "", "abslrp-release": "release_"}

# Norm of the difference over the norm of what is expected, largest of the batch.
TOLERANCE = {
    # stored in float32 (half a unit in the last place: 3e-8), and the stabilizer of 1e-9, absent from the files
    ("float64", "map"): 1e-6,
    # the difference of two nearly equal maps: ten times that
    ("float64", "relevance"): 1e-5,
    # 24-bit rounding through six blocks, magnified by the smallest logit of the uniform seed (about 0.01)
    ("float32", "relevance"): 1e-2,
    # 8-bit rounding (4e-3) of coefficients in every product, averaged over their many terms
    ("mixed", "relevance"): 3e-2,
    ("float64", "logits"): 1e-6,
}


build = lru_cache(maxsize=1)(recipe.build)


@cache
def expected(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"abslrp_{case}.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]).double() for name in file.files}


def error(actual: Tensor, reference: Tensor) -> float:
    difference = (actual.double() - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return float(difference.max())


def check(actual: Tensor, reference: Tensor, precision: str, what: str) -> None:
    assert actual.shape == reference.shape
    found = error(actual, reference)
    assert found < TOLERANCE[precision, what], f"{what} in {precision}: relative error {found:.2e}"  # NaN fails too


@pytest.fixture(params=recipe.CASES, scope="module")  # grouped by network: each is exported once
def case(request: pytest.FixtureRequest, export_once: None) -> str:  # noqa: F811
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
