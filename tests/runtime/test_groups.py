"""How a batch is divided into groups of images that go through a plan together."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ramp_fast import Engine
from ramp_fast.runtime import groups
from ramp_fast.runtime.groups import Groups


class _Plan:
    """What :class:`Groups` asks of a plan."""

    def __init__(self, kept: int, dtype: torch.dtype = torch.float32) -> None:
        self.steps, self.kept = [None], kept
        self.precision = SimpleNamespace(forward=dtype)

    def kept_bytes(self, step: None) -> int:
        return self.kept


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Trials, which all pay: the size of the group and what it was compared with."""
    found: list[tuple[int, list[int]]] = []

    def pays(plan: Any, shape: Any, group: int, others: list[int], targets: int, contrast: bool) -> bool:
        found.append((group, others))
        return True

    monkeypatch.setattr(groups, "_pays", pays)
    return found


def sizes(several: Groups, batch: int, most: int = 100, kept: int = 1) -> list[int]:
    return several.sizes(_Plan(kept), torch.Size([batch, 3, 8, 8]), most, 1, True)  # type: ignore[arg-type]


def test_trials_wait_until_they_are_worth_it(tried: list[tuple[int, list[int]]]) -> None:
    several = Groups()
    assert sizes(several, 8) == [1] * 8
    assert not tried
    assert sizes(several, 8) == [4, 4]  # 16 images have been asked for
    assert sizes(several, 8) == [4, 4]
    assert sizes(several, 13) == [8, 4, 1]
    assert tried == [(4, [1, 1, 1, 1]), (8, [4, 4])]


def test_two_are_for_two_or_three(tried: list[tuple[int, list[int]]]) -> None:
    several = Groups()
    assert [sizes(several, 2) for _ in range(4)] == [[1, 1], [1, 1], [1, 1], [2]]
    assert sizes(several, 3) == [2, 1]
    assert tried == [(2, [1, 1])]


def test_no_group_is_larger_than_asked_for_or_than_memory_allows(tried: list[tuple[int, list[int]]]) -> None:
    several = Groups()
    assert sizes(several, 100) == [8] * 12 + [4]
    assert sizes(several, 9, most=7) == [4, 4, 1]
    assert sizes(several, 9, most=1) == [1] * 9
    assert sizes(several, 9, most=3) == [2] * 4 + [1]
    assert sizes(Groups(), 100, kept=2**25 + 1) == [4] * 25


@pytest.mark.parametrize("wrong", ["never", "always", "seldom"])
def test_a_size_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    run = groups.run_logits

    def of_a_group(plan: Any, images: torch.Tensor) -> torch.Tensor:
        seen = wrong == "always" or (wrong == "seldom" and bool(images[0, 0, 0, 0] > 1))
        return run(plan, images) + (len(images) == 8 and seen)

    engine = Engine(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval(), precision="float32")
    engine.logits(torch.randn(1, 3, 2, 2))
    monkeypatch.setattr(groups, "run_logits", of_a_group)

    # Every trial reads the clock three times in each round: its group takes one second, what it is compared with 100.
    ticks = itertools.accumulate(itertools.cycle((1000.0, 1.0, 100.0)))
    monkeypatch.setattr(groups.time, "perf_counter", lambda: next(ticks))
    assert Groups().sizes(engine.plan, torch.Size([64, 3, 2, 2]), 64, 0, False) == (
        [8] * 8 if wrong == "never" else [4] * 16
    )


def test_float64_images_go_one_by_one(tried: list[tuple[int, list[int]]]) -> None:
    """Their bits depend on their place in the batch, which a trial on noise need not show."""
    plan: Any = _Plan(1, torch.float64)
    assert Groups().sizes(plan, torch.Size([64, 3, 8, 8]), 64, 1, True) == [1] * 64
    assert not tried
