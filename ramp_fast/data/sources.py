"""Opening a source of images: folders, ImageNet's own layouts, archives, tables. Names are read now, images later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ramp_fast._checks import positive
from ramp_fast._files import reason
from ramp_fast.data.archives import ARCHIVE_SUFFIXES, archive_records, is_archive
from ramp_fast.data.files import Problem
from ramp_fast.data.folders import class_folders, flat_folder, images_of, tiny_imagenet
from ramp_fast.data.labels import find_labels, read_labels, stem_of
from ramp_fast.data.records import Record, Source, distinct
from ramp_fast.data.voc import voc_records
from ramp_fast.errors import InputError

__all__ = ["LAYOUTS", "open_source"]

LAYOUTS = ("flat", "folders", "tiny-imagenet", "voc", "webdataset", "parquet")

_SPLIT_LAYOUTS = ("tiny-imagenet", "voc")


def open_source(
    path: str | Path,
    layout: str = "auto",
    *,
    split: str | None = None,
    targets: Mapping[str, int] | None = None,
    labels: str | Path | None = None,
    limit: int | None = None,
) -> Source:
    """Open a folder, an archive or a folder of archives.

    Parameters
    ----------
    path, layout, split, targets, limit
        As for :func:`ramp_fast.data.open_data`.
    labels : str or pathlib.Path, optional
        A file that says the class of every image, for images without: lines ``name class``, ``LOC_val_solution.csv``,
        or the development kit's ground truth with ``meta.mat`` beside it. By default such a file in or beside a folder
        or tar of ImageNet's validation images is taken.

    Returns
    -------
    Source

    Raises
    ------
    InputError
        It is not of this layout, or there is nothing in it.
    RampFastError
        A package that reads it is not installed.
    """
    root = os.fspath(path)
    if layout not in ("auto", *LAYOUTS):
        raise InputError(f"layout must be auto, {', '.join(LAYOUTS)}; got {layout!r}")
    if limit is not None:
        positive("open_data", "limit", limit)
    problems: list[Problem] = []
    archives = _archives(root, layout)
    kind = layout if archives else _detect(root) if layout == "auto" else layout
    for name, value, layouts in (("split", split, _SPLIT_LAYOUTS), ("targets", targets, ("voc",))):
        if value is not None and kind not in layouts and not (name == "split" and archives):
            where = f"{'archives and ' if name == 'split' else ''}the layouts {' and '.join(layouts)}"
            raise InputError(f"{root}: {name} is for {where}; this one is {kind}")
    groups: list[str] | None = None
    if archives:
        kind, records = archive_records(root, _of_split(root, archives, split), layout, problems)
    elif kind == "flat":
        records = flat_folder(root, problems)
    elif kind == "folders":
        records = class_folders(root, problems)
    elif kind == "tiny-imagenet":
        records, groups = tiny_imagenet(root, split or "val", problems)
    elif kind == "voc":
        records = voc_records(root, split, targets, problems)
    else:
        raise InputError(f"{root}: no archives of the layout {kind!r} in this folder ({', '.join(ARCHIVE_SUFFIXES)})")
    if not records:
        others = [problem for problem in problems if problem.path != str(root)]
        first = f" ({others[0].path}: {others[0].message})" if others else ""
        raise InputError(f"{root}: no images in it, read as {kind!r}{first}")
    if layout != "flat" or labels is not None:
        records = _labelled(root, kind, records, labels, problems)
    if groups is None:
        groups = sorted({record.group for record in records if record.group is not None})
    return Source(root, kind, _renamed(records), groups, problems).evenly(limit)


def _archives(root: str, layout: str) -> list[str]:
    """The archives that hold the images: the path itself, or those at the top of a folder without images there."""
    if not os.path.isdir(root):
        if not os.path.exists(root):
            raise InputError(f"{root}: no such folder or archive")
        if not is_archive(root):
            raise InputError(f"{root}: not a folder, and no archive ({', '.join(ARCHIVE_SUFFIXES)})")
        if layout in ("tiny-imagenet", "voc"):
            raise InputError(f"{root}: the layout {layout} is read from folders: unpack it first")
        return [root]
    if layout in ("tiny-imagenet", "voc"):
        return []
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise InputError(f"{root}: cannot be read: {reason(error)}") from error
    found = [n for n in names if n.lower().endswith(ARCHIVE_SUFFIXES) and not n.startswith(".")]
    if not found and layout in ("auto", "parquet") and os.path.isdir(os.path.join(root, "data")):
        # As data sets of Hugging Face are laid out.
        inner = sorted(os.listdir(os.path.join(root, "data")))
        found = [os.path.join("data", n) for n in inner if n.lower().endswith(".parquet")]
    if found and layout in ("auto", "flat", "folders") and next(images_of(root, []), None) is not None:
        return []  # images, with archives lying about
    return [os.path.join(root, n) for n in found]


def _of_split(root: str, archives: list[str], split: str | None) -> list[str]:
    """The archives whose names say that they are of a split, as ``validation-00003-of-00014.parquet``."""
    if split is None:
        starts = {stem_of(path).split("-")[0] for path in archives if "-of-" in stem_of(path)}
        if len(starts) > 1:
            raise InputError(f"{root}: archives of several splits: pass split, one of {', '.join(sorted(starts))}")
        return archives
    found = [path for path in archives if stem_of(path).split("-")[0] == split or f"-{split}-" in stem_of(path)]
    if not found:
        raise InputError(f"{root}: no archive whose name begins with {split!r}")
    return found


def _detect(root: str) -> str:
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
    depths = {os.sep in os.path.relpath(item.path, root) for item in images_of(root, [])}
    if len(depths) > 1:
        raise InputError(
            f'{root}: images at the top and in subfolders: pass layout="flat" to take all without labels, or move '
            "those at the top away if the subfolders are classes"
        )
    return "folders" if True in depths else "flat"


def _labelled(
    root: str, kind: str, records: list[Record], labels: str | Path | None, problems: list[Problem]
) -> list[Record]:
    """Records with the classes that a file says; as they are where there is none."""
    if labels is None:
        if kind != "flat":
            return records
        file = find_labels(root, [stem_of(record.name) for record in records])
        if file is None:
            return records
    else:
        file = os.fspath(labels)
    said = read_labels(file)
    found = []
    for record in records:
        group = said.get(stem_of(record.name))
        if group is None:
            problems.append(Problem(record.name, f"no class of it in {file}"))
        else:
            found.append(replace(record, group=group))
    if not found:
        raise InputError(f"{file}: has no class of any image in {root} ({records[0].name}, for one)")
    return found


def _renamed(records: list[Record]) -> list[Record]:
    """Records with distinct names."""
    if len({record.name for record in records}) == len(records):
        return records
    names = distinct((r.name, f"{stem_of(r.location.path)}/{r.name}") for r in records)
    return [replace(record, name=name) for record, name in zip(records, names, strict=True)]
