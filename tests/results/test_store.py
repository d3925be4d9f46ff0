"""Results on disk: whole or absent, and recognised as finished only when nothing they depend on has changed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ramp_fast.results import store as store_module
from ramp_fast.results.store import (
    Result,
    State,
    Store,
    StoreError,
    atomic_write,
    check_writable,
    fingerprint,
    read_result,
)

SETTINGS: dict[str, object] = {"model": "m", "rule": "abslrp", "target": "predicted", "mean": (0.5, 0.5, 0.5)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (4, 4)).save(path)
    return path


def result(classes: int = 7) -> Result:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=classes).astype(np.float32)
    return Result(rng.normal(size=(3, 4, 4)).astype(np.float32), 2, logits, [f"name {i}" for i in range(classes)])


def picture() -> Image.Image:
    return Image.new("RGB", (8, 8), (1, 2, 3))


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if ".tmp" in p.name]


def test_round_trip(tmp_path: Path, source: Path) -> None:
    store, wanted = Store(tmp_path / "out", SETTINGS), result()
    store.save("sub/photo", source, wanted, picture())
    got = read_result(tmp_path / "out/sub/photo.npz")
    assert got["map"].dtype == np.float32
    np.testing.assert_array_equal(got["map"], wanted.map)
    np.testing.assert_array_equal(got["logits"], wanted.logits)
    assert int(got["target"]) == 2
    assert str(got["class_name"]) == "name 2"
    assert list(got["class_names"]) == wanted.class_names
    weights = np.exp(wanted.logits.astype(float))
    assert float(got["probability"]) == pytest.approx(weights[2] / weights.sum(), rel=1e-6)
    assert list(got["top_classes"]) == list(np.argsort(-wanted.logits)[:5])
    assert list(got["top_names"]) == [f"name {k}" for k in got["top_classes"]]
    assert json.loads(str(got["settings"]))["rule"] == "abslrp"
    assert (tmp_path / "out/sub/photo.png").is_file()
    assert leftovers(tmp_path) == []


def test_probability_of_a_single_logit() -> None:
    single = Result(np.zeros((3, 4, 4), np.float32), 0, np.array([-2.0]), ["name"])
    assert single.probability() == pytest.approx(1 / (1 + np.exp(2)))


def test_needs_no_pickle_and_keeps_float64(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    base = result()
    store.save("x", source, Result(base.map.astype(np.float64) / 3, 2, base.logits, base.class_names), picture())
    with np.load(tmp_path / "out/x.npz", allow_pickle=False) as stored:
        assert stored["map"].dtype == np.float64
        assert all(stored[name].dtype != object for name in stored.files)


def test_finished_only_under_equal_settings(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    assert not store.is_finished("x", source)
    store.save("x", source, result(), picture())
    assert Store(tmp_path / "out", SETTINGS).is_finished("x", source)
    for key in SETTINGS:
        assert not Store(tmp_path / "out", {**SETTINGS, key: "other"}).is_finished("x", source), key
    assert not Store(tmp_path / "out", {**SETTINGS, "extra": 1}).is_finished("x", source)


def test_finished_only_for_the_same_image(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    store.save("x", source, result(), picture())
    before = source.stat()
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert not store.is_finished("x", source)


def test_finished_only_when_whole(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    store.save("x", source, result(), picture())
    store.picture_path("x").unlink()
    assert not store.is_finished("x", source)
    assert Store(tmp_path / "out", SETTINGS, overlays=False).is_finished("x", source)
    data = store.map_path("x").read_bytes()
    for damaged in (b"", data[:100], data[: len(data) // 2], b"PK" + data[2:-30]):
        store.map_path("x").write_bytes(damaged)
        assert not Store(tmp_path / "out", SETTINGS, overlays=False).is_finished("x", source)
    # What a power failure leaves is done again, not complained about.
    store.save("x", source, result(), picture())
    assert store.is_finished("x", source)


def test_the_map_comes_last(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).suffix), replace(a, b)))
    Store(tmp_path / "out", SETTINGS).save("x", source, result(), picture())
    assert order == [".png", ".npz"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_nothing_is_left_half_written(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "deep/x.npz"

    def fail() -> None:
        with atomic_write(target) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_old_file_stays_whole_until_the_new_one_is_there(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    with atomic_write(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "x") as file:
            file.write(b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_names_as_long_as_the_file_system_allows(tmp_path: Path, source: Path) -> None:
    Store(tmp_path / "out", SETTINGS).save("n" * 251, source, result(), picture())
    assert (tmp_path / "out" / ("n" * 251 + ".npz")).is_file()


def test_foreign_files_are_kept(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    store = Store(out, SETTINGS)
    Image.new("RGB", (4, 4), (9, 9, 9)).save(out / "a.png")
    np.savez(out / "b.npz", x=np.zeros(3))
    for key, name in (("a", "a.png"), ("b", "b.npz")):
        before = (out / name).read_bytes()
        with pytest.raises(StoreError, match="kept"):
            store.save(key, source, result(), picture())
        assert (out / name).read_bytes() == before


def test_the_image_itself_is_never_overwritten(tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    picture().save(image)
    with pytest.raises(StoreError, match="the image itself"):
        Store(tmp_path, SETTINGS).save("x", image, result(), picture())


def test_own_results_are_overwritten(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", {**SETTINGS, "rule": "abslrp-release"})
    store.save("x", source, result(), picture())
    other = Store(tmp_path / "out", SETTINGS)
    other.save("x", source, result(), picture())
    assert other.is_finished("x", source)
    assert not store.is_finished("x", source)


def test_equal_results_are_equal_files(tmp_path: Path, source: Path) -> None:
    for name in ("one", "two"):
        Store(tmp_path / name, SETTINGS).save("x", source, result(), picture())
    for suffix in (".png", ".npz"):
        assert (tmp_path / f"one/x{suffix}").read_bytes() == (tmp_path / f"two/x{suffix}").read_bytes()


def test_names_are_stored_small(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    names = [f"a fairly long class name, number {i}" for i in range(1000)]
    logits = np.zeros(1000, np.float32)
    store.save("x", source, Result(np.zeros((3, 4, 4), np.float32), 0, logits, names), picture())
    assert store.map_path("x").stat().st_size < 25_000


def test_a_picture_counts_only_with_its_own_map(tmp_path: Path, source: Path) -> None:
    old, new = (Store(tmp_path / "out", {**SETTINGS, "target": k}) for k in (5, 6))
    old.save("x", source, result(), picture())
    of_old = old.picture_path("x").read_bytes()
    without = Store(tmp_path / "out", {**SETTINGS, "target": 6}, overlays=False)
    without.save("x", source, result())
    assert not new.picture_path("x").exists()  # it was that of the old map
    assert without.is_finished("x", source)
    assert new.state("x", source) is State.MISSING
    new.picture_path("x").write_bytes(of_old)
    assert new.state("x", source) is State.MIXED
    assert without.state("x", source) is State.MIXED
    new.save("x", source, result(), Image.new("RGB", (8, 8)))
    assert new.is_finished("x", source)
    assert without.is_finished("x", source)
    new.picture_path("x").write_bytes(of_old)
    assert new.state("x", source) is State.MIXED


def test_an_image_of_other_content_is_another_image(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    before = source.stat()
    store.save("x", source, result(), picture())
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.state("x", source) is State.MISSING


def test_an_image_that_changes_while_it_is_attributed(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    image = fingerprint(source)
    picture().save(source)
    store.save("x", source, result(), picture(), image)
    assert store.state("x", source) is State.MISSING


@pytest.mark.parametrize("suffix", [".png", ".npz"])
@pytest.mark.parametrize("remains", [b"", b"\0" * 5000, "magic"])
def test_what_a_crash_leaves_is_replaced(tmp_path: Path, source: Path, suffix: str, remains: bytes | str) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    store.save("x", source, result(), picture())
    path = store.map_path("x").with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:6] if isinstance(remains, str) else remains)
    assert not store.is_finished("x", source)
    store.save("x", source, result(), picture())
    assert store.is_finished("x", source)


@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_one_of_two_marks_is_enough(tmp_path: Path, source: Path, suffix: str) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    store.save("x", source, result(), Image.effect_noise((64, 64), 50))
    path = store.map_path("x").with_suffix(suffix)
    whole = path.read_bytes()
    for damaged in (bytes(128) + whole[128:], whole[:-128] + bytes(128)):
        path.write_bytes(damaged)
        assert not store.is_finished("x", source)
        store.save("x", source, result(), picture())
    path.write_bytes(bytes(128) + b"mine" + bytes(128))
    with pytest.raises(StoreError, match="no mark"):
        store.save("x", source, result(), picture())


def make_foreign(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"notes")


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link to nothing"])
@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_what_others_put_there_is_kept(tmp_path: Path, source: Path, kind: str, suffix: str) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    path = store.map_path("x").with_suffix(suffix)
    make_foreign(path, kind)
    before = os.lstat(path)
    with pytest.raises(StoreError, match=f"x{suffix} .*kept: move it away"):
        store.save("x", source, result(), picture())
    assert os.lstat(path) == before
    assert os.listdir(tmp_path / "out") == [path.name]


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path, source: Path) -> None:
    store = Store(tmp_path / "out", SETTINGS)
    store.save("sub/x", source, result(), picture())
    folder = tmp_path / "out/sub"

    def left_by(process: int, host: str = store_module.HOST) -> str:
        name = store_module.temporary_name().replace(f"-{os.getpid()}-", f"-{process}-")
        (folder / name.replace(store_module.HOST, host)).touch()
        return name

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        name = left_by(process.pid)
        assert Store(tmp_path / "out", SETTINGS).is_finished("sub/x", source)
        assert leftovers(tmp_path) == [name]  # it is running
        process.communicate()
    left_by(os.getpid())  # of an earlier process of the same number
    left_by(process.pid, host="0" * 8)  # another computer's
    (folder / ".ramp_fast-notes.tmp").touch()  # of another name
    with atomic_write(folder / "z"):
        assert len(leftovers(tmp_path)) == 5
        assert Store(tmp_path / "out", SETTINGS).is_finished("sub/x", source)
        assert len(leftovers(tmp_path)) == 3


def test_no_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="empty name"):
        check_writable("")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    with pytest.raises(StoreError, match="a link to nothing"):
        Store(tmp_path / "link", SETTINGS)


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file"):
        check_writable(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot write"):
        check_writable(tmp_path / "file/below")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(StoreError, match="Permission"):
            check_writable(tmp_path / "locked")
