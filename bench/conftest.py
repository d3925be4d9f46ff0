"""How a benchmark is set against the model's forward pass, and ``--results NAME``, which writes what was measured.

NAME is a short name of the machine. The file is ``bench/results/NAME-COMMIT.json``; ``results_io.py`` describes it. The
commit is that of this checkout: install it before (``pip install .``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import results_io
import torch
from torch import Tensor, nn

_MEASUREMENTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="NAME", help="write bench/results/NAME-COMMIT.json; NAME is of this machine")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASUREMENTS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    found, name = session.config.stash[_MEASUREMENTS], session.config.getoption("--results", None)
    if not (found and name):
        return
    written = results_io.write_here(name, found, "pytest bench")
    print(f"\nwritten to {written}")


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that adds a measurement to the results; its arguments are those of ``results_io.measurement``."""
    found = request.config.stash[_MEASUREMENTS]
    return lambda *args, **options: found.append(results_io.measurement(*args, **options))


@pytest.fixture
def against_forward(benchmark: Any, keep: Callable[..., None]) -> Callable[..., Any]:
    """A function that benchmarks a call: ``forward_seconds``, ``forward_spread``, ``ratio`` go into ``extra_info``.

    In the results it is ``name``/number of images/``method``.

    The model's forward pass runs before every round and after the last, so that both see the same machine; medians
    are compared. The spread is the slowest forward pass over the fastest: well above one, the machine was shared
    unevenly and the ratio says little, above all where a single round was timed.
    """

    def measure(
        call: Callable[[], Any],
        model: nn.Module,
        images: Tensor,
        rounds: int,
        *,
        name: str,
        method: str,
        warmup: bool = True,
    ) -> Any:
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
        times, scale, of = benchmark.stats.stats, 1000 / len(images), f"{name}/{len(images)}/forward"
        keep(
            f"{name}/{len(images)}/{method}",
            scale * median,
            "ms/image",
            rounds=rounds,
            spread=times.max / times.min,
            ratio=median / base,
            ratio_of=of,
            reference=scale * base,
            reference_spread=spread,
        )
        return result

    return measure
