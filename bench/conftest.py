"""How a benchmark is set against the model's forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def against_forward(benchmark: Any) -> Callable[..., Any]:
    """A function that benchmarks a call and puts ``forward_seconds`` and ``ratio`` into ``extra_info``.

    Rounds alternate with the model's forward pass, so that both see the same machine; medians are compared.
    """

    def measure(call: Callable[[], Any], model: nn.Module, images: Tensor, rounds: int, warmup: bool = True) -> Any:
        forward: list[float] = []

        def time_forward() -> None:
            start = time.perf_counter()
            with torch.no_grad():
                model(images)
            forward.append(time.perf_counter() - start)

        result = benchmark.pedantic(call, setup=time_forward, rounds=rounds, warmup_rounds=int(warmup))
        base, median = statistics.median(forward[-rounds:]), benchmark.stats.stats.median
        benchmark.extra_info.update(forward_seconds=base, ratio=median / base)
        print(f"\n{benchmark.name}: forward {base:.3f} s, call {median:.3f} s, {median / base:.2f} times")
        return result

    return measure
