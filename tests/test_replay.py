"""CUDA graphs without a GPU: what is recorded and replayed, with a recorder that calls the function again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import CLASSES, FAMILIES, images
from torch import Tensor

from ramp_fast import Engine, replay
from ramp_fast import engine as engine_module

Outputs = tuple[Tensor, ...]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the recorder did; replays overwrite the same outputs from the same inputs, as graphs do."""
    done: list[str] = []

    def record(function: replay.Function, inputs: Outputs) -> tuple[Outputs, Callable[[], None]]:
        outputs = function(*inputs)
        done.append("record")
        for output in outputs:
            output.zero_()  # recording computes nothing

        def again() -> None:
            done.append("replay")
            for output, value in zip(outputs, function(*inputs), strict=True):
                output.copy_(value)

        return outputs, again

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(engine_module, "records", lambda tensor: tensor.numel() > 0)
    return done


def test_the_second_call_is_recorded_and_replayed_from_then_on(log: list[str]) -> None:
    calls = 0

    def function(a: Tensor, b: Tensor) -> Outputs:
        nonlocal calls
        calls += 1
        return a + b, a * b

    recordings = replay.Recordings()
    results = [recordings.call("key", function, (torch.full((3,), float(i)), torch.ones(3))) for i in range(4)]
    assert log == ["record", "replay", "replay", "replay"]
    for i, (total, product) in enumerate(results):  # the caller's own: later replays do not show
        assert torch.equal(total, torch.full((3,), i + 1.0))
        assert torch.equal(product, torch.full((3,), float(i)))


@pytest.mark.parametrize("change", ["key", "shape", "dtype", "stream"])
def test_what_differs_is_recorded_apart(change: str, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = replay.Recordings()

    def call(key: str = "key", shape: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        # a function of its own each time, as the engine's are: the key stands for it
        (out,) = recordings.call(key, lambda a: (a + len(key),), (torch.ones(shape, dtype=dtype),))
        return out

    call()
    call()
    log.clear()
    if change == "stream":
        monkeypatch.setattr(replay, "stream_of", lambda device: 7)
        other = call
    else:
        other = {
            "key": lambda: call(key="other"),
            "shape": lambda: call(shape=4),
            "dtype": lambda: call(dtype=torch.float64),
        }[change]
    expected = other()
    assert log == []
    assert torch.equal(other(), expected)
    assert log == ["record", "replay"]


def test_only_the_last_recordings_are_kept(log: list[str]) -> None:
    recordings = replay.Recordings()
    for size in [*range(1, replay.LIMIT + 2)] * 2:
        recordings.call("key", lambda a: (a + 1,), (torch.ones(size),))
    log.clear()
    recordings.call("key", lambda a: (a + 1,), (torch.ones(replay.LIMIT + 1),))
    assert log == ["replay"]
    recordings.call("key", lambda a: (a + 1,), (torch.ones(1),))
    assert log == ["replay", "record", "replay"]


def test_what_cannot_be_recorded_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(function: replay.Function, inputs: Outputs) -> tuple[Outputs, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "record", record)
    recordings = replay.Recordings()
    x = torch.ones(3)
    recordings.call("key", lambda a: (a + 1,), (x,))
    with pytest.warns(RuntimeWarning, match="runs without: operation not permitted"):
        (out,) = recordings.call("key", lambda a: (a + 1,), (x,))
    assert torch.equal(out, x + 1)
    (out,) = recordings.call("key", lambda a: (a + 1,), (x,))  # without a second warning
    assert torch.equal(out, x + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_gives_the_same_maps_from_recordings(name: str, log: list[str]) -> None:
    model = FAMILIES[name]()
    plain = Engine(model, precision="float32", micro_batch=2, cuda_graphs=False)
    engine = Engine(model, precision="float32", micro_batch=2)
    several = torch.tensor([[1, 2], [3, 4], [5, 6]])
    for target, contrast in ((None, "others"), (3, "others"), (several, "none"), (torch.rand(3, CLASSES), "none")):
        for seed in range(3):
            batch = images(3, seed=seed)
            done = len(log)
            expected = plain.attribute(batch, target, contrast)
            assert len(log) == done  # switched off
            actual = engine.attribute(batch, target, contrast)
            assert torch.equal(actual.maps, expected.maps)
            assert torch.equal(actual.logits, expected.logits)
            assert torch.equal(actual.target, expected.target)
    assert log.count("record") == 8  # two batch shapes for each of the four
    assert log.count("replay") == 16


def test_new_weights_are_recorded_anew(log: list[str]) -> None:
    model = FAMILIES["vgg"]()
    engine = Engine(model, precision="float32", micro_batch=2)
    for _ in range(3):
        before = engine.attribute(images(2), 1)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(-1)
    for _ in range(3):
        after = engine.attribute(images(2), 1)
        expected = Engine(model, precision="float32", micro_batch=2, cuda_graphs=False).attribute(images(2), 1)
        assert torch.equal(after.maps, expected.maps)
    assert not torch.equal(after.maps, before.maps)
    assert log.count("record") == 2
