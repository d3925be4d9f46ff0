"""Copies beside the computation, on simulated streams: what is enqueued runs as late or as oddly ordered as may be."""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import CLASSES, FAMILIES, images
from torch import Tensor

from ramp_fast import Engine
from ramp_fast.runtime import host_copies as transfer

CPU = torch.device("cpu")


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.done = stream, False

    def synchronize(self) -> None:
        self.stream.device.log.append("wait")
        self.stream.device.run_until(self)


class Stream:
    """Runs what is enqueued in order; a wait is a place in the queue that only a finished event lets pass."""

    def __init__(self, device: Device, name: str, immediate: bool = False) -> None:
        self.device, self.name, self.immediate = device, name, immediate
        self.queue: deque[Event | Callable[[], object]] = deque()

    def enqueue(self, work: Event | Callable[[], object]) -> None:
        self.queue.append(work)
        if self.immediate:
            while self.queue:
                self.advance(force=True)
        self.device.some_time()

    def wait_event(self, event: Event) -> None:
        self.device.waits.append((self.name, event.stream.name))
        self.enqueue(event)

    def record_event(self) -> Event:
        event = Event(self)
        self.enqueue(lambda: setattr(event, "done", True))
        return event

    def advance(self, force: bool = False) -> None:
        work = self.queue[0]
        if isinstance(work, Event):
            if not work.done and not force:
                return
            self.device.run_until(work)
        self.queue.popleft()
        if not isinstance(work, Event):
            work()


class Device:
    """A device with its streams and its memory, which is handed out again in the order of the stream it is for."""

    def __init__(self, seed: int | None, immediate: bool) -> None:
        self.random = random.Random(seed) if seed is not None else None
        self.log: list[str] = []
        self.waits: list[tuple[str, str]] = []
        self.computing = self.current = Stream(self, "computing", immediate)
        self.streams = [self.computing]
        self.memory: dict[int, tuple[Tensor, Stream, list[Stream]]] = {}

    def run_until(self, event: Event) -> None:
        while not event.done:
            event.stream.advance(force=True)

    def some_time(self) -> None:
        """Let any stream get on, or, without a seed, none."""
        while self.random is not None and self.random.random() < 0.6:
            stream = self.random.choice(self.streams)
            if stream.queue:
                stream.advance()

    # What transfer.py knows as torch.cuda

    def Stream(self, device: object) -> Stream:
        self.streams.append(Stream(self, ("h2d", "d2h")[len(self.streams) - 1]))
        return self.streams[-1]

    def current_stream(self, device: object) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def allocate(self, *shape: Any, **options: Any) -> Tensor:
        """Memory that its last user may write to until the current stream gets here, and the next one later on."""
        base = new(*shape, **options)
        tensor = base[:]
        key, stream, users = id(tensor), self.current, []
        stream.enqueue(lambda: spoil(base))
        self.memory[key] = base, stream, users

        def freed() -> None:
            del self.memory[key]
            for user in users:
                stream.enqueue(user.record_event())
            stream.enqueue(lambda: spoil(base))

        weakref.finalize(tensor, freed)
        return tensor

    def record(self, tensor: Tensor, stream: Stream) -> None:
        if id(tensor) in self.memory:
            self.memory[id(tensor)][2].append(stream)

    def base(self, tensor: Tensor) -> Tensor:
        """The same memory; what is enqueued must not keep the tensor alive."""
        return self.memory[id(tensor)][0] if id(tensor) in self.memory else tensor

    def copy(self, target: Tensor, source: Tensor) -> None:
        target, source = self.base(target), self.base(source)
        self.current.enqueue(lambda: target.copy_(source))


new = torch.empty


def spoil(tensor: Tensor) -> Tensor:
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


def simulated(monkeypatch: pytest.MonkeyPatch, seed: int | None = None, immediate: bool = False) -> Device:
    device = Device(seed, immediate)
    transfer._streams.cache_clear()
    monkeypatch.setattr(transfer, "cuda", device)
    monkeypatch.setattr(transfer, "_copy", device.copy)
    monkeypatch.setattr(transfer, "_overlaps", lambda *_: True)
    monkeypatch.setattr(transfer, "_page_locked", lambda shape, dtype: spoil(new(shape, dtype=dtype)))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: device.record(tensor, stream))
    return device


@pytest.fixture(autouse=True)
def _streams_forgotten() -> Iterator[None]:
    yield
    transfer._streams.cache_clear()


SIZES = (3, 3, 3, 3, 2)


