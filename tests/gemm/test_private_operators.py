"""Private operators of PyTorch: with any of them missing results come from public functions, and stay what they are."""

from __future__ import annotations

import pytest
import torch
from small_models import FAMILIES, images
from torch import nn

from ramp_fast import Engine, gemm
from ramp_fast.gemm import private_operators

NAMES = sorted(private_operators._CALLED)


def without(patch: pytest.MonkeyPatch, *names: str) -> None:
    patch.setattr(private_operators, "_FOUND", private_operators._FOUND - set(names))


def test_this_version_has_all_of_them() -> None:
    assert sorted(private_operators._FOUND) == NAMES


def test_an_operator_with_other_arguments_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(private_operators._CALLED, "mkldnn::_linear_pointwise", (99,))
    monkeypatch.setitem(private_operators._CALLED, "mkldnn::no_such_operator", (1,))
    found = private_operators._found()
    assert "mkldnn::_linear_pointwise" not in found
    assert "mkldnn::no_such_operator" not in found
    assert len(found) == len(NAMES) - 1


@pytest.mark.parametrize("missing", [*NAMES, "all"])
def test_products_without_one(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *(NAMES if missing == "all" else [missing]))
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 9, 24), torch.randn(16, 24), torch.randn(16)
    matrix = gemm.Matrix(weight, bias)
    if missing in ("all", "mkldnn::_linear_pointwise") and not matrix.kernel.startswith("product"):
        assert matrix.kernel == "aten-float32"
    torch.testing.assert_close(matrix(x), x @ weight.t() + bias, rtol=1e-4, atol=1e-4)

    geometry = gemm.Geometry([2, 2], [1, 1], [1, 1], 1)
    y, kernel, addend = torch.randn(2, 6, 8, 8), torch.randn(5, 6, 3, 3), torch.randn(2, 5, 4, 4)
    expected = nn.functional.conv2d(y, kernel, None, 2, 1)
    for relu in (False, True):
        convolution = gemm.ConvForward(kernel, None, geometry, relu)
        sums = expected + addend
        torch.testing.assert_close(convolution(y, addend), sums.relu() if relu else sums, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(convolution(y), expected.relu() if relu else expected, rtol=1e-4, atol=1e-4)
    pull = gemm.ConvPullback(kernel, geometry, (8, 8))
    back = nn.functional.conv_transpose2d(addend, kernel, None, 2, 1, 1)
    torch.testing.assert_close(pull(addend), back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_without_any(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Engine(FAMILIES[name](), precision="float32").attribute(images(2), 3).maps
    without(monkeypatch, *NAMES)
    engine = Engine(FAMILIES[name](), precision="float32")
    found = engine.attribute(images(2), 3).maps
    assert not any(step.operation and "onednn" in step.operation.forward_kernel for step in engine.plan.steps)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
