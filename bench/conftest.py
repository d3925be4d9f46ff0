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
    """A function that benchmarks a call: ``forward_seconds``, ``forward_spread``, ``ratio`` go into ``extra_info``.

    The model's forward pass runs before every round and after the last, so that both see the same machine; medians
    are compared. The spread is the slowest forward pass over the fastest: well above one, the machine was shared
    unevenly and the ratio says little, above all where a single round was timed.
    """

    def measure(call: Callable[[], Any], model: nn.Module, images: Tensor, rounds: int, warmup: bool = True) -> Any:
        forward: list[float] = []

        def time_forward() -> None:
            start = time.perf_counter()
            with torch.no_grad():
                model(images)
            forward.append(time.perf_counter() - start)

        result = benchmark.pedantic(call, setup=time_forward, rounds=rounds, warmup_rounds=int(warmup))
        time_forward()
        around = forward[-rounds - 1 :]
        base, median, spread = statistics.median(around), benchmark.stats.stats.median, max(around) / min(around)
        benchmark.extra_info.update(forward_seconds=base, forward_spread=spread, ratio=median / base)
        print(
            f"\n{benchmark.name}: forward {base:.3f} s (spread {spread:.2f}), call {median:.3f} s, {median / base:.2f}x"
        )
        return result

    return measure
