"""Metrics of maps that a store has, shard by shard: stopped at any moment, gone on with, shared, and put together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ramp_fast._checks import positive
from ramp_fast._files import reason
from ramp_fast.capture.model_checks import in_training
from ramp_fast.data.decoders import Decoded, Decoders
from ramp_fast.data.images import ImageError, read_picture
from ramp_fast.data.pixels import Framing
from ramp_fast.data.preprocessing import Preprocessing
from ramp_fast.data.records import Source
from ramp_fast.errors import InputError
from ramp_fast.evaluation.evaluator import described, labelled, made_metric
from ramp_fast.evaluation.result import Evaluation
from ramp_fast.explainer import Model, module_of
from ramp_fast.metrics import Metric
from ramp_fast.pipeline.normalising import Normaliser
from ramp_fast.pipeline.planning import check_source, differences, source_of, weights_digest
from ramp_fast.results.maps import StoredMaps, decoded, open_maps
from ramp_fast.results.metric_values import ValueWriter, shard_digest
from ramp_fast.results.store import StoreError

__all__ = ["check_model", "evaluate_maps", "methods_of"]

_COUNT = "images"
"""The entry of a shard's values that says of how many images they are."""


def evaluate_maps(
    maps: StoredMaps | str | Path,
    model: Model,
    metrics: Sequence[str | Metric] | Mapping[str, str | Metric],
    out: str | Path,
    *,
    source: Source | None = None,
    part: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation | None:
    """Evaluate the maps of a store that ``ramp-fast run`` has written, or is writing.

    Values of every finished shard of the store are kept in ``out``, so that the same call goes on where it was stopped,
    however it was; the result is that of a call that was not, to the last bit.

    Parameters
    ----------
    maps : StoredMaps, str or pathlib.Path
        The store. Its maps are those of one method, or with K targets of K.
    model : torch.nn.Module or Engine
        The one that the maps are of, in eval mode.
    metrics : sequence of names, or mapping of label to name or Metric
        As for :func:`ramp_fast.evaluation.evaluate`. Those that need further maps, of other images, classes or models
        (randomisation, robustness, GAE, the grid pointing game), and those that compare images with each other
        (sufficiency), are refused.
    out : str or pathlib.Path
        Folder of the values, made when missing.
    source : Source, optional
        The images; by default they are where the run found them. They are read as the run has read them.
    part : (int, int), optional
        (I, N): evaluate every N-th shard, from the I-th (from 1), beside other calls on the same ``out``.
    seed, batch_size
        As for :func:`ramp_fast.evaluation.evaluate`. Image n of the store always gets the same random draws.
    workers : int
        Processes that decode images; 0: none but this one.
    progress : callable, optional
        Called with images that are finished and all those of this call.

    Returns
    -------
    Evaluation or None
        Of all shards of the store that are finished, ``images`` says how many images that is; an image without a map
        is left out. None for a ``part``: a call without it puts the values together.

    Raises
    ------
    InputError
        An argument is not as described, or a metric is refused.
    StoreError
        Model or images are not those of the store, ``out`` holds another evaluation, or is being written.
    """
    store = maps if isinstance(maps, StoredMaps) else open_maps(maps)
    positive("evaluate_maps", "batch_size", batch_size)
    if in_training(module_of(model)):
        raise InputError("the model is in training mode: call model.eval()")
    templates = {
        label: made_metric(spec, model, seed, batch_size) for label, spec in labelled(metrics, "metric").items()
    }
    if not templates:
        raise InputError("nothing to evaluate: no metrics")
    _refuse_metrics(templates)
    settings = {"state_sha256": weights_digest(module_of(model))}
    check_model({name: store.plan.settings.get(name) for name in settings}, settings, store.folder)
    if source is None:
        source = source_of(store.plan.request, store.plan.request["paths"]["source"])
    check_source(store.plan, store.images, source, str(store.folder))
    wanting = [label for label, metric in templates.items() if metric.needs_masks]
    if wanting and any(record.region is None for record in source.records):
        raise InputError(f"{', '.join(wanting)}: the source {source.root} has no boxes or masks of the objects")
    plan = _plain(
        {
            "store": store.plan.document()["hash"],
            "metrics": {label: metric.settings() for label, metric in templates.items()},
        }
    )
    with ValueWriter(out, part) as values:
        with values.alone():
            there = values.plan()
            if there is None:
                values.create(plan)
        found = [] if there is None else differences(_by_metric(there), _by_metric(plan))
        if found:
            raise StoreError(f"{out} holds another evaluation: {'; '.join(found)}; choose another --out")
        _Run(store, templates, source, values, batch_size, workers, progress).run()
        return None if part is not None else _merged(store, templates, values)


def methods_of(store: StoredMaps) -> list[str]:
    """What the maps of a store are called among methods: by the rule, and where there are several by their targets."""
    rule = str(store.plan.request.get("rule", "maps"))
    names = store.plan.targets
    return [rule] if len(names) == 1 else [f"{rule} ({name})" for name in names]


def check_model(there: Mapping[str, Any], here: Mapping[str, Any], folder: str | Path) -> None:
    """Refuse a model that is not the one of the maps.

    Raises
    ------
    StoreError
        It says what differs.
    """
    found = differences(there, here)
    if found:
        raise StoreError(f"{folder} holds maps of another model: {'; '.join(found)}")


def _refuse_metrics(templates: Mapping[str, Metric]) -> None:
    for label, metric in templates.items():
        if metric.asks_method:
            raise InputError(
                f"{label} needs maps of other images, classes or models, which a store does not have: evaluate the "
                "method itself (ramp-fast evaluate --data --method)"
            )
        if metric.compares_images:
            raise InputError(f"{label} compares every image with all others, so that shards of a store cannot do it")


def _plain(plan: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(plan, allow_nan=False))
    except ValueError as error:
        raise InputError(f"a setting of a metric is not finite: {plan}") from error
    return plain


def _by_metric(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with an entry for each metric, so that differences name it; the order of metrics counts too."""
    metrics = plan.get("metrics", {})
    return {"store": plan.get("store"), **metrics, "order": list(metrics)}


def _key(target: int, metric: int, component: str) -> str:
    return f"{target}.{metric}.{component}"


class _Run:
    """Evaluates what is missing."""

    def __init__(
        self,
        store: StoredMaps,
        templates: Mapping[str, Metric],
        source: Source,
        values: ValueWriter,
        batch_size: int,
        workers: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.store, self.templates, self.source, self.values = store, templates, source, values
        self.batch_size, self.workers, self.progress = batch_size, workers, progress
        self.preprocessing = Preprocessing(store.plan.settings["preprocessing"])
        config = self.preprocessing.config
        first = next(iter(templates.values()))
        device = next((p.device for p in first.model.parameters()), torch.device("cpu"))
        self.normalised = Normaliser(config["mean"], config["std"], device)
        self.framing = Framing.of(config, fast=store.plan.request.get("decoding") == "scaled")
        self.with_masks = any(metric.needs_masks for metric in templates.values())
        self.done = store.done

    def run(self) -> None:
        lines = self.store.journal()
        digests = {shard: shard_digest(lines[shard]) for shard in sorted(self.store.finished())}
        own = [shard for shard in self.values.own_shards(self.store.plan.shards) if shard in digests]
        todo = [shard for shard in own if not self.values.is_finished(shard, digests[shard])]
        total, finished = (sum(len(self.store.plan.range(shard)) for shard in some) for some in (own, own))
        finished -= sum(len(self.store.plan.range(shard)) for shard in todo)
        if not todo:
            return
        parts = {shard: self._parts(shard) for shard in todo}
        located = ([self.source.locate(n) for n in part] for shard in todo for part in parts[shard])
        with Decoders(self.framing, self.batch_size, self.workers) as decoders:
            batches = decoders.batches(located)
            for shard in todo:
                metrics = self._fresh()
                for part in parts[shard]:
                    self._add(metrics, part, next(batches))
                    if self.progress is not None:
                        self.progress(finished + part[-1] + 1 - self.store.plan.range(shard).start, total)
                self.values.write(shard, self._values(metrics), digests[shard])
                finished += len(self.store.plan.range(shard))
                if self.progress is not None:
                    self.progress(finished, total)

    def _parts(self, shard: int) -> list[list[int]]:
        """Images of a shard that have maps, in batches."""
        images = [number for number in self.store.plan.range(shard) if self.done[number]]
        return [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]

    def _fresh(self) -> list[list[Metric]]:
        """Metrics of every target."""
        return [[metric.fresh() for metric in self.templates.values()] for _ in self.store.plan.targets]

    def _add(self, metrics: list[list[Metric]], numbers: Sequence[int], batch: Decoded) -> None:
        self._check(numbers, batch)
        images = self.normalised(torch.from_numpy(batch.pixels))
        target, maps = (torch.from_numpy(array) for array in self._stored(numbers))
        masks = torch.stack([self._mask(number) for number in numbers]) if self.with_masks else None
        for here in _runs(numbers):
            first = numbers[here.start]
            for k, of_target in enumerate(metrics):
                for (label, template), metric in zip(self.templates.items(), of_target, strict=True):
                    template.classes(images)  # counted once, and known to its copies
                    piece = template.fresh(first)
                    try:
                        piece.update(
                            images[here],
                            target[here, k],
                            None,
                            maps=maps[here, k],
                            masks=None if masks is None else masks[here],
                        )
                    except InputError as error:
                        raise InputError(f"{label}, images from {self.source.shown(first)}: {error}") from error
                    metric.merge_state(piece.state_dict())

    def _check(self, numbers: Sequence[int], batch: Decoded) -> None:
        """Refuse images that are not those of the maps."""
        checksums = self.store.array("source_crc32", numbers[0], numbers[-1] + 1)
        for place, number in enumerate(numbers):
            shown = self.source.shown(number)
            if place in batch.failures:
                raise StoreError(f"{shown}: cannot be read now, and has a map: {batch.failures[place]}")
            if int(batch.checksums[place]) != int(checksums[number - numbers[0]]):
                raise StoreError(f"{shown}: the image has other bytes than what was attributed")

    def _stored(self, numbers: Sequence[int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Classes ``[N, K]`` and maps ``[N, K, 1 or C, H, W]`` of images."""
        plan = self.store.plan
        span = numbers[0], numbers[-1] + 1
        chosen = [number - numbers[0] for number in numbers]
        values, scale, target = (self.store.array(name, *span)[chosen] for name in ("maps", "scale", "target"))
        relevance = np.stack([decoded(*pair) for pair in zip(values, scale, strict=True)])
        channels = plan.map_shape[-3] if plan.channels else 1
        several = len(plan.targets)
        return target.reshape(-1, several), relevance.reshape(len(chosen), several, channels, *plan.map_shape[-2:])

    def _mask(self, number: int) -> Tensor:
        region = self.source.records[number].region
        assert region is not None  # evaluate_maps has seen to it
        try:
            with self.source.locate(number).open() as file:
                picture = read_picture(file)
            return self.preprocessing.mask(region((picture.height, picture.width)))
        except (ImageError, OSError) as error:
            raise StoreError(f"{self.source.shown(number)}: no mask of the object: {reason(error)}") from error

    def _values(self, metrics: list[list[Metric]]) -> dict[str, npt.NDArray[Any]]:
        found: dict[str, npt.NDArray[Any]] = {_COUNT: np.asarray(metrics[0][0].images_seen, np.int64)}
        for k, of_target in enumerate(metrics):
            for number, metric in enumerate(of_target):
                for component, value in metric.state_dict()["values"].items():
                    found[_key(k, number, component)] = value.numpy()
        return found


def _runs(numbers: Sequence[int]) -> Iterator[slice]:
    """Places of images that follow each other."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield slice(start, place)
            start = place


def _merged(store: StoredMaps, templates: Mapping[str, Metric], values: ValueWriter) -> Evaluation:
    """The values of all finished shards."""
    lines = store.journal()
    metrics = {method: {label: t.fresh() for label, t in templates.items()} for method in methods_of(store)}
    names: list[str] = []
    for shard in sorted(store.finished()):
        if not values.is_finished(shard, shard_digest(lines[shard])):
            continue  # it has been written meanwhile
        found = values.read(shard)
        images = store.plan.range(shard)
        done = store.array("done", images.start, images.stop)
        names += [store.names[images.start + int(place)] for place in np.flatnonzero(done)]
        for k, of_method in enumerate(metrics.values()):
            for number, metric in enumerate(of_method.values()):
                prefix = _key(k, number, "")
                own = {n.removeprefix(prefix): torch.from_numpy(v) for n, v in found.items() if n.startswith(prefix)}
                metric.merge_state({"settings": metric.settings(), "values": own, "images": int(found[_COUNT])})
    results = {
        method: {label: metric.compute() for label, metric in of_method.items() if metric.images_seen}
        for method, of_method in metrics.items()
    }
    return Evaluation(results, described(templates), names=names, images=len(names))
