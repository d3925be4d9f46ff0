"""Sources: archives read as the folders they were made from, labels from files, and what is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ramp_fast.data import ClassNames, ImageError, Preprocessing, Source, open_data, open_source
from ramp_fast.data.labels import read_labels
from ramp_fast.data.locations import from_fields
from ramp_fast.errors import InputError

TENCH, GOLDFISH = "n01440764", "n01443537"


def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def tar_bytes(entries: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read_all(source: Source) -> dict[str, bytes]:
    return {name: source.read(number) for number, name in enumerate(source.names)}


def classes() -> ClassNames:
    return ClassNames.imagenet(1000)


VAL = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(number) for number in (1, 2, 3)}


class TestTar:
    @pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    def test_flat(self, tmp_path: Path, kind: int) -> None:
        path = tmp_path / "val.tar"
        path.write_bytes(tar_bytes({**VAL, "._hidden.JPEG": b"x", "notes.txt": b"y"}, kind))
        source = open_source(path)
        assert source.layout == "flat"
        assert read_all(source) == {name.removesuffix(".JPEG"): data for name, data in VAL.items()}
        assert source.labels(classes()) is None
        assert os.listdir(tmp_path) == ["val.tar"]  # unpacked nowhere

    def test_long_names_and_folders(self, tmp_path: Path) -> None:
        entries = {f"./{'deep/' * 40}{group}/{number}.jpg": jpeg(number) for group in "ab" for number in (1, 2)}
        (tmp_path / "x.tar").write_bytes(tar_bytes(entries))
        source = open_source(tmp_path / "x.tar")
        assert source.layout == "folders"
        assert [record.group for record in source.records] == ["a", "a", "b", "b"]
        assert list(read_all(source).values()) == list(entries.values())

    def test_tars_within_a_tar(self, tmp_path: Path) -> None:
        """ImageNet's training set: a tar for each class."""
        inner = {
            f"{group}.tar": tar_bytes({f"{group}_{number}.JPEG": jpeg(number) for number in (5, 6)})
            for group in (TENCH, GOLDFISH)
        }
        (tmp_path / "train.tar").write_bytes(tar_bytes(inner))
        source = open_source(tmp_path / "train.tar")
        assert source.labels(classes()) == [0, 0, 1, 1]
        assert source.names[0] == f"{TENCH}/{TENCH}_5"
        assert list(read_all(source).values()) == [jpeg(5), jpeg(6)] * 2

    def test_a_folder_of_tars_of_classes(self, tmp_path: Path) -> None:
        for group in (GOLDFISH, TENCH):
            (tmp_path / f"{group}.tar").write_bytes(tar_bytes({f"{group}_1.JPEG": jpeg(1)}))
        source = open_source(tmp_path)
        assert source.labels(classes()) == [0, 1]
        assert len(read_all(source)) == 2

    def test_damaged_and_compressed(self, tmp_path: Path) -> None:
        (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
        with pytest.raises(InputError, match=r"x\.tar: not a tar that can be read"):
            open_source(tmp_path / "x.tar")
        (tmp_path / "x.tar.gz").write_bytes(b"")
        with pytest.raises(InputError, match="a compressed tar cannot be read image by image: uncompress it"):
            open_source(tmp_path / "x.tar.gz")

    def test_an_archive_that_was_cut(self, tmp_path: Path) -> None:
        path = tmp_path / "val.tar"
        path.write_bytes(tar_bytes(VAL))
        source = open_source(path)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ImageError, match="ends too early: it is damaged, or has changed"):
            source.read(2)


class TestZip:
    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_class_folders(self, tmp_path: Path, compression: int) -> None:
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for group in "ba":
                archive.writestr(f"set/{group}/1.jpg", jpeg(1))
            archive.writestr("__MACOSX/set/a/._1.jpg", b"")
        source = open_source(path)
        assert (source.layout, source.labels(ClassNames(2))) == ("folders", [1, 0])
        assert list(read_all(source).values()) == [jpeg(1)] * 2
        assert open_source(path, "flat").labels(ClassNames(2)) is None

    def test_damage_is_found(self, tmp_path: Path) -> None:
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("1.jpg", jpeg(1))
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.write_bytes(data)
        with pytest.raises(ImageError, match="the checksum of this entry is wrong"):
            open_source(path).read(0)

    def test_encrypted(self, tmp_path: Path) -> None:
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("1.jpg", jpeg(1))
        data = path.read_bytes()
        at = data.index(b"PK\x01\x02") + 8
        path.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
        with pytest.raises(InputError, match="its entries are encrypted"):
            open_source(path)


