"""Engines in several Python threads: captures, runs and weights that change do not disturb one another."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_models import FAMILIES, images, vgg, vit
from torch import Tensor, nn

from ramp_fast import Engine
from ramp_fast.ops import _registry
from ramp_fast.runtime import targets
from ramp_fast.runtime.run import Forward


def test_engines_are_built_at_the_same_time() -> None:
    shared = vgg()
    models = [shared, vit(), shared]
    x = images()
    expected = [Engine(model).attribute(x, 1).maps for model in models]

    def build(model: nn.Module) -> Tensor:
        return Engine(model).attribute(x, 1).maps

    with ThreadPoolExecutor(len(models)) as pool:
        for got, want in zip(pool.map(build, models), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_several_sizes_share_an_engine(family: str) -> None:
    # packed weights depend on the number of images that go through the model together
    engine = Engine(FAMILIES[family](), micro_batch=3)
    batches = [images(count, seed=count) for count in (1, 2, 3, 4, 5)]
    expected = [engine.attribute(x, 1).maps for x in batches]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda x: engine.attribute(x, 1).maps, batches * 4)
        for got, want in zip(results, expected * 4, strict=True):
            assert torch.equal(got, want)


def test_a_run_keeps_the_weights_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vgg(), images(1)
    engine = Engine(model)
    old = engine.attribute(x, 1).maps
    begun, changed = threading.Event(), threading.Event()
    run_forward = targets.run_forward

    def run_later(*arguments: Any, **options: Any) -> Forward:
        if not begun.is_set():
            begun.set()
            assert changed.wait(60)
        return run_forward(*arguments, **options)

    monkeypatch.setattr(targets, "run_forward", run_later)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: engine.attribute(x, 1).maps)
        assert begun.wait(60)
        model[0].weight = nn.Parameter(-model[0].weight.detach())
        new = engine.attribute(x, 1).maps
        changed.set()
        assert torch.equal(running.result(), old)
    assert not torch.equal(new, old)


@pytest.mark.skipif(not _registry.openmp_pool, reason="asks the OpenMP library of torch")
def test_a_new_thread_runs_with_the_number_of_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    openmp = ctypes.CDLL(_registry.openmp_pool)
    engine, x = Engine(vgg()), images(1)
    run_forward, seen = targets.run_forward, []

    def watched(*arguments: Any, **options: Any) -> Forward:
        seen.append(openmp.omp_get_max_threads())
        return run_forward(*arguments, **options)

    monkeypatch.setattr(targets, "run_forward", watched)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(engine.attribute, x, 1).result()
    finally:
        torch.set_num_threads(threads)
    assert seen == [threads + 1]
