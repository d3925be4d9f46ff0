"""Pascal VOC: its lists, annotations and segmentations."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramp_fast._files import open_regular, reason
from ramp_fast.data.classes import ClassNames
from ramp_fast.data.files import Problem
from ramp_fast.data.folders import images_of, whole_file
from ramp_fast.data.images import ImageError, opened
from ramp_fast.data.labels import lines, some
from ramp_fast.data.records import Record
from ramp_fast.data.regions import inside_boxes
from ramp_fast.errors import InputError

__all__ = ["VOC_CLASSES", "check_targets", "voc_records"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Pascal VOC's, in the order of the numbers in its segmentations: the first is 1."""


@dataclass(frozen=True)
class _VocObject:
    name: str
    box: tuple[int, int, int, int]


def voc_records(
    root: str,
    split: str | None,
    targets: Mapping[str, int] | None,
    problems: list[Problem],
) -> list[Record]:
    """An example for every image of a list, or for every mapped class in it; see :func:`ramp_fast.data.open_data`."""
    for name in ("JPEGImages", "Annotations"):
        if not os.path.isdir(os.path.join(root, name)):
            raise InputError(f"{root}: no folder {name!r}, which Pascal VOC has")
    wanted = _voc_list(root, split)
    items = {os.path.splitext(os.path.basename(i.path))[0]: i for i in images_of(f"{root}/JPEGImages", problems)}
    records: list[Record] = []
    seen: set[str] = set()
    for stem in items if wanted is None else wanted:
        if stem not in items:
            problems.append(Problem(os.path.join(root, "JPEGImages", stem), "in the list, but there is no such image"))
            continue
        item = items[stem]
        if targets is None:
            records.append(Record(item.key, whole_file(item.path, root), None, _VocRegion(root, stem)))
            continue
        try:
            names = {o.name for o in _voc_annotation(root, stem)[1]}
        except ImageError as error:
            problems.append(Problem(item.path, str(error)))
            continue
        seen |= names
        records += [
            Record(f"{item.key}:{name}", whole_file(item.path, root), None, _VocRegion(root, stem, name), index)
            for name, index in targets.items()
            if name in names
        ]
    if targets is not None and not records:
        raise InputError(f"{root}: no image has an object of {some(list(targets))}; found: {some(sorted(seen), 20)}")
    return records


def check_targets(targets: Mapping[str, int], class_names: ClassNames | None) -> None:
    """Refuse a mapping to classes that the model has not."""
    if not targets:
        raise InputError("targets maps no class: pass {name: index of the model's class}, or None")
    for name, index in targets.items():
        whole = isinstance(index, int) and not isinstance(index, bool) and index >= 0
        if not whole or (class_names is not None and index >= class_names.count):
            bounds = "at least 0" if class_names is None else f"0 to {class_names.count - 1}"
            raise InputError(f"targets[{name!r}] must be a class of the model, {bounds}; got {index!r}")


def _voc_list(root: str, split: str | None) -> list[str] | None:
    """Names of images in a list of ``ImageSets``; None for all there are."""
    folder, name = os.path.split(split or "val")
    path = os.path.join(root, "ImageSets", folder or "Main", f"{name}.txt")
    if not os.path.isfile(path):
        if split is None:
            return None
        lists = sorted(p.stem for p in Path(path).parent.glob("*.txt") if "_" not in p.stem)
        raise InputError(f"{root}: no list {path}; there are: {some(lists, 10) or 'none'}")
    return [line.split()[0] for line in lines(path)]


def _voc_annotation(root: str, stem: str) -> tuple[tuple[int, int] | None, list[_VocObject]]:
    """The size (height, width) that the annotation says, and its objects in order."""
    path = os.path.join(root, "Annotations", f"{stem}.xml")
    try:
        with open_regular(path) as file:
            tree = ET.parse(file).getroot()
        size = tree.find("size")
        says = None if size is None else (int(size.findtext("height", "")), int(size.findtext("width", "")))
        objects = []
        for found in tree.findall("object"):
            # Pascal counts pixels from 1; some boxes have fractions.
            corners = [round(float(found.findtext(f"bndbox/{c}", ""))) - 1 for c in ("xmin", "ymin", "xmax", "ymax")]
            left, top, right, bottom = corners
            objects.append(_VocObject(found.findtext("name", "").strip(), (left, top, right, bottom)))
    except OSError as error:
        raise ImageError(f"its annotation cannot be read: {reason(error)}") from error
    except (ET.ParseError, ValueError, OverflowError, RecursionError, MemoryError, LookupError) as error:
        raise ImageError(f"its annotation {stem}.xml is broken: {error}") from error
    return says, objects


@dataclass(frozen=True)
class _VocRegion:
    """Where the objects of a class are, or all objects."""

    root: str
    stem: str
    name: str | None = None

    def __call__(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        says, objects = _voc_annotation(self.root, self.stem)
        if says is not None and says != size:
            raise ImageError(f"its annotation is for {says[1]} x {says[0]} pixels, it has {size[1]} x {size[0]}")
        wanted = [n for n, o in enumerate(objects) if self.name in (None, o.name)]
        if not wanted:
            raise ImageError("its annotation has no objects")
        classes = self._segmentation("SegmentationClass", size)
        if classes is not None and self.name in (None, *VOC_CLASSES):
            inside = (classes > 0) & (classes < 255)  # 255: the outlines, which belong to nobody
            return inside if self.name is None else classes == VOC_CLASSES.index(self.name) + 1
        instances = self._segmentation("SegmentationObject", size)
        if instances is not None:
            return np.isin(instances, [n + 1 for n in wanted])
        return inside_boxes([objects[n].box for n in wanted], size)

    def _segmentation(self, folder: str, size: tuple[int, int]) -> npt.NDArray[np.uint8] | None:
        path = os.path.join(self.root, folder, f"{self.stem}.png")
        if not os.path.isfile(path):
            return None
        try:
            with open_regular(path) as file, opened(file) as picture:
                mode = picture.mode
                numbers: npt.NDArray[Any] = np.asarray(picture)
        except Exception as error:  # as of photographs
            raise ImageError(f"{folder}/{self.stem}.png is broken: {reason(error)}") from error
        if mode not in ("P", "L"):
            raise ImageError(f"{folder}/{self.stem}.png has no numbers of objects (mode {mode})")
        if numbers.shape != size:
            raise ImageError(
                f"{folder}/{self.stem}.png has {numbers.shape[1]} x {numbers.shape[0]} pixels, the image {size[1]} x "
                f"{size[0]}"
            )
        return numbers
