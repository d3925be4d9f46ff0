"""What stands between operations and library routines."""

from __future__ import annotations

import pytest
import torch
from small_models import FAMILIES, images

from ramp_fast import Engine, gemm, ops


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1, 1, 1]), (7, [1, 1, 1]), (8, [3])])
def test_samples_with_few_rows_go_alone(rows: int, sizes: list[int]) -> None:
    seen: list[int] = []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(a.shape[1])
        return a + b

    a, b = torch.randn(2, 3, rows, 5), torch.randn(2, 3, rows, 5)
    assert torch.equal(gemm.by_sample(product, rows, (a, b), 1), a + b)
    assert seen == sizes


def test_the_head_sees_one_sample_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    plain = gemm.Matrix.__call__

    def watched(self: gemm.Matrix, x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return plain(self, x)

    monkeypatch.setattr(gemm.Matrix, "__call__", watched)
    Engine(FAMILIES["vit"](), precision="float32", micro_batch=4).attribute(images(4), 3)
    heads = [shape for shape in seen if len(shape) == 2]  # class token only
    assert heads
    assert all(shape[0] == 1 for shape in heads)


@pytest.mark.skipif(not ops.has_tiles(), reason="products on tile registers (AMX) only")
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_pixels_are_products(stride: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(5, 130, 1, 1), torch.randn(5), torch.randn(2, 130, 7, 6)
    geometry = gemm.Geometry([stride, stride], [0, 0], [1, 1], 1)
    forward = gemm.convolution(weight, bias, geometry)
    assert forward.kernel == "product-float32"
    expected = torch.nn.functional.conv2d(x, weight, bias, stride)
    for batch in (x, x.contiguous(memory_format=torch.channels_last)):
        y = forward(batch)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)

    other = gemm.Geometry([stride, stride], [1, 0], [1, 1], 1)  # padded
    assert gemm.convolution(weight, bias, other).kernel == "onednn-float32"
    assert gemm.convolution(weight[:, :100], bias, geometry).kernel == "onednn-float32"  # few channels
    assert gemm.convolution(weight.bfloat16(), bias, geometry).kernel == "onednn-bfloat16"
    pull = gemm.ConvPullback(torch.randn(130, 3, 1, 1), gemm.Geometry([1, 1], [0, 0], [1, 1], 1), (7, 6))
    assert pull.kernel == "product-float32"
    assert pull(x).shape == (2, 3, 7, 6)
