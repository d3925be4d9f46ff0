"""Which files to read and where each result goes: a stream, so that a folder may hold any number of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramp_fast._files import reason

__all__ = ["IMAGE_SUFFIXES", "ImageItem", "Problem", "find_images"]

IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "avif"),
        *("ppm", "pgm", "pbm", "pnm"),
    )
)
"""What is taken for an image inside a folder; a file named by the caller is read whatever its suffix."""

RESERVED = frozenset({"contact_sheet"})
"""Names at the top of the output folder that no image may take."""

SHEET = "contact_sheet.png"
"""No folder at the top of the output folder may have this name."""

RESULT_SUFFIXES = (".npz", ".png")
"""What is written for an image has these."""


@dataclass(frozen=True)
class ImageItem:
    """A file to attribute.

    Attributes
    ----------
    path : str
        The file.
    key : str
        Where its results go: a path relative to the output folder, without suffix.
    """

    path: str
    key: str


@dataclass(frozen=True)
class Problem:
    """A path that cannot be attributed, and why (one line)."""

    path: str
    message: str


def find_images(paths: Sequence[str | Path], out: str | Path | None = None) -> Iterator[ImageItem | Problem]:
    """Walk files and folders in a fixed order.

    A single folder is mirrored from its own top; several arguments keep their own last name, and where two
    share it, all are mirrored from the folder that holds them all. A result is named after its image without
    the suffix; images of one folder that differ only by suffix (or by case) keep it. Names starting with a
    dot are passed over, links are followed, loops of links are not, nor is a link within a linked folder to one
    that has been read.

    Only the names of one folder per level are held at a time, never an image.

    Parameters
    ----------
    paths : sequence of str or pathlib.Path
        Files and folders; a path given twice is walked once.
    out : str or pathlib.Path, optional
        The output folder. It is not entered, so that results are never taken for photographs, and a folder
        whose results would land inside itself is refused.

    Yields
    ------
    ImageItem or Problem
        What to attribute, or what is wrong with a path: missing, unreadable, a folder without images.
    """
    excluded = _identity(out) if out is not None else None
    arguments = [os.path.abspath(p) for p in paths]
    shown = dict(reversed([(a, os.fspath(p)) for a, p in zip(arguments, paths, strict=True)]))
    unique = list(dict.fromkeys(arguments))
    keys = _argument_keys(unique)
    for path in unique:
        if not shown[path]:
            yield Problem("''", "an empty name; '.' is the current folder")
        elif os.path.isdir(path):
            if out is not None and os.path.realpath(os.path.join(out, keys[path])) == os.path.realpath(path):
                yield Problem(shown[path], "the results would go into this folder itself; choose another --out")
                continue
            found = False
            for entry in _walk(shown[path], keys[path], excluded):
                found = True
                yield entry
            if not found:
                yield Problem(shown[path], "no images in this folder")
        elif os.path.exists(path):
            yield ImageItem(shown[path], keys[path])
        else:
            yield Problem(shown[path], "a broken link" if os.path.islink(path) else "no such file or folder")


def _argument_keys(paths: Sequence[str]) -> dict[str, str]:
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return {paths[0]: ""}
    names = [os.path.basename(p) or "root" for p in paths]
    if len({n.casefold() for n in names}) == len(names):
        base = None
    else:
        base = os.path.commonpath([os.path.dirname(p) for p in paths])
    keys: dict[str, str] = {}
    in_folder: dict[str, list[str]] = {}
    for path, name in zip(paths, names, strict=True):
        folder = "" if base is None else os.path.relpath(os.path.dirname(path), base)
        folder = "" if folder == "." else folder
        if os.path.isdir(path):
            keys[path] = os.path.join(folder, name)
        else:
            in_folder.setdefault(folder, []).append(path)
    for folder, files in in_folder.items():
        beside = [n for p, n in zip(paths, names, strict=True) if os.path.isdir(p)]
        stems = result_names([os.path.basename(f) for f in files], reserved=_taken(folder, beside))
        for file in files:
            keys[file] = os.path.join(folder, stems[os.path.basename(file)])
    tops = [key.split(os.sep)[0] for key in keys.values()]
    for path, key in keys.items():
        top, *below = key.split(os.sep)
        if below or os.path.isdir(path):
            keys[path] = os.path.join(_beside_sheet(top, tops), *below)
    return keys


def _beside_sheet(name: str, others: Iterable[str]) -> str:
    """The name of a folder at the top of the output folder: another one where it is the contact sheet's."""
    return _other_name(name, others) if name.casefold() == SHEET else name


