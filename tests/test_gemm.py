"""What stands between operations and library routines."""

from __future__ import annotations

import pytest
import torch
from small_models import FAMILIES, images

from ramp_fast import Engine, gemm


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
