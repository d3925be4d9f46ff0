"""Damaged files of every kind that is read: the documented errors, never a wrong result where there are checksums."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, features

from ramp_fast.data import ClassNames, ImageError, read_image
from ramp_fast.errors import InputError
from ramp_fast.evaluation import Evaluation
from ramp_fast.metrics.base import Result as Metric
from ramp_fast.models import ModelError, read_checkpoint
from ramp_fast.results.store import DamagedResultError, Result, State, Store, read_result

MUTATIONS = 60  # of each file


def damaged(data: bytes, seed: int = 0) -> Iterator[bytes]:
    """The bytes with some flipped, cut off, put in or repeated; never as they were."""
    draw = np.random.default_rng(seed)
    for number in range(MUTATIONS):
        at = int(draw.integers(len(data)))
        length = int(draw.integers(1, 40))
        some = draw.integers(0, 256, length, dtype=np.uint8).tobytes()
        flipped = bytearray(data)
        for place in draw.integers(0, len(data), 1 + number % 3):
            flipped[place] ^= 1 << int(draw.integers(8))
        cut, longer, twice = data[:at], data[:at] + some + data[at:], data[: at + length] + data[at:]
        changed = (bytes(flipped), cut, longer, twice)[number % 4]
        if changed != data:
            yield changed


def picture() -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 200, 30))
    return Image.fromarray(np.stack([across, down, across * 0], -1).astype(np.uint8))


def encoded(name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, format=name, **options)
    return buffer.getvalue()


IMAGES: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "BMP": {},
    "GIF": {},
    "TIFF": {"compression": "tiff_lzw"},
    "JPEG2000": {},
    "AVIF": {},
    "PPM": {},
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path: Path, name: str) -> None:
    if name in ("AVIF", "WEBP") and not features.check(name.lower()):
        pytest.skip(f"Pillow without {name}")
    file = tmp_path / "x"
    data = encoded(name, **IMAGES[name])
    file.write_bytes(data)
    whole = np.asarray(read_image(file))
    for changed in damaged(data):
        file.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata
            try:
                image = read_image(file)
            except ImageError:
                continue
        assert image.mode == "RGB"
        if name == "PNG":  # every chunk has a checksum
            np.testing.assert_array_equal(np.asarray(image), whole)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With one result, x."""
    folder = tmp_path_factory.mktemp("store")
    picture().save(folder / "x.jpg")
    store = Store(folder / "out", {"model": "m"})
    logits = np.arange(3, dtype=np.float32)
    store.save("x", folder / "x.jpg", Result(np.ones((3, 4, 4), np.float32), 2, logits, ["a", "b", "c"]), picture())
    return store


def test_results(store: Store) -> None:
    source, path = store.folder.parent / "x.jpg", store.map_path("x")
    data = path.read_bytes()
    try:
        for changed in damaged(data):
            path.write_bytes(changed)
            with pytest.raises(DamagedResultError):
                read_result(path)
            assert store.state("x", source) is State.DAMAGED
            store.check_free("x", source)  # so it is done again
    finally:
        path.write_bytes(data)
    assert store.is_finished("x", source)


@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_results_cut_at_any_byte_or_changed_in_any(store: Store, suffix: str) -> None:
    source = store.folder.parent / "x.jpg"
    path = store.map_path("x").with_suffix(suffix)
    data = path.read_bytes()
    ends = (at for at in range(len(data)) if at < 100 or at >= len(data) - 150 or at % 397 == 0)
    try:
        for at in ends:
            path.write_bytes(data[:at])
            assert not store.is_finished("x", source), at
            store.check_free("x", source)
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
            assert not store.is_finished("x", source), at
            store.check_free("x", source)
    finally:
        path.write_bytes(data)


def test_evaluations(tmp_path: Path) -> None:
    described = {"higher_is_better": True, "settings": {}, "group": 1, "axis": None}
    values = {"gae": torch.tensor([0.5, float("nan")], dtype=torch.float64)}
    file = tmp_path / "x.json"
    Evaluation({"ixg": {"gae": Metric("gae", values)}}, {"gae": described}, names=["a", "b"], images=2).save(file)
    data = file.read_bytes()
    for changed in (
        *damaged(data),
        b"[" * 100_000,
        b'{"format": 1, "results": ' + b'{"a": ' * 50_000,
        data.replace(b"0.5", b"9" * 400),
        data.replace(b'"images": 2', b'"images": true'),
        data.replace(b'"names": ["a", "b"]', b'"names": 3'),
    ):
        file.write_bytes(changed)
        try:
            found = Evaluation.load(file)
        except InputError:
            continue
        assert str(found)
        assert isinstance(found.rows() + found.value_rows(), list)
    file.write_bytes(b"\xef\xbb\xbf" + data)  # as an editor may have saved it
    assert Evaluation.load(file).names == ["a", "b"]


def saved(state: dict[str, torch.Tensor], **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


STATE = {"weight": torch.arange(24.0).reshape(4, 6), "bias": torch.ones(4)}
CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "archive.pth": lambda: saved(STATE),
    "legacy.pth": lambda: saved(STATE, _use_new_zipfile_serialization=False),
    "x.safetensors": lambda: safetensors.torch.save(STATE),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    data = CHECKPOINTS[name]()
    file.write_bytes(data)
    assert read_checkpoint(file).keys() == STATE.keys()
    for changed in damaged(data):
        file.write_bytes(changed)
        try:
            found = read_checkpoint(file)
        except ModelError:
            continue
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
        if name == "archive.pth":  # every file in it has a checksum, which torch.load does not look at
            torch.testing.assert_close(found, STATE, rtol=0, atol=0)


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    data = CHECKPOINTS["archive.pth"]()
    at = data.index(torch.arange(24.0).numpy().tobytes()) + 9
    file = tmp_path / "x.pth"
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ModelError, match="checksum of"):
        read_checkpoint(file)


def test_class_names(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    for changed in damaged("\ufeffkočka\r\npes\r\n\r\n".encode()):
        file.write_bytes(changed)
        with contextlib.suppress(InputError):
            assert len(ClassNames.from_file(file, 2).all()) == 2


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("size", range(1, 9))
def test_very_short_files_are_no_images(tmp_path: Path, size: int) -> None:
    for name in IMAGES:
        (tmp_path / "x").write_bytes(encoded(name, **IMAGES[name])[:size])
        with pytest.raises(ImageError):
            read_image(tmp_path / "x")
