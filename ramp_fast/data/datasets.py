"""Labelled photographs for evaluation: folders, Tiny ImageNet and Pascal VOC, with masks of the objects."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ramp_fast._checks import is_whole, positive
from ramp_fast._files import open_regular, read_text, reason
from ramp_fast.data.boxes import boxes_to_masks
from ramp_fast.data.classes import ClassNames
from ramp_fast.data.files import ImageItem, Problem, find_images
from ramp_fast.data.images import ImageError, OwnPictureError, opened, read_image
from ramp_fast.data.preprocessing import Preprocessing
from ramp_fast.data.reading import read_ahead, usual_workers
from ramp_fast.errors import InputError
from ramp_fast.results.marks import is_own

__all__ = ["LAYOUTS", "VOC_CLASSES", "Batch", "Dataset", "Example", "batches", "open_data"]

LAYOUTS = ("flat", "folders", "tiny-imagenet", "voc")

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Pascal VOC's, in the order of the numbers in its segmentations: the first is 1."""

_WORDNET = re.compile(r"n\d{8}")

# The size (height, width) of a photograph -> where its object is, bool [height, width]
_Region = Callable[[tuple[int, int]], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Batch:
    """Images as the model wants them.

    Attributes
    ----------
    images : Tensor [N, C, H, W]
        float32, on the CPU.
    target : Tensor [N] or None
        Classes; None where the data have no labels.
    masks : bool Tensor [N, 1, H, W] or None
        Where the object is, in the geometry of ``images``; None where the data have no boxes or masks.
    names : list of str
        One per image, distinct within the data: its path from the top, without suffix.
    """

    images: Tensor
    target: Tensor | None
    masks: Tensor | None
    names: list[str]


@dataclass(frozen=True)
class Example:
    """One image of a :class:`Dataset`.

    Attributes
    ----------
    image : Tensor [C, H, W]
    target : int or None
    mask : bool Tensor [1, H, W] or None
    name : str
        As in :class:`Batch`.
    """

    image: Tensor
    target: int | None
    mask: Tensor | None
    name: str


@dataclass(frozen=True)
class _Record:
    """What is known of an image before it is read."""

    path: str
    name: str
    target: int | None = None
    region: _Region | None = None


class Dataset:
    """Images of one folder, read when they are asked for; made by :func:`open_data`.

    Attributes
    ----------
    layout : str
        One of :data:`LAYOUTS`.
    labelled : bool
        Whether images have classes.
    has_masks : bool
        Whether images have masks.
    problems : list of Problem
        Files that could not be read or used, so far: first those found in opening, then those met in reading.
    """

    def __init__(
        self,
        layout: str,
        records: Sequence[_Record],
        preprocessing: Preprocessing,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.layout = layout
        self.labelled = bool(records) and records[0].target is not None
        self.has_masks = bool(records) and records[0].region is not None
        self.problems = list(problems)
        self._records, self._preprocessing = records, preprocessing

    def __len__(self) -> int:
        """Images, those included that turn out to be unreadable."""
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        """Read an image.

        Raises
        ------
        ImageError
            The file, or its annotation, cannot be read.
        IndexError
            There is no such image.
        """
        record = self._records[index]
        picture = read_image(record.path)
        mask = None
        if record.region is not None:
            mask = self._preprocessing.mask(record.region((picture.height, picture.width)))
        return Example(self._preprocessing(picture), record.target, mask, record.name)

    def __iter__(self) -> Iterator[Example]:
        """Every image that can be read, in order, one at a time; the others go to ``problems``."""
        return self.examples(workers=0, window=1)

    def examples(self, workers: int, window: int) -> Iterator[Example]:
        """As iterating, with ``workers`` threads that read ahead; at most ``window`` images are held."""
        for found in read_ahead(range(len(self)), self._read, workers, window):
            if isinstance(found, Example):
                yield found
            elif found is not None and found not in self.problems:  # met before, in another pass
                self.problems.append(found)

    def _read(self, index: int) -> Example | Problem | None:
        try:
            return self[index]
        except OwnPictureError:  # under a name by which it was not known in opening
            return None
        except ImageError as error:
            return Problem(self._records[index].path, str(error))


def batches(dataset: Dataset, batch_size: int = 8, workers: int | None = None) -> Iterator[Batch]:
    """Batches of a dataset, in order, read ahead in threads.

    Files that cannot be read are left out and recorded in ``dataset.problems``; the images behind them move up, so
    that all batches but the last have ``batch_size`` images.

    Parameters
    ----------
    dataset : Dataset
        From :func:`open_data`.
    batch_size : int
        Images of a batch.
    workers : int, optional
        Threads that read; 0 reads in the caller's. At most ``batch_size + workers`` images wait decoded.

    Raises
    ------
    InputError
        A number is out of range.
    """
    threads = usual_workers() if workers is None else workers
    positive("batches", "batch_size", batch_size)
    if not is_whole(threads, 0):
        raise InputError(f"workers must be a number of threads, 0 or more, got {workers!r}")
    return _batches(dataset, batch_size, threads)


def _batches(dataset: Dataset, batch_size: int, workers: int) -> Iterator[Batch]:
    held: list[Example] = []
    for example in dataset.examples(workers, workers + batch_size):
        held.append(example)
        if len(held) == batch_size:
            yield _stacked(held)
            held = []
    if held:
        yield _stacked(held)


def _stacked(examples: list[Example]) -> Batch:
    targets = [e.target for e in examples if e.target is not None]
    masks = [e.mask for e in examples if e.mask is not None]
    return Batch(
        torch.stack([e.image for e in examples]),
        torch.tensor(targets) if targets else None,
        torch.stack(masks) if masks else None,
        [e.name for e in examples],
    )


def open_data(
    path: str | Path,
    layout: str = "auto",
    *,
    preprocessing: Preprocessing,
    class_names: ClassNames | None = None,
    split: str | None = None,
    targets: Mapping[str, int] | None = None,
    limit: int | None = None,
) -> Dataset:
    """Open a folder of photographs; names are read now, images later.

    Pictures that this package made are passed over.

    Parameters
    ----------
    path : str or pathlib.Path
        The folder.
    layout : {"auto", "flat", "folders", "tiny-imagenet", "voc"}
        How it is laid out.

        * "flat": images, also in subfolders, without labels.
        * "folders": a subfolder for each class. Its name is, in this order of precedence, the name of a class in
          ``class_names``; the number of a class; a WordNet id, if the model's number of classes is that of an ImageNet
          variant; or anything, if there are as many subfolders as classes: then they are taken in sorted order, as
          torchvision's ImageFolder does.
        * "tiny-imagenet": ``wnids.txt``, ``train/<id>/images``, ``val/images`` with ``val_annotations.txt``. Classes
          are told by WordNet ids as in "folders", all ids of ``wnids.txt`` in sorted order being the last resort.
          The mask is the box.
        * "voc": ``JPEGImages``, ``Annotations``, ``ImageSets``. Without ``targets`` an image has no label (metrics
          take the predicted class) and the mask is that of all its objects. With them there is an example for every
          mapped class in an image, named ``image:class``, and the mask is that of the objects of this class. It is
          taken from ``SegmentationClass``, else from ``SegmentationObject``, where the image has such a file, and from
          boxes elsewhere; ``split="Segmentation/val"`` keeps to images that have one. Difficult objects count.

        "auto" tells the last two by their files; images at the top mean "flat", subfolders "folders".
    preprocessing : Preprocessing
        The model's; masks go through the same resizing and cropping.
    class_names : ClassNames, optional
        The model's; needed for labels of "folders" and "tiny-imagenet".
    split : str, optional
        Of "tiny-imagenet": "val" (default) or "train"; of "voc": a list in ``ImageSets/Main``, or in another folder of
        ``ImageSets`` as "Segmentation/val" ("val" by default, all images where that is missing).
    targets : mapping of str to int, optional
        For "voc": its classes that are classes of the model, as ``{"dog": 207}``.
    limit : int, optional
        Take this many images, evenly spaced, so that of folders sorted by class all classes are there.

    Returns
    -------
    Dataset
        With a length; iterating reads images. Paths without images and the like are in its ``problems``.

    Raises
    ------
    InputError
        The folder is not of this layout, names of classes are unknown, or there is nothing in it.

    Examples
    --------
    >>> loaded = load_model("resnet50")
    >>> data = open_data("imagenet/val", preprocessing=loaded.preprocessing, class_names=loaded.class_names)
    >>> for batch in batches(data, 16):
    ...     metric.update(batch.images, batch.target, method, masks=batch.masks)
    """
    root = os.fspath(path)
    if layout not in ("auto", *LAYOUTS):
        raise InputError(f"layout must be auto, {', '.join(LAYOUTS)}; got {layout!r}")
    if limit is not None:
        positive("open_data", "limit", limit)
    if not os.path.isdir(root):
        raise InputError(f"{root}: {'not a folder' if os.path.exists(root) else 'no such folder'}")
    kind = _detect_layout(root) if layout == "auto" else layout
    for name, value, layouts in (("split", split, ("tiny-imagenet", "voc")), ("targets", targets, ("voc",))):
        if value is not None and kind not in layouts:
            raise InputError(f"{root}: {name} is for the layouts {' and '.join(layouts)}; this one is {kind}")
    problems: list[Problem] = []
    if kind == "flat":
        records = [_Record(item.path, item.key) for item in _images(root, problems)]
    elif kind == "folders":
        records = _folders(root, class_names, problems)
    elif kind == "tiny-imagenet":
        records = _tiny_imagenet(root, split or "val", class_names, problems)
    else:
        records = _voc(root, split, targets, class_names, problems)
    if not records:
        first = f" ({problems[0].path}: {problems[0].message})" if problems else ""
        raise InputError(f"{root}: no images in this folder, read as {kind!r}{first}")
    if limit is not None and limit < len(records):
        records = [records[i * len(records) // limit] for i in range(limit)]
    return Dataset(kind, records, preprocessing, problems)


def _detect_layout(root: str) -> str:
    if os.path.isdir(os.path.join(root, "JPEGImages")):
        return "voc"
    if os.path.isfile(os.path.join(root, "wnids.txt")):
        return "tiny-imagenet"
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise InputError(f"{root}: cannot be read: {reason(error)}") from error
    nested = [name for name in names if os.path.isdir(os.path.join(root, name, "JPEGImages"))]
    if nested:
        raise InputError(f"{root}: holds Pascal VOC one level down; open {os.path.join(root, nested[-1])}")
    depths = {os.sep in os.path.relpath(item.path, root) for item in _images(root, [])}
    if len(depths) > 1:
        raise InputError(
            f'{root}: images at the top and in subfolders: pass layout="flat" to take all without labels, or move '
            "those at the top away if the subfolders are classes"
        )
    return "folders" if True in depths else "flat"


def _images(root: str, problems: list[Problem]) -> Iterator[ImageItem]:
    for entry in find_images([root]):
        if isinstance(entry, Problem):
            problems.append(entry)
        elif not _made_here(entry.path):
            yield entry


def _made_here(path: str) -> bool:
    """Whether it is a picture by this package: results may lie among the photographs."""
    if os.path.splitext(path)[1] != ".png":
        return False
    try:
        return is_own(path)
    except OSError:
        return False  # for the reading to complain about


def _folders(root: str, class_names: ClassNames | None, problems: list[Problem]) -> list[_Record]:
    items = list(_images(root, problems))
    tops = [os.path.relpath(item.path, root).split(os.sep) for item in items]
    loose = [parts[0] for parts in tops if len(parts) == 1]
    if loose:
        raise InputError(
            f"{root}: {len(loose)} images lie at the top, in no class's folder ({_some(loose)}); move them away, or "
            'pass layout="flat" to take all without labels'
        )
    if not items:
        return []
    classes = _class_indices(root, sorted({parts[0] for parts in tops}), class_names)
    return [_Record(item.path, item.key, classes[parts[0]]) for item, parts in zip(items, tops, strict=True)]


def _class_indices(root: str, folders: Sequence[str], class_names: ClassNames | None) -> dict[str, int]:
    """The model's class for the name of every folder (sorted), by the first way that applies."""
    if class_names is None:
        raise InputError(
            f"{root}: labels need class_names, the model's (load_model(...).class_names, or ClassNames(count)); "
            'layout="flat" goes without labels'
        )
    count = class_names.count
    if class_names.known:
        by_name: dict[str, list[int]] = {}
        for index, name in enumerate(class_names.all()):
            by_name.setdefault(_plain(name), []).append(index)
        named = {folder: by_name.get(_plain(folder), []) for folder in folders}
        if any(named.values()):
            _refuse(root, [f for f in folders if not named[f]], f"are not among the model's {count} class names")
            twice = [f for f in folders if len(named[f]) > 1]
            _refuse(root, twice, "are the name of several classes; name the folders by their numbers")
            return {folder: found[0] for folder, found in named.items()}
    if all(re.fullmatch(r"[0-9]+", folder) for folder in folders):
        _refuse(root, [f for f in folders if int(f) >= count], f"are beyond the model's classes, 0 to {count - 1}")
        return {folder: int(folder) for folder in folders}
    if all(_WORDNET.fullmatch(folder) for folder in folders):
        ids = _wordnet_ids(count)
        if ids:
            _refuse(root, [f for f in folders if f not in ids], f"are not among ImageNet's {count} WordNet ids")
            return {folder: ids[folder] for folder in folders}
    if len(folders) == count:
        return {folder: index for index, folder in enumerate(folders)}
    raise InputError(
        f"{root}: {len(folders)} class folders ({_some(folders)}) for a model with {count} classes; name them by class "
        "(class_names), by number or by WordNet id, or have one for every class, in sorted order"
    )


def _refuse(root: str, folders: Sequence[str], what: str) -> None:
    if folders:
        raise InputError(f"{root}: {len(folders)} class folders {what}: {_some(folders)}")


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()


def _wordnet_ids(count: int) -> dict[str, int]:
    """Of the ImageNet variant with this many classes; none if there is no such."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    names = ImageNetInfo(subset).label_names() if subset is not None else []  # type: ignore[no-untyped-call]  # timm's
    return {name: index for index, name in enumerate(names)} if len(names) == count else {}


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _lines(path: str) -> list[str]:
    try:
        return [line for line in read_text(path).split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def _boxes(boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Boxes (left, top, right, bottom), pixels counted from 0, the last ones included."""
    for left, top, right, bottom in boxes:
        if left > right or top > bottom or right < 0 or bottom < 0 or left >= size[1] or top >= size[0]:
            raise ImageError(f"box {left}, {top}, {right}, {bottom} is not in the image ({size[1]} x {size[0]})")
    edges = torch.tensor(boxes, dtype=torch.float64) + torch.tensor([0, 0, 1, 1])
    mask: npt.NDArray[np.bool_] = boxes_to_masks(edges.unsqueeze(0), *size)[0, 0].numpy()
    return mask


def _tiny_imagenet(root: str, split: str, class_names: ClassNames | None, problems: list[Problem]) -> list[_Record]:
    if split not in ("val", "train"):
        raise InputError(f"{root}: split must be val or train, got {split!r}")
    ids = sorted({line.strip() for line in _lines(os.path.join(root, "wnids.txt"))})
    if not os.path.isdir(os.path.join(root, split)):
        raise InputError(f"{root}: no folder {split!r}, which Tiny ImageNet has")
    classes = _class_indices(root, ids, class_names)
    # file name -> WordNet id and box
    known: dict[str, tuple[str, tuple[int, int, int, int]]] = {}
    if split == "val":
        table = os.path.join(root, "val", "val_annotations.txt")
        for line in _lines(table):
            (name, wordnet), box = _fields(table, line, 2)
            known[name] = wordnet, box
    else:
        for wordnet in ids:
            table = os.path.join(root, "train", wordnet, f"{wordnet}_boxes.txt")
            for line in _lines(table) if os.path.isdir(os.path.dirname(table)) else []:
                (name,), box = _fields(table, line, 1)
                known[name] = wordnet, box
    records = []
    for item in _images(os.path.join(root, split), problems):
        found = known.get(os.path.basename(item.path))
        if found is None:
            problems.append(Problem(item.path, "no annotation of this image"))
        elif found[0] not in classes:
            problems.append(Problem(item.path, f"its class {found[0]} is not in wnids.txt"))
        else:
            records.append(_Record(item.path, item.key, classes[found[0]], _Boxes((found[1],))))
    return records


def _fields(table: str, line: str, words: int) -> tuple[list[str], tuple[int, int, int, int]]:
    """So many words and a box."""
    fields = line.split()
    try:
        left, top, right, bottom = (int(n) for n in fields[words:])
    except ValueError as error:
        raise InputError(f"{table}: expected {words} words and a box of four numbers, got {line!r}") from error
    return fields[:words], (left, top, right, bottom)


@dataclass(frozen=True)
class _Boxes:
    boxes: tuple[tuple[int, int, int, int], ...]

    def __call__(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        return _boxes(self.boxes, size)


@dataclass(frozen=True)
class _VocObject:
    name: str
    box: tuple[int, int, int, int]


def _voc(
    root: str,
    split: str | None,
    targets: Mapping[str, int] | None,
    class_names: ClassNames | None,
    problems: list[Problem],
) -> list[_Record]:
    for name in ("JPEGImages", "Annotations"):
        if not os.path.isdir(os.path.join(root, name)):
            raise InputError(f"{root}: no folder {name!r}, which Pascal VOC has")
    if targets is not None:
        _check_targets(targets, class_names)
    wanted = _voc_list(root, split)
    items = {os.path.splitext(os.path.basename(i.path))[0]: i for i in _images(f"{root}/JPEGImages", problems)}
    records: list[_Record] = []
    seen: set[str] = set()
    for stem in items if wanted is None else wanted:
        if stem not in items:
            problems.append(Problem(os.path.join(root, "JPEGImages", stem), "in the list, but there is no such image"))
            continue
        item = items[stem]
        if targets is None:
            records.append(_Record(item.path, item.key, None, _VocRegion(root, stem)))
            continue
        try:
            names = {o.name for o in _voc_annotation(root, stem)[1]}
        except ImageError as error:
            problems.append(Problem(item.path, str(error)))
            continue
        seen |= names
        records += [
            _Record(item.path, f"{item.key}:{name}", index, _VocRegion(root, stem, name))
            for name, index in targets.items()
            if name in names
        ]
    if targets is not None and not records:
        raise InputError(f"{root}: no image has an object of {_some(list(targets))}; found: {_some(sorted(seen), 20)}")
    return records


def _check_targets(targets: Mapping[str, int], class_names: ClassNames | None) -> None:
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
        raise InputError(f"{root}: no list {path}; there are: {_some(lists, 10) or 'none'}")
    return [line.split()[0] for line in _lines(path)]


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
        return _boxes([objects[n].box for n in wanted], size)

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
