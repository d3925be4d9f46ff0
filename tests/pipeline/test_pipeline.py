"""Runs: what is stored is what the engine says of each image, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stub_run
import torch
from store_of_ramps import contents
from stub_run import StubEngine, photographs, run
from torch import Tensor

from ramp_fast.data import Preprocessing, read_image
from ramp_fast.errors import InputError, RampFastError
from ramp_fast.pipeline.encoding import encode
from ramp_fast.pipeline.targets import Targets
from ramp_fast.results import StoreError, open_maps
from ramp_fast.results.map_writer import ShardWriter
from ramp_fast.runtime import host_copies


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = photographs(tmp_path_factory.mktemp("data") / "photos", 11)
    (path / "05.png").write_bytes(b"no image")
    return path


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "store"
    run(folder, out)
    return out


class TestEncoding:
    @pytest.mark.parametrize("channels", [False, True])
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-12), ("int8", 0.5 / 127), ("float32", 0.0)])
    def test_relevance_comes_back(self, dtype: str, error: float, several: bool, channels: bool) -> None:
        maps = torch.randn((4, 2, 3, 5, 6) if several else (4, 3, 5, 6), generator=torch.Generator().manual_seed(0))
        maps *= torch.logspace(-6, 3, 4).reshape(-1, *(1,) * (maps.dim() - 1))
        wanted = maps if channels else maps.sum(-3)
        values, scale, finite = encode(maps, dtype, channels)
        assert values.dtype == getattr(torch, dtype)
        assert finite.tolist() == [True] * 4
        lead = 2 if several else 1
        back = values.float() * scale.reshape(*scale.shape, *(1,) * (values.dim() - scale.dim()))
        largest = wanted.flatten(lead).abs().amax(-1)
        worst = (back - wanted).flatten(lead).abs().amax(-1) / largest
        assert worst.max() <= error + 3e-7

    def test_a_map_of_zeros(self) -> None:
        values, scale, finite = encode(torch.zeros(1, 3, 2, 2), "float16", False)
        assert (values.abs().sum(), scale.item(), finite.item()) == (0, 0, True)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite(self, bad: float) -> None:
        maps = torch.randn(3, 2, 3, 4, 4)
        maps[1, 1, 2, 0, 3] = bad
        for dtype in ("float16", "float32", "int8"):
            assert encode(maps, dtype, False)[2].tolist() == [True, False, True]

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        maps = torch.randn(5, 3, 7, 9)
        together = encode(maps, "float16", False)
        for number in range(5):
            alone = encode(maps[number : number + 1], "float16", False)
            assert all(torch.equal(a[0], t[number]) for a, t in zip(alone, together, strict=True))


class TestTargets:
    @pytest.mark.parametrize(
        ("text", "names", "expected"),
        [
            ("predicted", ["predicted"], None),
            ("label", ["label"], [1, 0]),
            ("top:2", ["top 1", "top 2"], [[2, 0], [0, 1]]),
            ("1", ["class 1"], [1, 1]),
            ("predicted,label", ["predicted", "label"], [[2, 1], [0, 0]]),
            ("2, 0", ["class 2", "class 0"], [[2, 0], [2, 0]]),
        ],
    )
    def test_classes(self, text: str, names: list[str], expected: Any) -> None:
        logits = torch.tensor([[1.0, 0.5, 2.0], [3.0, 3.0, 1.0]])  # of equal logits the first

        class Fixed:
            def logits(self, images: Tensor) -> Tensor:
                return logits

        targets = Targets.parse(text, 3)
        assert list(targets.names) == names
        found = targets.of(Fixed(), torch.zeros(2, 3, 4, 4), [1, -1])  # type: ignore[arg-type]  # no attribute
        assert (None if found is None else found.tolist()) == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("best", "got 'best'"),
            ("top:0", "got 'top:0'"),
            ("", "got ''"),
            ("3", "3 is out of range: the model has classes 0 to 2"),
            ("top:4", "top:4 is out of range"),
            ("1,1", "class 1 is there twice"),
        ],
    )
    def test_refused(self, text: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Targets.parse(text, 3)


class TestRun:
    def test_what_is_stored(self, folder: Path, whole: Path) -> None:
        maps = open_maps(whole)
        assert maps.failures() == {"05": "not an image, or in a format that Pillow cannot read here"}
        preprocessing = Preprocessing(stub_run.CONFIG)
        for number, stored in enumerate(maps):
            assert stored.done == (number != 5)
            if not stored.done:
                continue
            images = preprocessing(read_image(folder / f"{number:02d}.png"))[None]
            found = StubEngine().attribute(images)
            expected = found.maps.sum(1)[0].numpy()
            # half a step of 1/255 in a pixel, then half of a step of the maps
            np.testing.assert_allclose(stored.map, expected, atol=0.02 * np.abs(expected).max())
            np.testing.assert_allclose(stored.logits, found.logits[0].numpy(), rtol=0.01, atol=1e-3)
            assert int(stored.target) == int(stored.logits.argmax())

    def test_the_model_gets_timm_s_bits(self, folder: Path, tmp_path: Path) -> None:
        """Where no pixel is rounded otherwise, images are those of timm's transform to the last bit."""
        size = stub_run.CONFIG["input_size"][1]
        photographs(tmp_path / "in", 3, (size, size), scale=1)
        config = {**stub_run.CONFIG, "crop_pct": 1.0}
        seen: list[Tensor] = []

        class Watching(StubEngine):
            def attribute(self, images: Tensor, *args: Any, **options: Any) -> Any:
                seen.append(images.clone())
                return super().attribute(images, *args, **options)

        run(tmp_path / "in", tmp_path / "s", engine=Watching(), config=config)
        preprocessing = Preprocessing(config)
        wanted = [preprocessing(read_image(path)) for path in sorted((tmp_path / "in").iterdir())]
        assert torch.equal(torch.cat(seen), torch.stack(wanted))

    @pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 2), (4, 1)])
    def test_batches_and_processes_change_nothing(
        self, folder: Path, whole: Path, tmp_path: Path, batch_size: int, workers: int
    ) -> None:
        run(folder, tmp_path / "s", batch_size=batch_size, workers=workers)
        assert contents(tmp_path / "s") == contents(whole)

    def test_memory_runs_out(self, folder: Path, whole: Path, tmp_path: Path) -> None:
        class Small(StubEngine):
            largest, refreshed = 0, 0

            def attribute(self, images: Tensor, *args: Any, **options: Any) -> Any:
                if len(images) > 1:
                    raise torch.OutOfMemoryError("no more")
                self.largest = max(self.largest, len(images))
                return super().attribute(images, *args, **options)

            def refresh(self) -> None:
                self.refreshed += 1

        engine = Small()
        run(folder, tmp_path / "s", engine=engine)
        assert contents(tmp_path / "s") == contents(whole)
        assert (engine.largest, engine.refreshed) == (1, 2)  # 4, 2, 1

    def test_memory_for_no_image(self, folder: Path, tmp_path: Path) -> None:
        class None_(StubEngine):
            def attribute(self, images: Tensor, *args: Any, **options: Any) -> Any:
                raise torch.OutOfMemoryError("no more")

        with pytest.raises(RampFastError, match="out of memory on cpu for a single image"):
            run(folder, tmp_path / "s", engine=None_())

    def test_maps_that_are_not_finite(self, folder: Path, tmp_path: Path) -> None:
        class Broken(StubEngine):
            calls = 0

            def attribute(self, images: Tensor, *args: Any, **options: Any) -> Any:
                found = super().attribute(images, *args, **options)
                if self.calls == 0:
                    found.maps[2] = float("nan")
                self.calls += 1
                return found

        run(folder, tmp_path / "s", engine=Broken())
        assert list(open_maps(tmp_path / "s").failures()) == ["02", "05"]
        assert not open_maps(tmp_path / "s")[2].map.any()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
    def test_stopped_and_gone_on(self, folder: Path, whole: Path, tmp_path: Path, error: type[BaseException]) -> None:
        class Stops(StubEngine):
            calls = 0

            def attribute(self, images: Tensor, *args: Any, **options: Any) -> Any:
                self.calls += 1
                if self.calls == 3:
                    raise error
                return super().attribute(images, *args, **options)

        with pytest.raises(error):
            run(folder, tmp_path / "s", engine=Stops())
        assert 1 <= len(open_maps(tmp_path / "s").journal()) < 3
        run(folder, tmp_path / "s")
        assert contents(tmp_path / "s") == contents(whole)

    def test_a_full_disk_ends_the_run(
        self, folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(self: ShardWriter, *_: Any) -> None:
            raise StoreError("cannot write: no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "finish", full)
            with pytest.raises(StoreError, match="no space left"):
                run(folder, tmp_path / "s")
        run(folder, tmp_path / "s")
        assert contents(tmp_path / "s") == contents(whole)

    def test_several_targets_and_channels(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "s", targets="top:2", channels=True)
        maps = open_maps(tmp_path / "s")
        assert maps[0].map.shape == (2, 3, stub_run.SIZE, stub_run.SIZE)
        assert maps[0].target.tolist() == np.argsort(-maps[0].logits, kind="stable")[:2].tolist()
        assert maps.array("scale").shape == (11, 2)


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    call = [sys.executable, stub_run.__file__, str(folder), str(out)]
    return subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run has ended by itself"
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes")
def test_killed_with_its_processes_or_alone(folder: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL once the first shard is finished, twice: the third run has the bytes of one that was left alone."""
    out = tmp_path / "s"

    def finished() -> int:
        try:
            return len(open_maps(out).journal())
        except StoreError:
            return 0

    for kill, shards in ((lambda p: os.killpg(p.pid, signal.SIGKILL), 1), (lambda p: p.kill(), 2)):
        process = start(folder, out)
        wait_for(lambda wanted=shards: finished() >= wanted, process)  # type: ignore[misc]  # a default of a lambda
        kill(process)
        process.wait()
        assert finished() < 3
    run(folder, out)
    assert contents(out) == contents(whole)


def test_images_go_to_the_device_as_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what float32 would be; the copy itself is of runtime.host_copies, tested there."""
    sent: list[tuple[torch.dtype, torch.Size]] = []
    copy = host_copies.to_device

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append((tensor.dtype, tensor.shape))
        return copy(tensor, device)

    monkeypatch.setattr(host_copies, "to_device", to_device)
    run(folder, tmp_path / "store")
    assert {dtype for dtype, _ in sent} == {torch.uint8}
    assert all(shape[1:] == (stub_run.SIZE, stub_run.SIZE, 3) for _, shape in sent)
    assert sum(shape[0] for _, shape in sent) == len(open_maps(tmp_path / "store"))
