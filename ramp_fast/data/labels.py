"""Which of the model's classes a folder, a WordNet id or a number means, and files that say it for every image."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from ramp_fast._files import read_text, reason
from ramp_fast.data.classes import ClassNames
from ramp_fast.errors import InputError, RampFastError

__all__ = ["WORDNET", "class_indices", "find_labels", "lines", "read_labels", "some"]

WORDNET = re.compile(r"n\d{8}")

VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")
"""How the images of ImageNet's validation set are called."""

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"

LABEL_FILES = ("LOC_val_solution.csv", "val.txt", GROUND_TRUTH)
"""Looked for in and beside a folder of the validation set, in this order."""


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def lines(path: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises
    ------
    InputError
        It cannot be read.
    """
    try:
        return [line for line in read_text(path).split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def class_indices(root: str, groups: Sequence[str], class_names: ClassNames | None) -> dict[str, int]:
    """The model's class for every group (sorted), by the first way that applies.

    Raises
    ------
    InputError
        None does.
    """
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
        named = {group: by_name.get(_plain(group), []) for group in groups}
        if any(named.values()):
            _refuse(root, [f for f in groups if not named[f]], f"are not among the model's {count} class names")
            twice = [f for f in groups if len(named[f]) > 1]
            _refuse(root, twice, "are the name of several classes; name the folders by their numbers")
            return {group: found[0] for group, found in named.items()}
    if all(re.fullmatch(r"[0-9]+", group) for group in groups):
        _refuse(root, [f for f in groups if int(f) >= count], f"are beyond the model's classes, 0 to {count - 1}")
        return {group: int(group) for group in groups}
    if all(WORDNET.fullmatch(group) for group in groups):
        ids = _wordnet_ids(count)
        if ids:
            _refuse(root, [f for f in groups if f not in ids], f"are not among ImageNet's {count} WordNet ids")
            return {group: ids[group] for group in groups}
    if len(groups) == count:
        return {group: index for index, group in enumerate(groups)}
    raise InputError(
        f"{root}: {len(groups)} class folders ({some(groups)}) for a model with {count} classes; name them by class "
        "(class_names), by number or by WordNet id, or have one for every class, in sorted order"
    )


def _refuse(root: str, groups: Sequence[str], what: str) -> None:
    if groups:
        raise InputError(f"{root}: {len(groups)} class folders {what}: {some(groups)}")


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()


def _wordnet_ids(count: int) -> dict[str, int]:
    """Of the ImageNet variant with this many classes; none if there is no such."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    names = ImageNetInfo(subset).label_names() if subset is not None else []  # type: ignore[no-untyped-call]  # timm's
    return {name: index for index, name in enumerate(names)} if len(names) == count else {}


def find_labels(root: str, stems: Sequence[str]) -> str | None:
    """A file with the classes of ImageNet's validation images that lies where people keep it; None without one."""
    if not stems or not all(VALIDATION.fullmatch(stem) for stem in stems):
        return None
    folders = [root] if os.path.isdir(root) else []
    folders.append(os.path.dirname(os.path.abspath(root)))
    places = [os.path.join(folder, name) for folder in folders for name in LABEL_FILES]
    return next((place for place in places if os.path.isfile(place)), None)


def read_labels(path: str) -> dict[str, str]:
    """What a file says of the class of every image.

    Parameters
    ----------
    path : str
        * Lines ``name class`` or ``name,class``: a WordNet id, a number or a name (Caffe's ``val.txt``).
        * ``LOC_val_solution.csv`` as Kaggle has it.
        * The development kit's ``ILSVRC2012_validation_ground_truth.txt``, a number per image: ILSVRC's own numbers,
          which ``meta.mat`` of the kit, in the same folder, turns into WordNet ids (needs SciPy).

    Returns
    -------
    dict of str to str
        Image's name without folders and suffix -> WordNet id, number or name of its class.

    Raises
    ------
    InputError
        It is none of these.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file of labels")
    rows = lines(path)
    if not rows:
        raise InputError(f"{path}: no labels in this file")
    if all(re.fullmatch(r"[0-9]+", row.strip()) for row in rows):
        return _ground_truth(path, [int(row) for row in rows])
    if rows[0].replace(" ", "").startswith("ImageId,PredictionString"):
        rows = [" ".join(row.replace(",", " ", 1).split()[:2]) for row in rows[1:]]
    found = {}
    for row in rows:
        name, separator, group = row.strip().replace(",", " ", 1).partition(" ")
        if not separator or not group.strip():
            raise InputError(f"{path}: expected a name and a class in every line, got {row.strip()[:60]!r}")
        found[stem_of(name)] = group.strip()
    return found


def stem_of(name: str) -> str:
    """A name without folders and suffix."""
    return os.path.splitext(name.replace("\\", "/").rsplit("/", 1)[-1])[0]


def _ground_truth(path: str, numbers: Sequence[int]) -> dict[str, str]:
    ids = _ilsvrc_ids(os.path.join(os.path.dirname(path), "meta.mat"), path)
    unknown = sorted({number for number in numbers if number not in ids})
    if unknown:
        raise InputError(f"{path}: {unknown[0]} is none of the numbers in meta.mat")
    return {f"ILSVRC2012_val_{place:08d}": ids[number] for place, number in enumerate(numbers, 1)}


def _ilsvrc_ids(path: str, wanted_by: str) -> Mapping[int, str]:
    """ILSVRC's numbers of classes, which are in no order of names, and the WordNet ids."""
    if not os.path.isfile(path):
        raise InputError(
            f"{wanted_by}: a number per image, in ILSVRC's own numbering, which is not the models': put meta.mat of "
            "the development kit beside it, or give a file with lines 'name WordNet-id'"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise RampFastError("reading meta.mat needs SciPy: pip install 'ramp_fast[store]'") from error
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # of a damaged file, almost anything
        raise InputError(f"{path}: not the development kit's meta.mat ({reason(error)})") from error
