"""Images in folders: flat, a folder for each class, Tiny ImageNet."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ramp_fast.data.files import ImageItem, Problem, find_images
from ramp_fast.data.labels import lines, some
from ramp_fast.data.locations import WholeFile
from ramp_fast.data.records import Record
from ramp_fast.data.regions import BoxRegion
from ramp_fast.errors import InputError
from ramp_fast.results.marks import SHEET_PREFIX, is_own

__all__ = ["class_folders", "flat_folder", "images_of", "tiny_imagenet", "whole_file"]


def images_of(root: str, problems: list[Problem]) -> Iterator[ImageItem]:
    """The photographs in a folder; pictures that this package made are passed over."""
    for entry in find_images([root]):
        if isinstance(entry, Problem):
            problems.append(entry)
        elif not _made_here(entry.path):
            yield entry


def _made_here(path: str) -> bool:
    """Whether it is a picture by this package: results may lie among the photographs."""
    name = os.path.basename(path)
    if not name.endswith(".png") and not (name.startswith(SHEET_PREFIX) and name.endswith(".jpg")):
        return False  # without opening it: there may be a million
    try:
        return is_own(path)
    except OSError:
        return False  # for the reading to complain about


def whole_file(path: str, root: str) -> WholeFile:
    """Where an image lies that is a file below ``root``."""
    try:
        status = os.stat(path)
        length, modified = status.st_size, status.st_mtime_ns
    except OSError:
        length = modified = -1  # for the reading to complain about
    return WholeFile(_below(path, root), length, modified)


def _below(path: str, root: str) -> str:
    """The path from the root on."""
    # The walk joins names to the root as it was given; relpath takes ten times longer.
    start = os.path.join(root, "")
    return path[len(start) :] if path.startswith(start) else os.path.relpath(path, root)


def flat_folder(root: str, problems: list[Problem]) -> list[Record]:
    """Every image, also in subfolders, without classes."""
    return [Record(item.key, whole_file(item.path, root)) for item in images_of(root, problems)]


def class_folders(root: str, problems: list[Problem]) -> list[Record]:
    """Images whose class is the subfolder of the root that they lie in."""
    items = list(images_of(root, problems))
    tops = [_below(item.path, root).split(os.sep) for item in items]
    loose = [parts[0] for parts in tops if len(parts) == 1]
    if loose:
        raise InputError(
            f"{root}: {len(loose)} images lie at the top, in no class's folder ({some(loose)}); move them away, or "
            'pass layout="flat" to take all without labels'
        )
    return [Record(item.key, whole_file(item.path, root), parts[0]) for item, parts in zip(items, tops, strict=True)]


def tiny_imagenet(root: str, split: str, problems: list[Problem]) -> tuple[list[Record], list[str]]:
    """Its images with their boxes, and all WordNet ids of its classes."""
    if split not in ("val", "train"):
        raise InputError(f"{root}: split must be val or train, got {split!r}")
    ids = sorted({line.strip() for line in lines(os.path.join(root, "wnids.txt"))})
    if not os.path.isdir(os.path.join(root, split)):
        raise InputError(f"{root}: no folder {split!r}, which Tiny ImageNet has")
    classes = set(ids)
    # file name -> WordNet id and box
    known: dict[str, tuple[str, tuple[int, int, int, int]]] = {}
    if split == "val":
        table = os.path.join(root, "val", "val_annotations.txt")
        for line in lines(table):
            (name, wordnet), box = _fields(table, line, 2)
            known[name] = wordnet, box
    else:
        for wordnet in ids:
            table = os.path.join(root, "train", wordnet, f"{wordnet}_boxes.txt")
            for line in lines(table) if os.path.isdir(os.path.dirname(table)) else []:
                (name,), box = _fields(table, line, 1)
                known[name] = wordnet, box
    records = []
    for item in images_of(os.path.join(root, split), problems):
        found = known.get(os.path.basename(item.path))
        if found is None:
            problems.append(Problem(item.path, "no annotation of this image"))
        elif found[0] not in classes:
            problems.append(Problem(item.path, f"its class {found[0]} is not in wnids.txt"))
        else:
            records.append(Record(item.key, whole_file(item.path, root), found[0], BoxRegion((found[1],))))
    return records, ids


def _fields(table: str, line: str, words: int) -> tuple[list[str], tuple[int, int, int, int]]:
    """So many words and a box."""
    fields = line.split()
    try:
        left, top, right, bottom = (int(n) for n in fields[words:])
    except ValueError as error:
        raise InputError(f"{table}: expected {words} words and a box of four numbers, got {line!r}") from error
    return fields[:words], (left, top, right, bottom)
