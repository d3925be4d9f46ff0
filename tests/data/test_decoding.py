"""Pixels as timm's, and processes that make them: in order, in bounded memory, also where some of them die."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding_tasks import Deadly
from PIL import Image

from ramp_fast.data import ImageError, Preprocessing, pixels, read_image
from ramp_fast.data.decoders import DEPTH, Decoded, Decoders
from ramp_fast.data.folders import whole_file
from ramp_fast.data.locations import Location
from ramp_fast.data.pixels import Framing
from ramp_fast.errors import InputError, RampFastError

NO_CHANGE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def config(**changes: Any) -> dict[str, Any]:
    given = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
    return {**given, **NO_CHANGE, **changes}


def noise(path: Path, size: tuple[int, int], seed: int = 0, **options: Any) -> Path:
    """A picture with detail of every scale; the format is the suffix's."""
    rng = np.random.default_rng(seed)
    fine = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.blend(Image.fromarray(fine), coarse, 0.6).save(path, **options)
    return path


def framed(path: Path, framing: Framing) -> np.ndarray:
    with open(path, "rb") as file:
        return framing(file)


def by_timm(path: Path, settings: dict[str, Any]) -> np.ndarray:
    image = Preprocessing(settings)(read_image(path))
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


class TestPixels:
    @pytest.mark.parametrize("mode", ["center", "squash", "border"])
    @pytest.mark.parametrize("crop", [0.7, 0.875, 1.0])
    @pytest.mark.parametrize("out", [(32, 32), (24, 40)])
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
    def test_as_timm_to_one_step(
        self, tmp_path: Path, mode: str, crop: float, out: tuple[int, int], interpolation: str
    ) -> None:
        settings = config(input_size=(3, *out), crop_pct=crop, crop_mode=mode, interpolation=interpolation)
        framing = Framing.of(settings)
        for number, size in enumerate([(64, 48), (37, 91), (32, 32), (20, 16), (131, 40), (33, 35)]):
            path = noise(tmp_path / f"{number}.png", size, number)
            difference = np.abs(framed(path, framing).astype(int) - by_timm(path, settings))
            assert difference.max() <= 1, (size, difference.max())
            assert (difference > 0).mean() < 0.1, size  # sums that lie between two values may fall to either

    @pytest.mark.parametrize("kind", ["rgb", "grey", "cmyk", "progressive", "turned", "palette", "alpha", "deep"])
    def test_of_every_kind_of_image(self, tmp_path: Path, kind: str) -> None:
        png = noise(tmp_path / "x.png", (70, 50))
        picture = Image.open(png)
        path = tmp_path / ("x.jpg" if kind in ("rgb", "grey", "cmyk", "progressive", "turned") else "y.png")
        options: dict[str, Any] = {}
        if kind in ("grey", "cmyk"):
            picture = picture.convert("L" if kind == "grey" else "CMYK")
        elif kind == "turned":
            exif = Image.Exif()
            exif[0x0112] = 6
            options["exif"] = exif
        elif kind == "progressive":
            options["progressive"] = True
        elif kind == "palette":
            picture = picture.quantize(64)
        elif kind == "alpha":
            picture.putalpha(Image.fromarray(np.arange(70 * 50, dtype=np.uint16).astype(np.uint8).reshape(50, 70)))
        elif kind == "deep":
            picture = Image.fromarray(np.arange(70 * 50, dtype=np.uint16).reshape(50, 70) * 18)
        picture.save(path, **options)
        settings = config()
        difference = np.abs(framed(path, Framing.of(settings)).astype(int) - by_timm(path, settings))
        assert difference.max() <= 1

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_as_the_metadata_say(self, tmp_path: Path, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = noise(tmp_path / "x.jpg", (70, 50), exif=exif)
        for fast in (False, True):
            difference = framed(path, Framing.of(config(), fast)).astype(int) - by_timm(path, config())
            assert np.abs(difference).max() <= 1  # no smaller size would do: nothing is scaled

    def test_simplejpeg_and_pillow_agree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("simplejpeg")
        paths = [
            noise(tmp_path / f"{number}.jpg", (71, 53), quality=quality, subsampling=subsampling)
            for number, (quality, subsampling) in enumerate([(50, 2), (90, 1), (100, 0)])
        ]
        framing = Framing.of(config())
        found = [framed(path, framing) for path in paths]
        monkeypatch.setattr(pixels, "simplejpeg", None)
        for path, here in zip(paths, found, strict=True):
            np.testing.assert_array_equal(framed(path, framing), here)

    @pytest.mark.parametrize("fast", [False, True])
    def test_broken_images_say_why(self, tmp_path: Path, fast: bool) -> None:
        path = noise(tmp_path / "x.jpg", (200, 150))
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(ImageError) as of_reading:
            read_image(path)
        with pytest.raises(ImageError) as of_framing:
            framed(path, Framing.of(config(), fast))
        assert str(of_framing.value) == str(of_reading.value)

    def test_fast_decoding_is_near(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jpg"
        noise(tmp_path / "small.png", (80, 60))
        Image.open(tmp_path / "small.png").resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=95)
        exact, fast = (framed(path, Framing.of(config(), f)).astype(int) for f in (False, True))
        assert 0 < np.abs(exact - fast).mean() < 3

    def test_other_preprocessing_is_refused(self) -> None:
        with pytest.raises(InputError, match="preprocessing with crop_border_pixels is not known here"):
            Framing.of(config(crop_border_pixels=4))
        with pytest.raises(InputError, match="interpolation 'random'"):
            Framing.of(config(interpolation="random"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    for number in range(11):
        noise(path / f"{number:02d}.jpg", (40, 36), number)
    (path / "05.jpg").write_bytes(b"no image")
    return path


def locations(folder: Path) -> list[Location]:
    return [whole_file(str(path), str(folder)).below(str(folder)) for path in sorted(folder.iterdir())]


def decoded(given: Sequence[Location], workers: int, batch: int = 3) -> tuple[np.ndarray, dict[int, str], list[int]]:
    """All pixels, failures by number, checksums."""
    batches = [given[start : start + batch] for start in range(0, len(given), batch)]
    found, failures, checksums = [], {}, []
    with Decoders(Framing.of(config()), batch, workers) as decoders:
        for number, result in enumerate(decoders.batches(batches)):
            found.append(result.pixels.copy())
            failures.update({number * batch + place: why for place, why in result.failures.items()})
            checksums += result.checksums.tolist()
    return np.concatenate(found), failures, checksums


class TestDecoders:
    def test_processes_give_what_this_one_gives(self, folder: Path) -> None:
        given = locations(folder)
        here, there = decoded(given, 0), decoded(given, 2)
        np.testing.assert_array_equal(here[0], there[0])
        assert here[1:] == there[1:]
        assert list(here[1]) == [5]
        assert "not an image" in here[1][5]
        assert not here[0][5].any()
        for number, location in enumerate(given):
            expected = 0 if number == 5 else zlib.crc32(location.read())
            assert here[2][number] == expected
            if number != 5:
                np.testing.assert_array_equal(here[0][number], framed(Path(location.path), Framing.of(config())))

    def test_no_more_than_there_is_room_for_is_taken(self, folder: Path) -> None:
        given = locations(folder)[:2]
        taken = 0

        def batches() -> Any:
            nonlocal taken
            for _ in range(10):
                taken += 1
                yield given

        with Decoders(Framing.of(config()), 2, 1) as decoders:
            for number, _ in enumerate(decoders.batches(batches()), 1):
                assert taken <= number + DEPTH - 2

    def test_a_process_that_dies_is_replaced(self, folder: Path, tmp_path: Path) -> None:
        given = locations(folder)
        path, size = given[4].path, given[4].size
        assert size is not None
        once = [*given[:4], Deadly(path, size, 0, str(tmp_path / "flag"), once=True), *given[5:]]
        found, expected = decoded(once, 1), decoded(given, 0)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:] == expected[1:]

    def test_an_image_that_kills_is_a_failure_of_its_own(self, folder: Path, tmp_path: Path) -> None:
        given = locations(folder)
        deadly = [*given[:4], Deadly(given[4].path, 1, 0, str(tmp_path / "none")), *given[5:]]
        found, expected = decoded(deadly, 2), decoded(given, 0)
        assert found[1] == {**expected[1], 4: "decoding it ended the process (signal 9)"}
        others = [number for number in range(len(given)) if number != 4]
        np.testing.assert_array_equal(found[0][others], expected[0][others])
        assert not found[0][4].any()

    def test_batches_that_nobody_came_for(self, folder: Path) -> None:
        given = locations(folder)
        with Decoders(Framing.of(config()), 3, 2) as decoders:
            next(decoders.batches([given[:3], given[3:6], given[6:9]]))
            found = [batch.pixels.copy() for batch in decoders.batches([given[6:9], given[:2]])]
        expected = decoded([*given[6:9], *given[:2]], 0)[0]
        np.testing.assert_array_equal(np.concatenate(found), expected)

    def test_nothing_is_decoded_while_it_is_held_up(self, folder: Path) -> None:
        given = locations(folder)[:2]
        with Decoders(Framing.of(config()), 2, 1) as decoders:
            next(decoders.batches([given]))  # the process is there
            found: list[Decoded] = []
            taking = threading.Thread(target=lambda: found.extend(decoders.batches([given[::-1]])))
            with decoders.held():
                taking.start()
                taking.join(0.5)
                assert not found
            taking.join(20)
            assert len(found) == 1
            np.testing.assert_array_equal(found[0].pixels, decoded(given[::-1], 0)[0])

    def test_processes_that_cannot_start(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        from ramp_fast.data import decoders

        monkeypatch.setattr(decoders, "_START", "raise ImportError('no such thing')")
        with pytest.raises(RampFastError, match="processes that decode images end at once: ImportError: no such thing"):
            decoded(locations(folder), 1)

    def test_nothing_is_left_behind(self, folder: Path) -> None:
        with Decoders(Framing.of(config()), 2, 1) as decoders:
            next(decoders.batches([locations(folder)[:2]]))
            processes = [worker.process for worker in decoders._workers]
        assert all(process.poll() is not None for process in processes)

    def test_they_go_without_torch(self) -> None:
        code = "import sys, ramp_fast.data.decoders; print('torch' in sys.modules, 'timm' in sys.modules)"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.sep)
        assert said.stdout.split() == ["False", "False"]

    @pytest.mark.parametrize("limit", ["_HELD_BYTES", "_AHEAD_BYTES"])
    def test_large_files_are_not_held(self, folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
        from ramp_fast.data import decoders

        expected = decoded(locations(folder), 0)
        monkeypatch.setattr(decoders, limit, 100)
        found = decoded(locations(folder), 0)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[2] == expected[2]


def test_images_in_memory_are_read_as_files_are(folder: Path) -> None:
    from ramp_fast.data.images import read_picture

    path = folder / "03.jpg"
    with open(path, "rb") as file:
        in_memory = read_picture(io.BytesIO(file.read()))
    assert in_memory.tobytes() == read_image(path).tobytes()