class TestWebdataset:
    def test_shards(self, tmp_path: Path) -> None:
        for shard in (0, 1):
            entries = {}
            for number in (0, 1):
                entries[f"{shard}{number}.jpg"] = jpeg(number)
                entries[f"{shard}{number}.cls"] = str(3 * shard + number).encode()
                entries[f"{shard}{number}.json"] = b"{}"
            (tmp_path / f"train-{shard}.tar").write_bytes(tar_bytes(entries))
        source = open_source(tmp_path)
        assert (source.layout, source.names) == ("webdataset", ["00", "01", "10", "11"])
        assert source.labels(ClassNames(5)) == [0, 1, 3, 4]
        assert source.read(3) == jpeg(1)

    def test_same_keys_in_several_shards(self, tmp_path: Path) -> None:
        for shard in (0, 1):
            (tmp_path / f"s{shard}.tar").write_bytes(tar_bytes({"a.jpg": jpeg(shard), "a.cls": str(shard).encode()}))
        source = open_source(tmp_path)
        assert len(set(source.names)) == 2
        assert source.labels(ClassNames(2)) == [0, 1]
        assert [source.read(number) for number in (0, 1)] == [jpeg(0), jpeg(1)]

    def test_a_sample_without_class(self, tmp_path: Path) -> None:
        entries = {"a.jpg": jpeg(1), "a.cls": b"1", "b.jpg": jpeg(2)}
        (tmp_path / "s.tar").write_bytes(tar_bytes(entries))
        source = open_source(tmp_path / "s.tar")
        assert source.names == ["a"]
        assert [problem.message for problem in source.problems] == ["no class is said of it (.cls)"]

    def test_splits(self, tmp_path: Path) -> None:
        for name in ("train-00000-of-00001", "validation-00000-of-00001"):
            (tmp_path / f"{name}.tar").write_bytes(tar_bytes({f"{name}.jpg": jpeg(1)}))
        with pytest.raises(InputError, match="archives of several splits: pass split, one of train, validation"):
            open_source(tmp_path)
        assert open_source(tmp_path, split="validation").names == ["validation-00000-of-00001"]
        with pytest.raises(InputError, match="no archive whose name begins with 'test'"):
            open_source(tmp_path, split="test")


class TestParquet:
    def table(self, path: Path, rows: int, start: int = 0, paths: bool = True) -> None:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        images = [{"bytes": jpeg(start + n), "path": f"img_{start + n}.JPEG" if paths else None} for n in range(rows)]
        table = pa.table({"image": images, "label": [(start + n) % 3 for n in range(rows)]})
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path, row_group_size=2)

    def test_as_hugging_face_lays_it_out(self, tmp_path: Path) -> None:
        self.table(tmp_path / "data" / "validation-00000-of-00002.parquet", 5)
        self.table(tmp_path / "data" / "validation-00001-of-00002.parquet", 3, start=5)
        (tmp_path / "README.md").write_text("x")
        source = open_source(tmp_path)
        assert (source.layout, len(source)) == ("parquet", 8)
        assert source.names[:2] == ["img_0", "img_1"]
        assert source.labels(ClassNames(3)) == [n % 3 for n in range(8)]
        assert [source.read(n) for n in (6, 1, 4)] == [jpeg(6), jpeg(1), jpeg(4)]

    def test_without_paths(self, tmp_path: Path) -> None:
        self.table(tmp_path / "x.parquet", 3, paths=False)
        source = open_source(tmp_path / "x.parquet")
        assert source.names == ["x/00000000", "x/00000001", "x/00000002"]
        assert source.read(2) == jpeg(2)

    def test_no_images_in_it(self, tmp_path: Path) -> None:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
        with pytest.raises(InputError, match=r"no column of image bytes; .* there are: text"):
            open_source(tmp_path / "x.parquet")


