"""What is measured on a GPU, without one: ways to multiply, and configurations of the Triton kernels."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton exists for Linux on x86_64 and aarch64 only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have one configuration", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import autotuner  # noqa: E402

from ramp_fast.kernels import attention, choice, common, linear  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_CHOSEN", {})


class Timer:
    """Says how long a call takes, whose result is its name, and remembers what it was asked."""

    def __init__(self, **times: float) -> None:
        self.times, self.asked = times, []

    def __call__(self, call: Any) -> float:
        self.asked.append(call())
        return self.times[self.asked[-1]]


WAYS = {"a": lambda: "a", "b": lambda: "b"}


def test_the_fastest_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(a=2.0, b=1.0)
    monkeypatch.setattr(choice, "milliseconds", timer)
    assert [choice.fastest(("key", 1), WAYS) for _ in range(3)] == ["b"] * 3
    assert timer.asked == ["a", "b"]
    timer.times = {"a": 1.0, "b": 2.0}
    assert choice.fastest(("key", 2), WAYS) == "a"  # another key
    choice._CHOSEN.clear()  # another process, where measuring would say something else
    assert choice.fastest(("key", 1), WAYS) == "b"
    assert timer.asked == ["a", "b"] * 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fastest": "c"}'])
def test_what_is_damaged_is_measured_again(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(a=1.0, b=2.0)
    monkeypatch.setattr(choice, "milliseconds", timer)
    choice.fastest(("key",), WAYS)
    (file,) = tmp_path.rglob(choice.FILE)
    file.write_text(text)
    choice._CHOSEN.clear()
    assert choice.fastest(("key",), WAYS) == "a"
    assert timer.asked == ["a", "b"] * 2


def test_where_memory_is_short_the_first_is_taken_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(call: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(choice, "milliseconds", short)
        assert choice.fastest(("key",), WAYS) == "a"
    monkeypatch.setattr(choice, "milliseconds", Timer(a=2.0, b=1.0))
    assert choice.fastest(("key",), WAYS) == "b"


class Tuner:
    """Triton's autotuner on an H100 that is not there: how long configurations take, and what was launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slow: set[int] = set()  # rows of tiles
        self.tried: list[triton.Config] = []
        self.launched: list[dict[str, Any]] = []
        active = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
        monkeypatch.setattr(autotuner, "driver", SimpleNamespace(active=active))
        monkeypatch.setattr(autotuner.Autotuner, "_bench", self.bench)
        for kernel in (linear.linear_pullback_kernel, attention.queries_kernel, attention.keys_kernel):
            monkeypatch.setattr(kernel, "run", lambda *args, **options: self.launched.append(options))
        self.on(monkeypatch, 227, 9)
        common.tuned.cache_clear()

    def on(self, monkeypatch: pytest.MonkeyPatch, kilobytes: int, major: int) -> None:
        device = SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024, major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)

    def bench(self, *args: Any, config: triton.Config, **meta: Any) -> list[float]:
        self.tried.append(config)
        return [2.0 if config.kwargs["BLOCK_M"] in self.slow else 1.0] * 3


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield Tuner(monkeypatch)
    common.tuned.cache_clear()


def pull(width: int, rows: int) -> None:
    c, x = torch.zeros(2, 1, rows, 8, dtype=torch.bfloat16), torch.zeros(1, rows, width)
    panels, out = torch.zeros(width, 2, 8, dtype=torch.bfloat16), torch.zeros(2, 1, rows, width)
    linear._launch(c, panels, x, out, (), None, 1, False)


def test_configurations_are_tried_once_and_kept(tuner: Tuner) -> None:
    configs = linear.offered(linear.CONFIGS[torch.bfloat16], 9, 16)
    tuner.slow = {128}
    pull(256, 7)
    assert tuner.tried == configs
    assert tuner.launched[-1]["BLOCK_M"] == 64
    pull(256, 9)  # whatever the batch
    assert tuner.tried == configs
    common.tuned.cache_clear()  # another process, where trying would say something else
    tuner.slow = {64}
    pull(256, 7)
    assert tuner.tried == configs
    assert tuner.launched[-1]["BLOCK_M"] == 64
    pull(512, 7)  # another layer
    assert tuner.tried == configs * 2
    assert tuner.launched[-1]["BLOCK_M"] == 128


def test_what_cannot_win_is_not_tried(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(width: int) -> list[tuple[int, int, int]]:
        tuner.tried.clear()
        common.tuned.cache_clear()
        pull(width, 7)
        return [(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_stages) for c in tuner.tried]

    tuner.on(monkeypatch, 163, 8)
    assert tried(50) == [(128, 64, 4), (64, 64, 4)]  # no wider than the layer
    tuner.on(monkeypatch, 99, 8)  # sm_86 and sm_89; of the tiles in flight one is in registers
    assert tried(1000) == [(128, 128, 3), (128, 64, 4), (64, 64, 4)]
    tuner.on(monkeypatch, 16, 8)
    assert tried(1001) in ([], [(64, 64, 4)])  # one is left; Triton 3.6 tries it all the same
    assert (tuner.launched[-1]["BLOCK_M"], tuner.launched[-1]["BLOCK_N"]) == (64, 64)


@pytest.mark.skipif(not linear.DESCRIPTORS, reason="this Triton has no tensor descriptors")
def test_descriptors_are_tried_where_they_exist() -> None:
    def offered(major: int, row: int) -> list[bool]:
        return [c.kwargs["DESCRIBED"] for c in linear.offered(linear.CONFIGS[torch.bfloat16], major, row)]

    assert offered(9, 32) == [False] * 5 + [True] * 2
    assert offered(8, 32) == offered(9, 24) == [False] * 5


def test_attention_is_tuned_without_another_order_of_sums(tuner: Tuner) -> None:
    for capability in (80, 90, 100):
        for width in (16, 64, 128):
            for parts in (1, 3):
                configs = attention.configs(capability, width, parts)
                assert len(configs) > (capability != 100 or width < 128 or parts == 3)
                assert len({tuple(c.kwargs.items()) for c in configs}) == 1
    configs = list(attention.configs(80, 64, 1))
    assert [(c.num_warps, c.num_stages) for c in configs] == [(4, 2), (4, 3), (8, 2)]
    assert attention.lasting(configs, {}, QUERY_ROWS=96, KEY_ROWS=128) == configs
    assert attention.lasting(configs, {}, QUERY_ROWS=64, KEY_ROWS=128) == [configs[0], configs[2]]
    assert attention.lasting(configs, {}, QUERY_ROWS=32, KEY_ROWS=32) == configs[:1]