def given() -> list[tuple[Tensor, ...]]:
    """Batches in float64, one of them not contiguous, with integers beside them."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in SIZES]
    draws[1] = draws[1].t().contiguous().t()
    return [(draw, torch.arange(len(draw)) + i) for i, draw in enumerate(draws)]


def transferred(device: Device) -> list[tuple[Tensor, ...]]:
    def run(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        device.log.append("run")
        assert x.is_contiguous()
        double, more = torch.empty(x.shape, dtype=x.dtype), torch.empty(ids.shape, dtype=ids.dtype)
        memory = [device.base(t) for t in (x, ids, double, more)]

        def compute() -> None:
            memory[2].copy_(2 * memory[0])
            memory[3].copy_(1 + memory[1])

        device.computing.enqueue(compute)
        return double, more

    return [tuple(t.clone() for t in r) for r in transfer.batches(iter(given()), run, CPU, torch.float32, CPU)]


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_streams_wait_for_each_other(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulated(monkeypatch, seed)
    monkeypatch.setattr(torch, "empty", device.allocate)
    results = transferred(device)
    assert len(results) == len(SIZES)
    for (x, ids), (double, more) in zip(given(), results, strict=True):
        assert torch.equal(double, 2 * x.float())
        assert torch.equal(more, 1 + ids)


def test_the_device_always_has_work(monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulated(monkeypatch)
    send = transfer._send

    def sending(*args: Any) -> Any:
        device.log.append("send")
        return send(*args)

    monkeypatch.setattr(transfer, "_send", sending)
    transferred(device)
    # The host waits once for each batch, when the next one has been launched and the one behind it is on its way.
    assert device.log == [*["send", "run"] * 2, *["send", "wait", "run"] * 3, "wait", "wait"]
    assert len(device.streams) == 3
    # Copies to the device wait for nothing, and those from it for the computation alone.
    assert set(device.waits) == {("computing", "h2d"), ("d2h", "computing")}


def test_page_locked_images_are_copied_from_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    staged: list[torch.Size] = []

    def page_locked(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        staged.append(shape)
        return spoil(new(shape, dtype=dtype))

    monkeypatch.setattr(transfer, "_page_locked", page_locked)
    x = torch.randn(3, 4)
    for batch, copies in (((x,), 1), ((x.double(),), 2), ((x.t(),), 2), ((x, x), 1)):
        staged.clear()
        list(transfer.batches(iter([batch]), lambda x, *_: (x,), CPU, torch.float32, CPU))
        assert len(staged) == copies, batch


def test_only_images_in_host_memory_go_this_way() -> None:
    cuda = torch.device("cuda", 0)
    assert transfer._overlaps(cuda, CPU)
    assert not any(transfer._overlaps(*pair) for pair in ((cuda, cuda), (CPU, CPU), (CPU, cuda)))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "resnet")) for n in FAMILIES])
def test_an_engine_gives_the_same_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(FAMILIES[name](), precision="float32", micro_batch=2)
    batch = images(5)
    batch[3, 0, 1, 1] = torch.nan
    several = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [9, CLASSES]])
    for target, contrast in ((None, "others"), (3, "others"), (several, "none"), (torch.rand(5, CLASSES), "none")):
        expected = engine.attribute(batch, target, contrast, check=False)
        with monkeypatch.context() as patch:
            device = simulated(patch, immediate=True)
            actual = engine.attribute(batch, target, contrast, check=False)
        assert device.log == ["wait"] * 3
        assert actual.maps[3].isnan().all()
        for got, wanted in zip(vars(actual).values(), vars(expected).values(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    model = FAMILIES["vit"]().cuda()
    engine = Engine(model, micro_batch=2)
    host = images(7)
    for _ in range(3):  # as it is, recorded, replayed
        here, there = engine.attribute(host, 1), engine.attribute(host.cuda(), 1)
        assert here.maps.device.type == "cpu"
        assert torch.equal(here.maps, there.maps.cpu())
        assert torch.equal(here.logits, there.logits.cpu())


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_bytes_to_the_device_and_results_to_the_host(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    """As a run over a data set copies: from memory that is written to again, results while the next batch computes."""
    device = simulated(monkeypatch, seed)
    locked: list[tuple[torch.Size, torch.dtype]] = []
    in_page_locked = transfer._page_locked

    def page_locked(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        locked.append((shape, dtype))
        return in_page_locked(shape, dtype)

    monkeypatch.setattr(transfer, "_page_locked", page_locked)
    monkeypatch.setattr(torch, "empty", device.allocate)
    ring = new(2, 3, dtype=torch.uint8)
    given = [torch.tensor([[k, k + 1, k + 2], [k + 3, k + 4, k + 5]], dtype=torch.uint8) for k in range(5)]
    waiting, found = None, []
    for batch in given:
        ring.copy_(batch)
        moved = transfer.to_device(ring, CPU)
        assert moved.dtype == torch.uint8
        ring.fill_(99)
        result = device.allocate(2, 3)
        base, source = device.base(result), device.base(moved)
        device.computing.enqueue(lambda base=base, source=source: base.copy_(source.float() * 2))
        fetched = transfer.to_host((result,), CPU)
        del moved, result, base, source
        if waiting is not None:
            found.append(waiting.wait()[0].clone())
        waiting = fetched
    assert waiting is not None
    found.append(waiting.wait()[0].clone())
    for batch, got in zip(given, found, strict=True):
        assert torch.equal(got, batch.float() * 2)
    assert locked == [(torch.Size([2, 3]), torch.uint8), (torch.Size([2, 3]), torch.float32)] * 5


def test_without_a_gpu_there_is_nothing_to_wait_for() -> None:
    tensor = torch.arange(4, dtype=torch.uint8)
    assert transfer.to_device(tensor, CPU) is tensor
    (found,) = transfer.to_host((tensor,), CPU).wait()
    assert found is tensor
