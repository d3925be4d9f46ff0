"""Labelled data: layouts, classes, boxes and masks in the geometry of the images, reading ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ramp_fast.data import VOC_CLASSES, ClassNames, Dataset, Preprocessing, batches, open_data
from ramp_fast.data.reading import read_ahead
from ramp_fast.errors import InputError

SIZE = 16


def preprocessing(**changes: Any) -> Preprocessing:
    config = {
        "input_size": (3, SIZE, SIZE),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    return Preprocessing({**config, **changes})


def picture(path: Path, size: tuple[int, int] = (SIZE, SIZE), grey: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


def open_(path: Path, *args: Any, **options: Any) -> Dataset:
    return open_data(path, *args, **{"preprocessing": preprocessing(), **options})


def targets(data: Dataset) -> dict[str, int | None]:
    return {example.name: example.target for example in data}


class TestMaskGeometry:
    @pytest.mark.parametrize("crop", [1.0, 0.7])
    @pytest.mark.parametrize("mode", ["center", "squash", "border"])
    @pytest.mark.parametrize("size", [(24, 24), (90, 61), (45, 100), (9, 7)])
    @pytest.mark.parametrize("out", [(24, 24), (16, 32)])
    def test_aligned_with_the_image(self, out: tuple[int, int], size: tuple[int, int], mode: str, crop: float) -> None:
        """What is all white in the model's input is in the mask, what is all black is not."""
        prepared = preprocessing(input_size=(3, *out), crop_mode=mode, crop_pct=crop, mean=(0.45, 0.45, 0.45))
        width, height = size
        region = np.zeros((height, width), dtype=bool)
        region[height // 4 : height * 2 // 3, width // 3 : width * 4 // 5] = True
        seen = prepared(Image.fromarray(region.astype(np.uint8) * 255).convert("RGB"))
        shades = (seen * 0.5 + 0.45)[:1]
        mask = prepared.mask(region)
        assert mask.dtype == torch.bool
        assert mask.shape == (1, *out)
        white, black = shades > 0.999, shades < 0.001
        assert min(int(white.sum()), int(black.sum())) >= 4  # there is something to compare
        assert bool(mask[white].all())
        assert not bool(mask[black].any())

    def test_by_the_nearest_pixel(self) -> None:
        region = np.random.default_rng(0).random((4 * SIZE, 4 * SIZE)) < 0.5
        assert torch.equal(preprocessing().mask(region)[0], torch.from_numpy(region[2::4, 2::4].copy()))

    def test_borders_are_outside(self) -> None:
        prepared = preprocessing(crop_mode="border", mean=(0.9, 0.9, 0.9))
        mask = prepared.mask(np.ones((8, 16), dtype=bool))
        assert mask[0].all(1).tolist() == [False] * 4 + [True] * 8 + [False] * 4

    def test_the_crop_cuts(self) -> None:
        region = np.zeros((20, 20), dtype=bool)
        region[:2] = True
        assert not bool(preprocessing(crop_pct=0.8).mask(region).any())
        region[:3] = True
        assert preprocessing(crop_pct=0.8).mask(region)[0].all(1).tolist() == [True] + [False] * 15

    @pytest.mark.parametrize("mask", [np.zeros((3, 3)), np.zeros((1, 3, 3), dtype=bool)])
    def test_refused(self, mask: Any) -> None:
        with pytest.raises(InputError, match=r"a mask must be bool \[h, w\], got"):
            preprocessing().mask(mask)


class TestFlat:
    def test_images_without_labels(self, tmp_path: Path) -> None:
        for name in ("b.png", "a.png"):
            picture(tmp_path / name)
        data = open_(tmp_path)
        assert (data.layout, len(data), data.labelled, data.has_masks) == ("flat", 2, False, False)
        (batch,) = batches(data, 4, 0)
        assert batch.images.shape == (2, 3, SIZE, SIZE)
        assert (batch.target, batch.masks, batch.names) == (None, None, ["a", "b"])

    def test_with_subfolders_when_asked(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        picture(tmp_path / "more/a.png")
        with pytest.raises(InputError, match='at the top and in subfolders: pass layout="flat"'):
            open_(tmp_path)
        assert list(targets(open_(tmp_path, "flat"))) == ["a", "more/a"]
        with pytest.raises(InputError, match=r"1 images lie at the top, in no class's folder \(a.png\)"):
            open_(tmp_path, "folders", class_names=ClassNames(1))


class TestFolders:
    def opened(self, root: Path, names: list[str], classes: ClassNames | None) -> dict[str, int | None]:
        for number, name in enumerate(names):
            picture(root / name / "deep" / f"{number}.png")
        data = open_(root, class_names=classes)
        assert data.layout == "folders"
        return {name.split("/")[0]: target for name, target in targets(data).items()}

    def test_by_name(self, tmp_path: Path) -> None:
        found = self.opened(tmp_path, ["Tree_Frog", "ape"], ClassNames(3, ["ape", "bee", "tree frog"]))
        assert found == {"Tree_Frog": 2, "ape": 0}

    def test_by_number(self, tmp_path: Path) -> None:
        # sorted, "10" would come before "9"; as many folders as classes do not make an order of them
        names = [str(n) for n in range(11)]
        assert self.opened(tmp_path, names, ClassNames(11)) == {name: int(name) for name in names}
        picture(tmp_path / "11" / "x.png")
        with pytest.raises(InputError, match="1 class folders are beyond the model's classes, 0 to 10: 11"):
            open_(tmp_path, class_names=ClassNames(11))

    def test_by_wordnet_id(self, tmp_path: Path) -> None:
        # the 1000 classes begin with tench, goldfish, great white shark
        names = ["n01484850", "n01440764"]
        assert self.opened(tmp_path, names, ClassNames.imagenet(1000)) == {"n01484850": 2, "n01440764": 0}
        picture(tmp_path / "n99999999" / "x.png")
        with pytest.raises(InputError, match="1 class folders are not among ImageNet's 1000 WordNet ids: n99999999"):
            open_(tmp_path, class_names=ClassNames.imagenet(1000))

    def test_by_order(self, tmp_path: Path) -> None:
        assert self.opened(tmp_path, ["b", "a", "c"], ClassNames(3)) == {"a": 0, "b": 1, "c": 2}
        with pytest.raises(InputError, match=r"3 class folders \(a, b, c\) for a model with 4 classes; name them by"):
            open_(tmp_path, class_names=ClassNames(4))
        with pytest.raises(InputError, match="labels need class_names"):
            open_(tmp_path)

    def test_wordnet_ids_of_other_data_are_in_order(self, tmp_path: Path) -> None:
        assert self.opened(tmp_path, ["n01484850", "n01440764"], ClassNames(2)) == {"n01440764": 0, "n01484850": 1}

    def test_names_that_are_partly_known(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="2 class folders are not among the model's 3 class names: cow, yak"):
            self.opened(tmp_path, ["ape", "cow", "yak"], ClassNames(3, ["ape", "bee", "cat"]))

    def test_a_name_of_two_classes(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"1 class folders are the name of several classes.*: crane"):
            self.opened(tmp_path, ["crane"], ClassNames(3, ["crane", "bee", "Crane"]))

    def test_many_unknown_names_are_cut(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"\(a, b, c and 3 more\)"):
            self.opened(tmp_path, list("abcdef"), ClassNames(7))


def tiny_imagenet(root: Path) -> Path:
    (root / "val").mkdir(parents=True)
    (root / "wnids.txt").write_text("n02\nn01\n")
    rows = ["val_0.JPEG\tn01\t2\t3\t5\t7", "val_1.JPEG\tn02\t0\t0\t15\t15"]
    (root / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")
    for row in rows:
        picture(root / "val/images" / row.split("\t")[0])
    for wordnet in ("n01", "n02"):
        picture(root / "train" / wordnet / "images" / f"{wordnet}_0.JPEG")
        (root / "train" / wordnet / f"{wordnet}_boxes.txt").write_text(f"{wordnet}_0.JPEG\t1\t1\t4\t2\n")
    return root


class TestTinyImageNet:
    def test_val(self, tmp_path: Path) -> None:
        data = open_(tiny_imagenet(tmp_path), class_names=ClassNames(2))
        assert (data.layout, data.labelled, data.has_masks) == ("tiny-imagenet", True, True)
        (batch,) = batches(data, 2, 0)
        assert batch.names == ["images/val_0", "images/val_1"]
        assert batch.target is not None
        assert batch.target.tolist() == [0, 1]
        assert batch.target.dtype == torch.long
        assert batch.masks is not None
        assert batch.masks.shape == (2, 1, SIZE, SIZE)
        expected = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        expected[3:8, 2:6] = True  # the last pixels are inside
        assert torch.equal(batch.masks[0, 0], expected)
        assert bool(batch.masks[1].all())

    def test_train(self, tmp_path: Path) -> None:
        data = open_(tiny_imagenet(tmp_path), split="train", class_names=ClassNames(2))
        assert targets(data) == {"n01/images/n01_0": 0, "n02/images/n02_0": 1}
        assert all(e.mask is not None and int(e.mask.sum()) == 8 for e in data)

    def test_classes_are_in_the_order_of_all_ids(self, tmp_path: Path) -> None:
        root = tiny_imagenet(tmp_path)
        (root / "wnids.txt").write_text("n05\nn02\nn03\nn01\nn00\nn04\n")
        assert list(targets(open_(root, class_names=ClassNames(6))).values()) == [1, 2]

    def test_classes_by_a_file_of_names(self, tmp_path: Path) -> None:
        root = tiny_imagenet(tmp_path)
        (tmp_path / "names").write_text("n02\nn01\n")
        data = open_(root, class_names=ClassNames.from_file(tmp_path / "names", 2))
        assert list(targets(data).values()) == [1, 0]

    def test_problems(self, tmp_path: Path) -> None:
        root = tiny_imagenet(tmp_path)
        picture(root / "val/images/val_2.JPEG")
        data = open_(root, class_names=ClassNames(2))
        assert len(data) == 2
        assert [p.message for p in data.problems] == ["no annotation of this image"]
        with (root / "val/val_annotations.txt").open("a") as file:
            file.write("val_2.JPEG\tn07\t0\t0\t3\t3\n")
        assert [p.message for p in open_(root, class_names=ClassNames(2)).problems] == [
            "its class n07 is not in wnids.txt"
        ]

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("val/val_annotations.txt", "val_0.JPEG\tn01\t2\t3\t5\n", "2 words and a box of four numbers, got 'val_0"),
            ("val/val_annotations.txt", "x\n", "2 words and a box"),
            ("wnids.txt", "n01\n", r"1 class folders \(n01\) for a model with 2 classes"),
        ],
    )
    def test_refused(self, tmp_path: Path, file: str, text: str, message: str) -> None:
        root = tiny_imagenet(tmp_path)
        (root / file).write_text(text)
        with pytest.raises(InputError, match=message):
            open_(root, class_names=ClassNames(2))

    def test_missing_parts(self, tmp_path: Path) -> None:
        root = tiny_imagenet(tmp_path)
        with pytest.raises(InputError, match="split must be val or train, got 'test'"):
            open_(root, split="test", class_names=ClassNames(2))
        (root / "val/val_annotations.txt").unlink()
        with pytest.raises(InputError, match=r"cannot read .*val_annotations.txt: No such file"):
            open_(root, class_names=ClassNames(2))
        with pytest.raises(InputError, match=r"cannot read .*wnids.txt"):
            open_(tmp_path / "train", "tiny-imagenet", class_names=ClassNames(2))


Box = tuple[int, int, int, int]


def voc_image(root: Path, name: str, *objects: tuple[str, Box], said: tuple[int, int] = (SIZE, SIZE)) -> None:
    """Boxes as Pascal writes them: the first pixel is 1."""
    picture(root / "JPEGImages" / f"{name}.jpg")
    corners = ("xmin", "ymin", "xmax", "ymax")
    rows = "".join(
        f"<object><name>{kind}</name><part><name>head</name></part><bndbox>"
        + "".join(f"<{c}>{v}</{c}>" for c, v in zip(corners, box, strict=True))
        + "</bndbox></object>"
        for kind, box in objects
    )
    (root / "Annotations").mkdir(exist_ok=True)
    (root / f"Annotations/{name}.xml").write_text(
        f"<annotation><size><width>{said[0]}</width><height>{said[1]}</height></size>{rows}</annotation>"
    )


def voc(root: Path) -> Path:
    voc_image(root, "one", ("dog", (1, 1, 4, 3)), ("cat", (9, 9, 16, 16)), ("dog", (5, 1, 6, 1)))
    voc_image(root, "two", ("sofa", (1, 1, 16, 16)))
    voc_image(root, "three", ("cat", (2, 2, 3, 3)))
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/val.txt").write_text("one\ntwo\n")
    (root / "ImageSets/Main/dog_val.txt").write_text("one  1\ntwo -1\n")
    (root / "ImageSets/Main/trainval.txt").write_text("one\ntwo\nthree\n")
    return root


def rectangle(*boxes: Box) -> torch.Tensor:
    """Slices, as numpy counts: rows from, to, columns from, to."""
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    for top, bottom, left, right in boxes:
        mask[:, top:bottom, left:right] = True
    return mask


class TestVOC:
    def test_without_labels_the_mask_is_of_all_objects(self, tmp_path: Path) -> None:
        data = open_(voc(tmp_path))
        assert (data.layout, len(data), data.labelled, data.has_masks) == ("voc", 2, False, True)
        one, two = data
        assert (one.name, one.target, two.name) == ("one", None, "two")
        assert one.mask is not None
        assert torch.equal(one.mask, rectangle((0, 3, 0, 4), (8, 16, 8, 16), (0, 1, 4, 6)))

    def test_an_example_for_every_mapped_class(self, tmp_path: Path) -> None:
        data = open_(voc(tmp_path), split="trainval", targets={"cat": 7, "dog": 2}, class_names=ClassNames(10))
        assert targets(data) == {"one:cat": 7, "one:dog": 2, "three:cat": 7}
        masks = [e.mask for e in data]
        expected = [rectangle((8, 16, 8, 16)), rectangle((0, 3, 0, 4), (0, 1, 4, 6)), rectangle((1, 3, 1, 3))]
        assert all(m is not None and torch.equal(m, e) for m, e in zip(masks, expected, strict=True))

    def test_segmentations(self, tmp_path: Path) -> None:
        root = voc(tmp_path)
        objects = np.zeros((SIZE, SIZE), dtype=np.uint8)
        objects[0, 0], objects[10, 10], objects[1, 5], objects[12] = 1, 2, 3, 255
        (root / "SegmentationObject").mkdir()
        Image.fromarray(objects).convert("P").save(root / "SegmentationObject/one.png")
        dogs = {"targets": {"dog": 2}}
        (dog,) = open_(root, **dogs)
        assert dog.mask is not None
        assert torch.equal(dog.mask, rectangle((0, 1, 0, 1), (1, 2, 5, 6)))
        kinds = np.zeros((SIZE, SIZE), dtype=np.uint8)
        kinds[3, 3], kinds[4, 4], kinds[5, 5] = 12, 8, 255  # dog, cat, an outline
        (root / "SegmentationClass").mkdir()
        Image.fromarray(kinds).save(root / "SegmentationClass/one.png")
        (dog,) = open_(root, **dogs)
        assert dog.mask is not None
        assert torch.equal(dog.mask, rectangle((3, 4, 3, 4)))
        one, two = open_(root)
        assert one.mask is not None
        assert torch.equal(one.mask, rectangle((3, 4, 3, 4), (4, 5, 4, 5)))
        assert two.mask is not None  # has no segmentation: its box
        assert bool(two.mask.all())
        assert (len(VOC_CLASSES), VOC_CLASSES[11], VOC_CLASSES[7]) == (20, "dog", "cat")

    def test_lists(self, tmp_path: Path) -> None:
        root = voc(tmp_path)
        (root / "ImageSets/Segmentation").mkdir()
        (root / "ImageSets/Segmentation/val.txt").write_text("three\n")
        assert list(targets(open_(root, split="Segmentation/val"))) == ["three"]
        with pytest.raises(InputError, match=r"no list .*test.txt; there are: trainval, val$"):
            open_(root, split="test")
        (root / "ImageSets/Main/val.txt").unlink()
        assert len(open_(root)) == 3

    def test_one_level_too_high(self, tmp_path: Path) -> None:
        voc(tmp_path / "VOC2007")
        with pytest.raises(InputError, match=r"one level down; open .*VOC2007$"):
            open_(tmp_path)

    def test_problems(self, tmp_path: Path) -> None:
        root = voc(tmp_path)
        voc_image(root, "four", ("dog", (1, 1, 4, 3)), said=(99, SIZE))
        voc_image(root, "five")
        voc_image(root, "six", ("dog", (40, 40, 50, 50)))
        picture(root / "JPEGImages/seven.jpg")
        voc_image(root, "eight", ("dog", (1, 1, 4, 3)))
        (root / "Annotations/eight.xml").write_text("<annotation><object>")
        voc_image(root, "nine", ("dog", (1, 1, 4, 3)))
        (root / "SegmentationClass").mkdir()
        Image.new("RGB", (SIZE, SIZE)).save(root / "SegmentationClass/nine.png")
        names = ["one", "four", "five", "six", "seven", "eight", "nine", "ten"]
        (root / "ImageSets/Main/val.txt").write_text("\n".join(names))
        data = open_(root)
        assert [p.message for p in data.problems] == ["in the list, but there is no such image"]
        for _ in range(2):  # a second pass records nothing twice
            assert list(targets(data)) == ["one"]
        messages = {Path(p.path).stem: p.message for p in data.problems}
        assert len(messages) == len(data.problems)
        assert messages["four"] == "its annotation is for 99 x 16 pixels, it has 16 x 16"
        assert messages["five"] == "its annotation has no objects"
        assert messages["six"] == "box 39, 39, 49, 49 is not in the image (16 x 16)"
        assert messages["seven"] == "its annotation cannot be read: No such file or directory"
        assert messages["eight"].startswith("its annotation eight.xml is broken: ")
        assert messages["nine"] == "SegmentationClass/nine.png has no numbers of objects (mode RGB)"

    @pytest.mark.parametrize(
        ("mapping", "message"),
        [
            ({}, "targets maps no class"),
            ({"dog": 10}, r"targets\['dog'\] must be a class of the model, 0 to 9; got 10"),
            ({"dog": "2"}, "must be a class of the model"),
            ({"horse": 3}, "no image has an object of horse; found: cat, dog, sofa"),
        ],
    )
    def test_targets_refused(self, tmp_path: Path, mapping: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_(voc(tmp_path), targets=mapping, class_names=ClassNames(10))


class TestOpening:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"layout": "coco"},
                "layout must be auto, flat, folders, tiny-imagenet, voc, webdataset, parquet; got 'coco'",
            ),
            ({"limit": 0}, "limit must be a positive integer, got 0"),
            ({"split": "val"}, "split is for archives and the layouts tiny-imagenet and voc; this one is flat"),
            ({"targets": {"a": 1}}, "targets is for the layouts voc; this one is flat"),
            ({"layout": "voc"}, "no folder 'JPEGImages'"),
        ],
    )
    def test_refused(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        picture(tmp_path / "a.png")
        with pytest.raises(InputError, match=message):
            open_(tmp_path, **options)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nowhere: no such folder"):
            open_(tmp_path / "nowhere")
        with pytest.raises(InputError, match="not a folder"):
            open_(picture(tmp_path / "a.png"))
        (tmp_path / "empty").mkdir()
        for layout in ("auto", "flat", "folders"):
            with pytest.raises(InputError, match="empty: no images in it, read as"):
                open_(tmp_path / "empty", layout, class_names=ClassNames(2))

    def test_a_limit_takes_of_every_class(self, tmp_path: Path) -> None:
        for name in "abc":
            for number in range(4):
                picture(tmp_path / name / f"{number}.png")
        data = open_(tmp_path, class_names=ClassNames(3), limit=6)
        assert list(targets(data)) == ["a/0", "a/2", "b/0", "b/2", "c/0", "c/2"]
        assert len(open_(tmp_path, class_names=ClassNames(3), limit=99)) == 12


class TestBatches:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Dataset:
        for number in range(11):
            picture(tmp_path / f"{number:02}.png", grey=10 * number)
        return open_(tmp_path)

    @pytest.mark.parametrize("workers", [None, 0, 1, 3])
    def test_in_order_and_complete(self, data: Dataset, workers: int | None) -> None:
        found = list(batches(data, 4, workers))
        assert [len(b.names) for b in found] == [4, 4, 3]
        assert [n for b in found for n in b.names] == [f"{n:02}" for n in range(11)]
        shades = torch.cat([b.images for b in found])[:, 0, 0, 0]
        torch.testing.assert_close((shades * 0.5 + 0.5) * 255, 10 * torch.arange(11.0), rtol=0, atol=1e-3)

    def test_few_images_wait(self, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[int] = []
        read = data._read
        monkeypatch.setattr(data, "_read", lambda index: started.append(index) or read(index))  # type: ignore[func-returns-value]
        stream = batches(data, 2, 1)
        next(stream)
        _settle(lambda: len(started) >= 4)
        stream.close()  # type: ignore[attr-defined]
        assert len(started) <= 5  # two taken, batch_size + workers ahead

    @pytest.mark.parametrize("workers", [0, 2])
    def test_unreadable_images_are_left_out(self, tmp_path: Path, data: Dataset, workers: int) -> None:
        (tmp_path / "03.png").write_bytes(b"")
        (tmp_path / "05.png").write_bytes(b"not a picture")
        (tmp_path / "07.png").unlink()
        found = list(batches(data, 4, workers))
        assert [len(b.names) for b in found] == [4, 4]
        assert [n for b in found for n in b.names] == ["00", "01", "02", "04", "06", "08", "09", "10"]
        assert [(Path(p.path).name, p.message) for p in data.problems] == [
            ("03.png", "the file is empty"),
            ("05.png", "not an image, or in a format that Pillow cannot read here"),
            ("07.png", "no such file"),
        ]
        assert len(data) == 11

    @pytest.mark.parametrize(
        ("size", "workers", "message"), [(0, 1, "batch_size"), (2.0, 1, "batch_size"), (2, -1, "workers")]
    )
    def test_refused_at_once(self, data: Dataset, size: Any, workers: int, message: str) -> None:
        with pytest.raises(InputError, match=message):
            batches(data, size, workers)


class TestReadAhead:
    def test_memory_is_bounded(self) -> None:
        started: list[int] = []
        stream = read_ahead(range(50), lambda i: started.append(i) or i, workers=2, window=5)  # type: ignore[func-returns-value]
        for taken in range(20):
            assert next(stream) == taken
            _settle(lambda expected=taken + 5: len(started) >= expected)  # type: ignore[misc]
            assert len(started) <= taken + 5
        stream.close()  # type: ignore[attr-defined]
        assert len(started) < 30

    def test_threads_work_together_and_end(self) -> None:
        meet = threading.Barrier(3, timeout=10)

        def read(number: int) -> int:
            meet.wait()  # passes only if three are read at a time
            return number

        assert list(read_ahead(range(9), read, workers=3, window=3)) == list(range(9))
        assert not [t for t in threading.enumerate() if t.name.startswith("ramp-fast-read")]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_errors_come_in_turn(self, workers: int) -> None:
        stream = read_ahead([2, 1, 0, 4], lambda n: 4 // n, workers, 4)
        assert [next(stream), next(stream)] == [2, 4]
        with pytest.raises(ZeroDivisionError):
            next(stream)


def _settle(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
