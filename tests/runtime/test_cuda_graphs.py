"""CUDA graphs without a GPU: what is recorded and replayed, with a recorder that calls the function again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from small_models import CLASSES, FAMILIES, images
from torch import Tensor

from ramp_fast import Engine, ops
from ramp_fast import engine as engine_module
from ramp_fast.runtime import cuda_graphs as replay

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


def test_short_memory_is_not_held_against_a_shape(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = replay.Recordings()

    def call() -> None:
        recordings.call("key", lambda a: (a + 1,), (torch.ones(3),))

    def short(function: replay.Function, inputs: Outputs) -> tuple[Outputs, Callable[[], None]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    call()
    with monkeypatch.context() as patch:
        patch.setattr(replay, "record", short)
        call()
    call()
    assert log == ["record", "replay"]


def test_inference_mode_and_its_absence_share_recordings(log: list[str]) -> None:
    recordings = replay.Recordings()
    for inference in (True, True, False, True):
        with torch.inference_mode(inference):
            (out,) = recordings.call("key", lambda a: (a + 1,), (torch.ones(3),))
            assert torch.equal(out, torch.full((3,), 2.0))
    assert log == ["record", "replay", "replay", "replay"]


def test_nothing_is_recorded_before_a_first_call_is_through(log: list[str]) -> None:
    recordings = replay.Recordings()
    nested: list[Tensor] = []

    def function(a: Tensor) -> Outputs:
        if not nested:  # another thread asks while the first call is on its way
            nested.append(a)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(recordings.call, "key", lambda b: (b + 1,), (torch.ones(3),)).result(timeout=30)
            assert log == []
        return (a + 1,)

    recordings.call("key", function, (torch.ones(3),))
    recordings.call("key", function, (torch.ones(3),))
    assert log == ["record", "replay"]


def test_graphs_are_captured_on_their_device_and_for_their_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    @contextmanager
    def graph(recorded: object, **options: object) -> Iterator[None]:
        assert replay._RECORDING.locked()  # one at a time
        seen.update(options)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    inputs = (torch.ones(2, device="meta"),)
    outputs, again = replay.record(lambda a: (a,), inputs)
    assert outputs[0] is inputs[0]
    assert again == "replay"
    assert seen == {"stream": "a stream of meta", "capture_error_mode": "thread_local"}
    assert not replay._RECORDING.locked()


def test_another_backend_is_recorded_apart(log: list[str]) -> None:
    engine = Engine(FAMILIES["vgg"](), precision="float32", micro_batch=2)
    for _ in range(2):
        engine.attribute(images(2), 1)
    log.clear()
    ops.set_backend("reference")
    try:
        engine.attribute(images(2), 1)
    finally:
        ops.set_backend(None)
    assert log == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "resnet")) for n in FAMILIES])
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
