"""``ramp-fast report``: the numbers and pictures it writes, and what it leaves alone. ``test_page.py`` has the page."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_store import NASTY, write_store

from ramp_fast import cli
from ramp_fast.data import OwnPictureError, Preprocessing, open_source, read_image
from ramp_fast.data.locations import WholeFile
from ramp_fast.data.records import Record, Source
from ramp_fast.data.regions import BoxRegion
from ramp_fast.metrics import Complexity, RelevanceMassAccuracy
from ramp_fast.pipeline.planning import image_lines
from ramp_fast.report import Photographs, pictures, statistics, write_report, writing
from ramp_fast.results import StoreError, open_maps, render
from ramp_fast.results.store import atomic_folder, remove_leftovers

CONFIG = {"input_size": [3, 32, 48], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.8}


def data(out: Path, name: str) -> Any:
    """What a data file hands to the page."""
    text = (out / "data" / f"{name}.js").read_text(encoding="ascii")
    start, end = f'ramp_fast.put("{name}",', ");\n"
    assert text.startswith(start)
    assert text.endswith(end)
    return json.loads(text[len(start) : -len(end)])


def column(out: Path, name: str, dtype: str = "<u2") -> np.ndarray:
    files = range(len(list((out / "data").glob("rows-*.js"))))
    return np.concatenate([np.frombuffer(base64.b64decode(data(out, f"rows-{k:03d}")[name]), dtype) for k in files])


def shares(out: Path, name: str) -> np.ndarray:
    values = column(out, name)
    return np.where(values == 65535, np.nan, values / 65534)


def tile(out: Path, about: dict[str, Any], place: int) -> np.ndarray:
    """A picture of a sheet, found as the page finds it."""
    file, within = divmod(place, about["columns"] * about["rows"])
    row, col = divmod(within, about["columns"])
    with Image.open(out / "pictures" / f"report-{about['kind']}-{file:03d}.jpg") as sheet:
        pixels = np.asarray(sheet).astype(float)
    height, width = about["height"], about["width"]
    return pixels[row * height : (row + 1) * height, col * width : (col + 1) * width]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "store"
    names = [*NASTY, *(f"folder/image {k}" for k in range(len(NASTY), 40))]
    return write_store(folder, 40, targets=("predicted", "label"), names=names, failed=[7])


@pytest.fixture(scope="module")
def report(store: Path) -> Path:
    out = store.parent / "report"
    write_report(open_maps(store), out)
    return out


class TestStatistics:
    def test_entropy_and_mass_are_those_of_the_metrics(self) -> None:
        maps = torch.randn(4, 1, 9, 11, generator=torch.Generator().manual_seed(0)) * 1e-3
        maps[3] = 0
        masks = torch.zeros(4, 1, 9, 11, dtype=torch.bool)
        masks[:, :, 2:6, 3:9] = True
        plain, inside = maps[:, 0].numpy(), masks[:, 0].numpy()
        images, target = torch.zeros(4, 3, 9, 11), torch.zeros(4, dtype=torch.long)
        model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        of_metrics = {}
        for metric in (Complexity(model), RelevanceMassAccuracy(model)):
            of_metrics |= metric.update(images, target, None, maps=maps, masks=masks if metric.needs_masks else None)
        expected = of_metrics["complexity"].numpy()
        np.testing.assert_allclose(statistics.entropies(plain), expected, rtol=1e-6)
        expected = of_metrics["relevance_mass_accuracy"].numpy()
        found = [statistics.box_shares(m, i) for m, i in zip(plain, inside, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert np.isnan(found[3])
        assert np.isnan(statistics.box_shares(plain[0], np.zeros_like(inside[0])))
        assert np.isnan(statistics.box_shares(plain[0], None))

    def test_predictions(self) -> None:
        logits = np.array([[1.0, 3, 3, 0], [800, 0, 0, 0]], np.float32)
        block = statistics.Block.of(logits, np.array([2, -1], np.int32))
        assert block.top.tolist() == [[1, 2, 0, 3], [0, 1, 2, 3]]
        e = np.exp(logits[0] - 3)
        np.testing.assert_allclose(block.confidence, [e[1] / e.sum(), 1], rtol=1e-6)
        np.testing.assert_allclose(block.label_probability, [e[2] / e.sum(), np.nan], rtol=1e-6)

    def test_a_single_logit_is_a_sigmoid(self) -> None:
        block = statistics.Block.of(np.array([[0.0], [2.0]], np.float32), np.array([0, -1], np.int32))
        np.testing.assert_allclose(block.confidence, [0.5, 1 / (1 + np.exp(-2))], rtol=1e-6)


class TestPictures:
    def test_colours_are_those_of_other_pictures(self) -> None:
        draw = np.random.default_rng(0)
        maps = draw.normal(size=(3, 20, 30)).astype(np.float32)
        maps[1], maps[2] = 0, 0
        maps[2, 4, 5] = -7  # a single pixel: the percentile is zero
        scale = pictures.scales(maps)
        np.testing.assert_allclose(scale, [render.scale_of(m) for m in maps], rtol=1e-6)
        found = pictures.coloured(maps, scale).astype(int)
        for one, expected in zip(found, maps, strict=True):
            assert np.abs(one - render.colourise(expected)).max() <= 1

    def test_reduced_maps_keep_their_sums(self) -> None:
        maps = np.random.default_rng(0).normal(size=(2, 3, 12, 10)).astype(np.float32)
        found = pictures.Reduction((12, 10), (5, 4))(maps)
        assert found.shape == (2, 3, 5, 4)
        np.testing.assert_allclose(found.mean((2, 3)), maps.mean((2, 3)), atol=1e-6)
        whole = pictures.Reduction((12, 10), (6, 5))(maps)
        np.testing.assert_allclose(whole, maps.reshape(2, 3, 6, 2, 5, 2).mean((3, 5)), atol=1e-6)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [((224, 224), (96, 96)), ((300, 100), (96, 32)), ((32, 48), (32, 48)), ((9600, 3), (96, 1))],
    )
    def test_sizes(self, size: tuple[int, int], expected: tuple[int, int]) -> None:
        assert pictures.fitting(*size, 96) == expected


class TestNumbers:
    def test_counts(self, store: Path, report: Path) -> None:
        summary = data(report, "summary")
        maps = open_maps(store)
        logits, label, done = maps.array("logits"), maps.array("label"), maps.done
        right = (logits.argmax(1) == label)[done]
        assert summary["counts"] == {"images": 40, "done": 39, "failed": 1, "left": 0, "labelled": 39}
        assert summary["accuracy"]["top1"] == right.sum()
        assert summary["failures"] == [["folder/image 7", "broken <b>image</b> 7"]]
        assert [run["images_per_second"] for run in summary["runs"]] == [16.0]
        of_class = {row[0]: row for row in summary["classRows"]}
        assert sorted(of_class) == list(range(6))
        for k, (_, images, correct, confidence, _) in of_class.items():
            mine = (label == k) & done
            assert (images, correct) == (mine.sum(), right[(label == k)[done]].sum())
            powers = np.exp(logits[mine].astype(float))
            assert confidence == pytest.approx((powers.max(1) / powers.sum(1)).mean(), abs=1e-5)

    def test_columns(self, store: Path, report: Path) -> None:
        maps = open_maps(store)
        done = np.flatnonzero(maps.done)
        logits = maps.array("logits")[done].astype(float)
        powers = np.exp(logits)
        probability = powers / powers.sum(1, keepdims=True)
        label = maps.array("label")[done]
        assert column(report, "label", "<i2").tolist() == label.tolist()
        assert column(report, "predicted", "<i2").tolist() == logits.argmax(1).tolist()
        step = 0.5 / 65534 + 1e-6
        np.testing.assert_allclose(shares(report, "confidence"), probability.max(1), atol=step)
        np.testing.assert_allclose(
            shares(report, "labelProbability"), probability[np.arange(len(done)), label], atol=step
        )
        expected = statistics.entropies(np.stack([maps[int(k)].map[0] for k in done]))
        np.testing.assert_allclose(shares(report, "entropy") * np.log(12 * 16), expected, atol=1e-3)
        assert np.isnan(shares(report, "inside")).all()
        assert not data(report, "summary")["gallery"]["regions"]

    def test_names_and_details(self, store: Path, report: Path) -> None:
        maps = open_maps(store)
        done = np.flatnonzero(maps.done)
        assert data(report, "names-000") == [maps.names[k] for k in done]
        for k, (number, top, explained, largest, problem) in zip(done, data(report, "details-000"), strict=True):
            one = maps[int(k)]
            assert number == k
            assert [c for c, _ in top] == np.argsort(-one.logits, kind="stable")[:5].tolist()
            assert explained == one.target.tolist()
            assert largest == pytest.approx(np.abs(one.map).max((1, 2)), rel=1e-3)
            assert problem == ""

    def test_pictures(self, store: Path, report: Path) -> None:
        maps = open_maps(store)
        about = data(report, "summary")["gallery"]["sheets"]
        assert sorted(about) == ["maps", "maps-large-0", "maps-large-1"]
        for row, k in enumerate(np.flatnonzero(maps.done)):
            expected = render.colourise(maps[int(k)].map[0]).astype(float)
            for kind in about:
                assert np.abs(tile(report, about[kind], row) - expected).mean() < 12, (kind, row)  # of JPEG

    def test_mean_maps(self, store: Path, report: Path) -> None:
        maps = open_maps(store)
        values = np.stack([one.map[0] / np.abs(one.map[0]).sum() for one in maps if one.done])
        label = maps.array("label")[maps.done]
        about = data(report, "summary")["means"]
        for place, chosen in enumerate([label >= 0, *(label == k for k in range(6))]):
            expected = render.colourise(values[chosen].mean(0)).astype(float)
            assert np.abs(tile(report, about, place) - expected).mean() < 12

    def test_the_same_bytes_again(self, store: Path, report: Path, tmp_path: Path) -> None:
        write_report(open_maps(store), tmp_path / "again")
        assert contents(tmp_path / "again") == contents(report)

    @pytest.mark.parametrize("dtype", ["float32", "int8"])
    @pytest.mark.parametrize("channels", [False, True])
    def test_kinds_of_stores(self, tmp_path: Path, dtype: str, channels: bool) -> None:
        maps = open_maps(write_store(tmp_path / "s", 20, dtype=dtype, channels=channels, labels=False))
        summary = write_report(maps, tmp_path / "out")
        assert summary["accuracy"] is None
        assert not summary["labelledClasses"]
        first = maps[0].map.sum(0) if channels else maps[0].map
        expected = render.colourise(first).astype(float)
        assert np.abs(tile(tmp_path / "out", summary["gallery"]["sheets"]["maps"], 0) - expected).mean() < 12
        assert set(column(tmp_path / "out", "label", "<i2")) == {-1}

    def test_a_sample(self, tmp_path: Path) -> None:
        maps = open_maps(write_store(tmp_path / "s", 100, failed=[3]))
        found = {}
        for seed in (0, 0, 1):
            summary = write_report(maps, tmp_path / f"out-{len(found)}", images=30, seed=seed)
            assert summary["gallery"]["count"] == 30
            assert summary["counts"]["done"] == 99
            assert sum(row[1] for row in summary["classRows"]) == 99
            rows = tuple(detail[0] for detail in data(tmp_path / f"out-{len(found)}", "details-000"))
            assert list(rows) == sorted({*rows} - {3})
            found[seed] = rows
            names = data(tmp_path / f"out-{len(found) - 1}", "names-000")
            assert names == [maps.names[k] for k in rows]
        assert found[0] != found[1]

    def test_unfinished_stores(self, tmp_path: Path) -> None:
        summary = write_report(open_maps(write_store(tmp_path / "s", 40, finished=1, failed=[2])), tmp_path / "out")
        assert summary["counts"] == {"images": 40, "done": 15, "failed": 1, "left": 24, "labelled": 15}
        empty = open_maps(write_store(tmp_path / "none", 40, finished=0))
        with pytest.raises(StoreError, match="no image in this store has a map yet"):
            write_report(empty, tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_names_that_are_no_text(self, tmp_path: Path) -> None:
        names = ["a\udc80", "b\u202ec", "d\u2028e", "f\x1b[31m"]
        write_report(open_maps(write_store(tmp_path / "s", 4, names=names)), tmp_path / "out")
        assert data(tmp_path / "out", "names-000") == ["a\\udc80", "b\\u202ec", "d\\u2028e", "f\\x1b[31m"]


class TestFolder:
    def test_an_earlier_report_is_replaced(self, store: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write_report(open_maps(write_store(tmp_path / "large", 400)), out)
        assert (out / "pictures" / "report-maps-006.jpg").exists()
        write_report(open_maps(store), out)
        assert not (out / "pictures" / "report-maps-001.jpg").exists()
        manifest = json.loads((out / "report.json").read_text())
        assert {*manifest["files"], "report.json"} == set(contents(out))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out"]

    @pytest.mark.parametrize("name", ["mine.txt", ".git/config", "data/notes.js", "pictures/mine.jpg"])
    @pytest.mark.parametrize("with_report", [False, True])
    def test_other_files_are_kept(
        self, store: Path, report: Path, tmp_path: Path, name: str, with_report: bool
    ) -> None:
        out = tmp_path / "out"
        if with_report:
            shutil.copytree(report, out)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
        before = contents(out)
        with pytest.raises(StoreError, match=r"files that are not of a report .*choose another --out"):
            write_report(open_maps(store), out)
        assert contents(out) == before

    def test_links_and_empty_folders_are_kept(self, store: Path, report: Path, tmp_path: Path) -> None:
        for number, make in enumerate((lambda path: path.symlink_to(tmp_path), lambda path: path.mkdir())):
            out = tmp_path / f"out-{number}"
            shutil.copytree(report, out)
            make(out / "other")
            with pytest.raises(StoreError, match=r"not of a report \(other"):
                write_report(open_maps(store), out)

    def test_what_is_no_folder(self, store: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        for out, message in ((tmp_path / "file", "not a folder"), ("", "an empty name"), (store, "not of a report")):
            with pytest.raises(StoreError, match=message):
                write_report(open_maps(store), out)
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "empty")
        write_report(open_maps(store), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "empty" / "index.html").is_file()

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
    def test_interrupted(
        self, store: Path, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        out = tmp_path / "out"
        shutil.copytree(report, out)

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(writing._Writer, "_put", fail)
        with pytest.raises((KeyboardInterrupt, StoreError), match=r"No space left|^$"):
            write_report(open_maps(store), out)
        assert contents(out) == contents(report)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_a_killed_run_left_is_removed(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("a")
            name = folder.name
        assert contents(tmp_path) == {"out/a": b"a"}
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        dead = name.replace(f"-{os.getpid()}-", f"-{process.pid}-")
        (tmp_path / dead / "data").mkdir(parents=True)
        (tmp_path / dead / "data" / "x.js").write_text("x")
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_comes_in_between_is_kept(self, store: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"

        def progress(_: int) -> None:
            out.mkdir(exist_ok=True)
            (out / "mine").write_text("mine")

        with pytest.raises(StoreError, match="not of a report"):
            write_report(open_maps(store), out, progress=progress)
        assert contents(out) == {"mine": b"mine"}


def make_photographs(folder: Path) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    for k in range(12):
        pixels = np.full((60, 80, 3), 20 * k, np.uint8)
        pixels[:, :, k % 3] = 230
        pixels[:8, :8] = draw.integers(0, 255, (8, 8, 3))
        Image.fromarray(pixels).save(folder / f"photo {k:02d}.png")
    return folder


def plan_with_photographs(folder: Path) -> Path:
    """A store whose plan leads to photographs beside it."""
    photos = folder / "photos"
    source = open_source(photos if photos.exists() else make_photographs(photos), "flat")
    paths = {"source": str(photos), "labels": None}
    return write_store(
        folder / "store",
        len(source),
        (32, 48),
        lines=image_lines(source, None),
        labels=False,
        names=source.names,
        settings={"preprocessing": CONFIG},
        request={"rule": "a", "layout": "flat", "split": None, "limit": None, "class_of": None, "paths": paths},
        source={"layout": "flat", "digest": source.digest(), "problems": []},
        checksums=[zlib.crc32(source.read(k)) for k in range(len(source))],
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photographs(tmp_path / "photos")


@pytest.fixture
def with_photos(photos: Path, tmp_path: Path) -> Path:
    return plan_with_photographs(tmp_path)


class TestPhotographs:
    def run(self, store: Path, *arguments: object) -> tuple[int, Path]:
        out = store.parent / "out"
        return cli.main(["report", str(store), "--out", str(out), *map(str, arguments)]), out

    def test_are_cropped_as_the_model_saw_them(self, with_photos: Path, photos: Path) -> None:
        code, out = self.run(with_photos)
        assert code == 0
        gallery = data(out, "summary")["gallery"]
        assert gallery["photographs"]
        assert gallery["problem"] == ""
        preprocessing = Preprocessing({**CONFIG, "input_size": tuple(CONFIG["input_size"])})
        for k in range(12):
            expected = preprocessing.to_display(preprocessing(read_image(photos / f"photo {k:02d}.png")))
            for kind in ("photographs", "photographs-large"):
                assert np.abs(tile(out, gallery["sheets"][kind], k) - expected).mean() < 6

    def test_by_processes(self, with_photos: Path) -> None:
        _, out = self.run(with_photos)
        before = contents(out)
        assert self.run(with_photos, "--workers", 2)[0] == 0
        assert contents(out) == before

    def test_changed_and_broken_ones_are_not_shown(
        self, with_photos: Path, photos: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        size = (photos / "photo 03.png").stat().st_size
        (photos / "photo 03.png").write_bytes(b"no image".ljust(size))
        other = bytearray((photos / "photo 05.png").read_bytes())
        at = other.index(b"IDAT")
        assert len(other) == (photos / "photo 05.png").stat().st_size
        other[at - 4 : at - 4] = b""
        Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(photos / "photo 05.png")
        with open(photos / "photo 05.png", "ab") as file:
            file.write(b"\0" * (len(other) - file.tell()))
        code, out = self.run(with_photos)
        assert code == 0
        problems = {detail[0]: detail[-1] for detail in data(out, "details-000") if detail[-1]}
        assert problems == {
            3: "not an image, or in a format that Pillow cannot read here",
            5: "the file has other bytes than what was attributed",
        }
        assert "2 photographs cannot be shown (photo 03: not an image" in capsys.readouterr().err
        assert (tile(out, data(out, "summary")["gallery"]["sheets"]["photographs"], 5) > 250).all()

    def test_a_source_that_is_gone(self, with_photos: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        photos.rename(photos.parent / "elsewhere")
        code, out = self.run(with_photos)
        assert code == 0
        gallery = data(out, "summary")["gallery"]
        assert not gallery["photographs"]
        assert "Maps alone, for the images cannot be read" in gallery["problem"]
        assert "Maps alone" in capsys.readouterr().err
        assert self.run(with_photos, "--source", photos)[0] == 2
        assert "no such folder" in capsys.readouterr().err
        assert not data(out, "summary")["gallery"]["photographs"]
        assert self.run(with_photos, "--source", photos.parent / "elsewhere")[0] == 0
        assert data(out, "summary")["gallery"]["photographs"]

    def test_another_source_is_refused(
        self, with_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "others").mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / "others" / "x.png")
        assert self.run(with_photos, "--source", tmp_path / "others")[0] == 2
        assert "the source has changed since the plan" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_without(self, with_photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out = self.run(with_photos, "--no-photographs")
        assert code == 0
        assert not list((out / "pictures").glob("*photographs*"))
        assert "--no-photographs" in data(out, "summary")["gallery"]["problem"]
        assert capsys.readouterr().err == ""

    def test_sheets_are_no_photographs(self, with_photos: Path, photos: Path) -> None:
        """A report may lie among the photographs."""
        names = open_source(photos, "flat").names
        assert cli.main(["report", str(with_photos), "--out", str(photos / "report")]) == 0
        assert open_source(photos, "flat").names == names
        sheet = photos / "report" / "pictures" / "report-maps-000.jpg"
        with pytest.raises(OwnPictureError):
            read_image(sheet)
        Image.new("RGB", (40, 40)).save(photos / "report-of-mine-000.jpg")
        assert "report-of-mine-000" in open_source(photos, "flat").names

    def test_regions(self, with_photos: Path, photos: Path, tmp_path: Path) -> None:
        maps = open_maps(with_photos)
        plain = open_source(photos, "flat")
        box = BoxRegion(((10, 5, 50, 40),))
        records = [Record(r.name, r.location, region=box if k % 2 else None) for k, r in enumerate(plain.records)]
        source = Source(plain.root, plain.layout, records)
        summary = write_report(maps, tmp_path / "out", photographs=lambda: Photographs(maps.plan, source, 64, 0))
        assert summary["gallery"]["regions"]
        preprocessing = Preprocessing({**CONFIG, "input_size": tuple(CONFIG["input_size"])})
        mask = preprocessing.mask(box((60, 80)))[0].numpy()
        found = shares(tmp_path / "out", "inside")
        assert np.isnan(found[::2]).all()
        expected = [np.maximum(maps[k].map, 0)[mask].sum() / np.maximum(maps[k].map, 0).sum() for k in range(1, 12, 2)]
        np.testing.assert_allclose(found[1::2], expected, atol=1e-4)

    def test_plans_that_do_not_say_how_to_crop(self, store: Path) -> None:
        source = Source("", "flat", [Record("a", WholeFile("a", 1, 1))])
        with pytest.raises(ValueError, match="does not say how photographs are cropped"):
            Photographs(open_maps(store).plan, source, 4, 0)


class TestCommand:
    def test_says_what_came_of_it(self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        assert cli.main(["report", str(store), "--out", str(out), "--images", "10", "--seed", "3"]) == 0
        said = capsys.readouterr()
        assert said.out == f"{out / 'index.html'}: 39 images, 10 in the gallery\n"
        assert "Maps alone, for the images cannot be read: the store does not say where its images lie" in said.err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda store, out: ["report", str(store.parent / "none"), "--out", str(out)], "no such folder"),
            (lambda store, out: ["report", str(store.parent), "--out", str(out)], "not a store of maps"),
            (lambda store, out: ["report", str(store), "--out", str(store)], "choose another --out"),
            (lambda store, out: ["report", str(store), "--out", ""], "an empty name"),
            (lambda store, out: ["report", str(store), "--out", str(out), "--images", "0"], "not between 1 and 100000"),
            (lambda store, out: ["report", str(store), "--out", str(out), "--seed", "-1"], "not between 0 and"),
        ],
    )
    def test_bad_input(
        self,
        store: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        change: Callable[[Path, Path], list[str]],
        message: str,
    ) -> None:
        assert cli.main(change(store, tmp_path / "out")) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_damaged_stores(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        store = write_store(tmp_path / "s")
        shard = next((store / "maps.zarr" / "maps").glob("c*"))
        shard.write_bytes(shard.read_bytes()[:100])
        assert cli.main(["report", str(store), "--out", str(tmp_path / "out")]) == 2
        assert "too short: damaged" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]

    def test_bounds_are_said_once(self) -> None:
        from ramp_fast.cli import report

        assert report.MOST_IMAGES == writing.MOST_IMAGES
