"""Labelled photographs for evaluation, as the model wants them, with masks of the objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ramp_fast._checks import is_whole, positive
from ramp_fast._files import reason
from ramp_fast.data.classes import ClassNames
from ramp_fast.data.files import Problem
from ramp_fast.data.images import ImageError, OwnPictureError, read_picture
from ramp_fast.data.preprocessing import Preprocessing
from ramp_fast.data.reading import read_ahead, usual_workers
from ramp_fast.data.records import Source
from ramp_fast.data.sources import open_source
from ramp_fast.data.voc import check_targets
from ramp_fast.errors import InputError

__all__ = ["Batch", "Dataset", "Example", "batches", "open_data"]


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


class Dataset:
    """Images of one source, read when they are asked for; made by :func:`open_data`.

    Attributes
    ----------
    source : Source
        What is read.
    layout : str
        One of :data:`LAYOUTS`.
    labelled : bool
        Whether images have classes.
    has_masks : bool
        Whether images have masks.
    problems : list of Problem
        Files that could not be read or used, so far: first those found in opening, then those met in reading.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing, class_names: ClassNames | None = None) -> None:
        self.source = source
        self.layout = source.layout
        self._labels, self._preprocessing = source.labels(class_names), preprocessing
        self.labelled = self._labels is not None
        self.has_masks = bool(source.records) and source.records[0].region is not None
        self.problems = list(source.problems)

    def __len__(self) -> int:
        """Images, those included that turn out to be unreadable."""
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """Read an image.

        Raises
        ------
        ImageError
            The file, or its annotation, cannot be read.
        IndexError
            There is no such image.
        """
        record = self.source.records[index]
        try:
            file = self.source.locate(index).open()
        except OSError as error:
            raise ImageError("no such file" if isinstance(error, FileNotFoundError) else reason(error)) from error
        with file:
            picture = read_picture(file)
        mask = None
        if record.region is not None:
            mask = self._preprocessing.mask(record.region((picture.height, picture.width)))
        label = None if self._labels is None else self._labels[index]
        return Example(self._preprocessing(picture), label, mask, record.name)

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
            return Problem(self.source.shown(index), str(error))


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
        torch.tensor(targets, device="cpu") if targets else None,
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
    labels: str | Path | None = None,
    limit: int | None = None,
) -> Dataset:
    """Open a folder or archive of photographs; names are read now, images later.

    Pictures that this package made are passed over.

    Parameters
    ----------
    path : str or pathlib.Path
        A folder; a ``.tar`` (also one of tars, as ImageNet's), ``.zip`` or ``.parquet``, or a folder of these. Archives
        are unpacked nowhere.
    layout : {"auto", "flat", "folders", "tiny-imagenet", "voc", "webdataset", "parquet"}
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

        * "webdataset": tars in which files of one name up to the first dot are a sample; ``.cls`` says the class.
        * "parquet": tables in the layout of Hugging Face's data sets, ``image`` with bytes, ``label`` with a number.

        Within tar and zip archives "folders" means the folder that an image lies in, or the tar within the tar.
        "auto" tells the others by their files; images at the top mean "flat", subfolders "folders". ImageNet's
        validation images, which lie in one folder, have the classes of ``LOC_val_solution.csv``, ``val.txt`` or
        ``ILSVRC2012_validation_ground_truth.txt`` (with ``meta.mat``), in the folder or beside it, or of ``labels``.
    preprocessing : Preprocessing
        The model's; masks go through the same resizing and cropping.
    class_names : ClassNames, optional
        The model's; needed for labels of "folders" and "tiny-imagenet".
    split : str, optional
        Of archives whose names begin with it, as ``validation-00000-of-00014.parquet``; of "tiny-imagenet": "val"
        (default) or "train"; of "voc": a list in ``ImageSets/Main``, or in another folder of
        ``ImageSets`` as "Segmentation/val" ("val" by default, all images where that is missing).
    targets : mapping of str to int, optional
        For "voc": its classes that are classes of the model, as ``{"dog": 207}``.
    labels : str or pathlib.Path, optional
        A file with the class of every image, where the layout has none.
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
    if targets is not None:
        check_targets(targets, class_names)
    source = open_source(path, layout, split=split, targets=targets, labels=labels, limit=limit)
    return Dataset(source, preprocessing, class_names)