def _other_name(name: str, taken: Iterable[str]) -> str:
    names = {n.casefold() for n in taken}
    while name.casefold() in names:
        name += "_"
    return name


def result_names(names: Iterable[str], reserved: frozenset[str] = frozenset()) -> dict[str, str]:
    """A distinct result name for each file name of one folder: its stem, or all of it where stems clash.

    Parameters
    ----------
    names : iterable of str
        Distinct file names.
    reserved : frozenset of str
        Stems that are taken.

    Returns
    -------
    dict of str to str
        Distinct also where the file system ignores case.
    """
    listed = list(names)
    stems = Counter(os.path.splitext(n)[0].casefold() for n in listed)
    closed = {r.casefold() for r in reserved}
    whole = {n.casefold() for n in listed} | closed
    result: dict[str, str] = {}
    for name in listed:
        stem = os.path.splitext(name)[0]
        alone = stems[stem.casefold()] == 1 and stem.casefold() not in whole
        result[name] = stem if alone else name
        if not alone and stem == name and name.casefold() in closed:  # no suffix that would tell it apart
            result[name] = _other_name(name, whole | set(stems))
    return result


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _taken(key: str, folders: Iterable[str]) -> frozenset[str]:
    """Stems that no image may take: results of this one would have the name of a folder of results, or of the sheet."""
    names = (os.path.splitext(folder) for folder in folders)
    beside = frozenset(stem for stem, suffix in names if suffix.lower() in RESULT_SUFFIXES)
    return beside if key else beside | RESERVED


@dataclass(frozen=True)
class _Folder:
    """A folder to walk. ``above`` are the folders that hold it, itself included; ``linked``: one of them is a link."""

    path: str
    key: str
    above: tuple[tuple[int, int], ...]
    linked: bool


def _walk(top: str, key: str, excluded: tuple[int, int] | None) -> Iterator[ImageItem | Problem]:
    # Folders that links led to: with every folder linked in every other there are more ways than anyone could walk.
    visited: set[tuple[int, int]] = set()
    waiting = [_Folder(top, key, (), False)]  # not by recursion: folders may be nested deeper than Python's stack
    while waiting:
        folder = waiting.pop()
        identity = _identity(folder.path)
        if identity is not None and (identity == excluded or identity in folder.above):
            continue
        is_link = folder.path != top and os.path.islink(folder.path)
        if is_link and identity is not None:
            if folder.linked and identity in visited:
                continue
            visited.add(identity)
        try:
            files, folders, problems = _entries(folder.path)
        except OSError as error:
            yield Problem(folder.path, reason(error))
            continue
        yield from problems
        names = result_names(files, reserved=_taken(folder.key, folders))
        for name in sorted(files):
            yield ImageItem(os.path.join(folder.path, name), os.path.join(folder.key, names[name]))
        above = folder.above if identity is None else (*folder.above, identity)
        for name in sorted(folders, reverse=True):
            path = os.path.join(folder.path, name)
            key = os.path.join(folder.key, name) if folder.key else _beside_sheet(name, folders)
            waiting.append(_Folder(path, key, above, folder.linked or is_link))


def _entries(folder: str) -> tuple[list[str], list[str], list[Problem]]:
    """Images and folders of a folder by name, and links that cannot be followed."""
    files: list[str] = []
    folders: list[str] = []
    problems: list[Problem] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself, or into a folder that may not be entered
                problems.append(Problem(entry.path, reason(error)))
                continue
            if is_folder:
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                files.append(entry.name)
    return files, folders, sorted(problems, key=lambda problem: problem.path)