class TestLabels:
    def folder(self, root: Path) -> Path:
        root.mkdir()
        for name, data in VAL.items():
            (root / name).write_bytes(data)
        return root

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("val.txt", "".join(f"{name} {number}\n" for number, name in enumerate(VAL, 7))),
            (
                "LOC_val_solution.csv",
                "ImageId,PredictionString\n"
                + "".join(
                    f"{name[:-5]},{group} 1 2 30 40 {group} 5 6 7 8\n"
                    for name, group in zip(VAL, ("n01514668", "n01514859", "n01518878"), strict=True)
                ),
            ),
        ],
    )
    @pytest.mark.parametrize("where", ["beside", "inside", "named", "tar"])
    def test_of_the_validation_set(self, tmp_path: Path, name: str, text: str, where: str) -> None:
        root = self.folder(tmp_path / "val")
        if where == "tar":
            root = tmp_path / "v.tar"
            root.write_bytes(tar_bytes(VAL))
        file = root / name if where == "inside" else tmp_path / ("x.txt" if where == "named" else name)
        file.write_text(text)
        source = open_source(root, labels=file if where == "named" else None)
        assert source.labels(classes()) == [7, 8, 9]

    def test_of_the_development_kit(self, tmp_path: Path) -> None:
        """ILSVRC's own numbers follow no order of names."""
        scipy_io = pytest.importorskip("scipy.io")
        root = self.folder(tmp_path / "val")
        truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
        truth.write_text("2\n1\n2\n")
        with pytest.raises(InputError, match=r"which is not the models': put meta\.mat of the development kit beside"):
            open_source(root)
        rows = np.array([(1, GOLDFISH), (2, TENCH)], dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
        scipy_io.savemat(tmp_path / "meta.mat", {"synsets": rows})
        assert open_source(root).labels(classes()) == [0, 1, 0]

    def test_images_without_label(self, tmp_path: Path) -> None:
        root = self.folder(tmp_path / "val")
        (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000002.JPEG 4\n")
        source = open_source(root)
        assert source.names == ["ILSVRC2012_val_00000002"]
        assert len(source.problems) == 2
        (tmp_path / "val.txt").write_text("other.JPEG 4\n")
        with pytest.raises(InputError, match="has no class of any image"):
            open_source(root)

    @pytest.mark.parametrize("text", ["", "a\n", "a \n"])
    def test_files_that_say_nothing(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "l.txt").write_text(text)
        with pytest.raises(InputError, match=r"l\.txt"):
            read_labels(str(tmp_path / "l.txt"))


def test_the_same_through_every_layout(tmp_path: Path) -> None:
    """A folder, and archives of it: evaluation gets the same images with the same classes."""
    files = {f"{group}/{group}_{number}.jpg": jpeg(number) for group in (TENCH, GOLDFISH) for number in (1, 2)}
    for name, data in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    settings: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    preprocessing = Preprocessing({"input_size": (3, 16, 16), **settings})
    opened = [
        open_data(tmp_path / name, preprocessing=preprocessing, class_names=classes(), limit=3)
        for name in ("folder", "x.tar", "x.zip")
    ]
    seen = [{(e.name, e.target, e.image.sum().item()) for e in data} for data in opened]
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 3


def test_names_are_distinct(tmp_path: Path) -> None:
    entries = {"a.jpg": jpeg(1), "a.png": jpeg(2), "A.jpeg": jpeg(3)}
    (tmp_path / "x.tar").write_bytes(tar_bytes(entries))
    names = open_source(tmp_path / "x.tar").names
    assert len({name.casefold() for name in names}) == 3


def test_locations_as_json(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(VAL))
    source = open_source(tmp_path / "x.tar")
    location = source.locate(1)
    again = from_fields(json.loads(json.dumps(location.fields())))
    assert again == location
    assert again.read() == source.read(1)


@pytest.mark.parametrize(
    ("make", "layout", "message"),
    [
        (lambda p: p / "none", "auto", "no such folder"),
        (lambda p: p / "x.txt", "auto", "not a folder, and no archive"),
        (lambda p: p / "x.tar", "voc", "the layout voc is read from folders: unpack it first"),
        (lambda p: p / "x.tar", "folders", "lie at the top, in no class's folder"),
        (lambda p: p / "empty", "webdataset", "no archives of the layout 'webdataset'"),
    ],
)
def test_refused(tmp_path: Path, make: Any, layout: str, message: str) -> None:
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "x.tar").write_bytes(tar_bytes(VAL))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        open_source(make(tmp_path), layout)
