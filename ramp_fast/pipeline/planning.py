"""What a store is going to hold, and whether a later run means the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ramp_fast.data.locations import WholeFile
from ramp_fast.data.records import Source
from ramp_fast.data.sources import open_source
from ramp_fast.errors import InputError
from ramp_fast.results.map_writer import images_digest
from ramp_fast.results.maps import ImageLine, Plan
from ramp_fast.results.store import StoreError

# A run that finds nothing to do should not wait for torch and timm.
if TYPE_CHECKING:
    import torch

    from ramp_fast.models import LoadedModel
    from ramp_fast.pipeline.targets import Targets

__all__ = [
    "check_request",
    "check_settings",
    "check_source",
    "differences",
    "image_lines",
    "make_plan",
    "source_of",
    "weights_digest",
]

PATHS = "paths"
"""The entry of a request that says where things lay, and decides nothing."""


def source_of(request: Mapping[str, Any], path: str) -> Source:
    """The source of a request, at a path that may be another one than it was asked for with."""
    options = {name: request[name] for name in ("layout", "split", "limit")}
    return open_source(path, labels=request[PATHS]["labels"], targets=request["class_of"], **options)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's state dict: names, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def image_lines(source: Source, labels: Sequence[int] | None) -> list[ImageLine]:
    """What a plan knows of the images of a source."""
    return [
        ImageLine(record.name, None if labels is None else labels[number], record.location.size, modified)
        for number, (record, modified) in enumerate(zip(source.records, _modified(source), strict=True))
    ]


def _modified(source: Source) -> Iterator[int]:
    """When the file that holds an image was modified, in nanoseconds, of every image."""
    of_archives: dict[str, int] = {}
    for record in source.records:
        where = record.location
        if isinstance(where, WholeFile):
            yield where.modified
            continue
        if where.path not in of_archives:
            of_archives[where.path] = os.stat(where.below(source.root).path).st_mtime_ns
        yield of_archives[where.path]


def make_plan(
    request: Mapping[str, Any],
    settings: Mapping[str, Any],
    loaded: LoadedModel,
    source: Source,
    labels: Sequence[int] | None,
    targets: Targets,
    *,
    dtype: str,
    channels: bool,
    shard_size: int,
) -> tuple[Plan, list[ImageLine]]:
    """A plan and its images.

    Parameters
    ----------
    request : mapping
        What was asked for; what its entry "paths" says is not compared later.
    settings : mapping
        What that came to.
    loaded : LoadedModel
    source : Source
    labels : sequence of int, optional
        The model's class of every image, as the source says it.
    targets : Targets
    dtype, channels, shard_size
        As in :class:`ramp_fast.results.maps.Plan`.

    Raises
    ------
    InputError
        Targets need labels, and the source has none.
    """
    if targets.needs_labels() and labels is None:
        raise InputError(f"{source.root}: --targets label, but nothing here says the classes of images; --labels FILE")
    _, height, width = loaded.preprocessing.input_size
    several = (len(targets.names),) if len(targets.names) > 1 else ()
    shape = (*several, *((3,) if channels else ()), height, width)
    images = image_lines(source, labels)
    about = {
        "layout": source.layout,
        "digest": source.digest(),
        "labelled": labels is not None,
        "problems": [[problem.path, problem.message] for problem in source.problems],
    }
    plan = Plan(
        _plain(request),
        _plain(settings),
        about,
        len(source),
        shard_size,
        loaded.class_names.all(),
        shape,
        dtype,
        targets.names,
        channels,
        images_digest(images),
    )
    return plan, images


def check_request(plan: Plan, request: Mapping[str, Any], folder: str) -> None:
    """Refuse a run that asks for something else than the plan of a store.

    Raises
    ------
    StoreError
        It says what differs.
    """
    _refuse(differences(plan.request, request), folder)


def check_settings(plan: Plan, settings: Mapping[str, Any], folder: str) -> None:
    """Refuse a run whose model is another one than that of the plan, by its weights or preprocessing.

    Raises
    ------
    StoreError
        It says what differs.
    """
    _refuse(differences(plan.settings, settings), folder)


def _refuse(found: Sequence[str], folder: str) -> None:
    if found:
        raise StoreError(f"{folder} holds maps of another run: {'; '.join(found)}; choose another --out")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In which entries what a plan says and what is asked for are not the same, in words; where things lie is none."""
    here = _plain(here)
    found: list[str] = []
    for name in sorted({*there, *here}):
        before, now = there.get(name), here.get(name)
        if name == PATHS or before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            found += [f"{name}.{inner}" for inner in differences(before, now)]
        else:
            found.append(f"{name} is {_shown(before)} there and {_shown(now)} here")
    return found


def check_source(plan: Plan, images: Sequence[ImageLine], source: Source, folder: str) -> list[int]:
    """Refuse a source that is not the plan's.

    Returns
    -------
    list of int
        Images whose files have another time of modification than the plan says: copies, or changed ones of equal size.

    Raises
    ------
    StoreError
        Names or sizes differ; it says which.
    """
    if source.digest() != plan.source["digest"]:
        raise StoreError(f"{folder}: the source has changed since the plan: {_source_difference(images, source)}")
    times = zip(images, _modified(source), strict=True)
    return [number for number, (image, modified) in enumerate(times) if image.modified != modified]


def _source_difference(images: Sequence[ImageLine], source: Source) -> str:
    before = {image.name: image.size for image in images}
    now = {record.name: record.location.size for record in source.records}
    gone = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    other = [name for name in now if name in before and now[name] != before[name]]
    parts = [
        f"{len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for what, names in (("gone", gone), ("new", new), ("of another size", other))
        if names
    ]
    return "; ".join(parts) or "the same images in another order"


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON once, so that tuples and lists compare as they will when read back."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return plain


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
