"""Metrics of several attribution methods over a data set, in one pass over its images."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ramp_fast._checks import flag, positive
from ramp_fast.capture.model_checks import in_training
from ramp_fast.data import Batch
from ramp_fast.errors import InputError, RampFastError
from ramp_fast.evaluation.result import Evaluation, EvaluationError, pair_name
from ramp_fast.explainer import CONTRASTS, Explainer, Method, Model, logits_of, method_name, module_of
from ramp_fast.methods import METHODS, make_method
from ramp_fast.metrics import METRICS, Metric, make_metric
from ramp_fast.metrics.base import check_classes, checked_images, checked_masks
from ramp_fast.specs import parse_spec

if TYPE_CHECKING:
    pass

Data = Tensor | tuple[Tensor, ...] | Iterable[Batch | tuple[Tensor, ...]]
EXPLAINED = ("label", "predicted")


class Evaluator:
    """Evaluates methods batch by batch; :func:`evaluate` is a loop around it.

    Parameters
    ----------
    model : torch.nn.Module or Engine
        In eval mode. With an engine metrics that are given by name are metrics of the engine: on CPUs their logits are
        those of :meth:`ramp_fast.Engine.logits`.
    metrics : sequence of names, or mapping of label to name or Metric
        Names as in ``ramp_fast.metrics.METRICS``, with settings as in "deletion:steps=50,granularity=patch:8". A
        metric that is given as an object is used as a template: its own values are left alone.
    methods : sequence of names, or mapping of label to name, callable or Engine
        Names as in ``ramp_fast.methods.METHODS``, with settings as in "ig:steps=32".
    seed : int
        Of metrics and methods that are given by name.
    batch_size : int, optional
        Of metrics that are given by name: images that go through the model together.
    explain : {"label", "predicted"}
        Which class is explained: the data's label where there is one, or the predicted class.
    strict : bool
        Raise the first failure of a method or metric, instead of going on with the others.
    first_image : int
        The number of the first image, where several processes evaluate parts of one data set: see ``Metric.fresh``.
    contrast : {"others", "none"}, optional
        Of the maps of engines among the methods: see :meth:`ramp_fast.Engine.attribute`. By default "others", and
        "none" where the model has a single logit.

    Raises
    ------
    InputError
        A name, a label or a setting is not as described. Nothing has been computed then.
    """

    def __init__(
        self,
        model: Model,
        metrics: Sequence[str | Metric] | Mapping[str, str | Metric],
        methods: Sequence[str] | Mapping[str, str | Method | Explainer],
        *,
        seed: int = 0,
        batch_size: int | None = None,
        explain: str = "label",
        strict: bool = False,
        first_image: int = 0,
        contrast: str | None = None,
    ) -> None:
        if contrast not in (None, *CONTRASTS):
            raise InputError(f"contrast must be one of {', '.join(map(repr, CONTRASTS))}, or None; got {contrast!r}")
        if explain not in EXPLAINED:
            raise InputError(f"explain must be label or predicted, got {explain!r}")
        self.model, self._answering = module_of(model), model
        if in_training(self.model):
            raise InputError("the model is in training mode: call model.eval()")
        flag("Evaluator", "strict", strict)
        positive("Evaluator", "first_image", first_image, least=0)
        self.explain, self.strict = explain, strict
        self._templates = {
            label: made_metric(spec, model, seed, batch_size) for label, spec in labelled(metrics, "metric").items()
        }
        self._noticed: list[str] = []  # of the model, by any of the metrics: said once
        given = labelled(methods, "method")
        if not self._templates or not given:
            raise InputError(
                f"nothing to evaluate: {len(self._templates)} metrics, {len(given)} methods; there are metrics "
                f"{', '.join(sorted(METRICS))} and methods {', '.join(sorted(METHODS))}"
            )
        self._methods = {label: _method(spec, model, seed) for label, spec in given.items()}
        self._metrics = {
            method: {label: template.fresh(first_image) for label, template in self._templates.items()}
            for method in self._methods
        }
        for metrics_of in self._metrics.values():
            for metric in metrics_of.values():
                metric.belong_together(self._noticed, contrast)
        for label, template in self._templates.items():
            try:  # what could not be saved in the end is refused now
                json.dumps(template.settings(), allow_nan=False)
            except ValueError as error:
                raise InputError(f"{label}: a setting is not finite: {template.settings()}") from error
        self._failures: dict[str, str] = {}
        self._classes: int | None = None
        self._seconds: dict[str, float] = {}
        self._names: list[str] = []
        self._waiting: dict[str, tuple[Tensor, Tensor]] = {}
        self._images = self._batches = 0

    def update(self, batch: Batch) -> None:
        """Add a batch to every metric of every method.

        Raises
        ------
        InputError
            The batch is not as metrics need it: shapes, classes, masks of objects for metrics of localisation. Nothing
            is added then.
        EvaluationError
            Under ``strict``, what failed.
        """
        images, target, masks = self._checked(batch)
        groups = {label: self._grouped(label, images, target) for label, t in self._templates.items() if t.group > 1}
        self._names += batch.names or []
        for method, function in self._methods.items():
            maps = self._maps(method, function, images, target)
            for label, metric in self._metrics[method].items():
                if pair_name(method, label) in self._failures:
                    continue
                started = time.perf_counter()
                try:
                    if label not in groups:
                        metric.update(images, target, function, maps=maps, masks=masks)
                    elif groups[label][0].shape[0]:
                        metric.update(*groups[label], function)
                except Exception as error:
                    self._failed(method, label, error)
                self._took(method, label, started)
        self._images += images.shape[0]
        self._batches += 1

    def result(self) -> Evaluation:
        """What has been evaluated so far."""
        results = {
            method: {label: m.compute() for label, m in metrics.items() if m.images_seen}
            for method, metrics in self._metrics.items()
        }
        left_out = {label: waiting[0].shape[0] for label, waiting in self._waiting.items() if waiting[0].shape[0]}
        names = self._names if len(self._names) >= self._images else []
        return Evaluation(
            results,
            described(self._templates),
            dict(self._failures),
            list(names),
            self._images,
            left_out,
            dict(self._seconds),
        )

    @property
    def finished(self) -> bool:
        """Whether every pair of method and metric has failed, so that no further batch can add anything."""
        return len(self._failures) == len(self._methods) * len(self._templates)

    def _checked(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        where = f"batch {self._batches}"
        needing = [label for label, template in self._templates.items() if template.needs_masks]
        if needing and batch.masks is None:
            raise InputError(f"{', '.join(needing)}: the data have no masks of the objects ({where})")
        images, target = checked_images(where, self.model, batch.images, batch.target)
        masks = None if batch.masks is None else checked_masks(where, batch.masks, images)
        for label, (waiting, _) in self._waiting.items():
            if waiting.shape[1:] != images.shape[1:]:
                raise InputError(
                    f"{where}: images {list(images.shape[1:])} after {list(waiting.shape[1:])}: {label} takes groups "
                    f"of {self._templates[label].group} of one size"
                )
        if target is None or self.explain == "predicted":
            return images, self._answer(images).argmax(1), masks
        if self._classes is None:
            self._classes = self._answer(images[:1]).shape[1]
        check_classes(where, target, self._classes)
        return images, target, masks

    def _answer(self, images: Tensor) -> Tensor:
        """Logits, as metrics get them that are given by name."""
        with torch.no_grad():
            return logits_of(self._answering, images)

    def _grouped(self, label: str, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Whole groups of what waited and what is new; the rest waits."""
        if label in self._waiting:
            before = self._waiting[label]
            images, target = torch.cat([before[0], images]), torch.cat([before[1], target])
        whole = images.shape[0] // self._templates[label].group * self._templates[label].group
        self._waiting[label] = images[whole:], target[whole:]
        return images[:whole], target[:whole]

    def _maps(self, method: str, function: Method | Explainer, images: Tensor, target: Tensor) -> Tensor | None:
        """The method's maps of the images where metrics share them; None where none wants them or the method fails."""
        metrics = self._metrics[method]
        users = [
            label for label, m in metrics.items() if m.uses_maps and pair_name(method, label) not in self._failures
        ]
        if not users:
            return None
        started = time.perf_counter()
        try:
            return metrics[users[0]].attribute(function, images, target)
        except Exception as error:
            for label in users:
                self._failed(method, label, error)
            return None
        finally:
            self._took(method, "maps", started)

    def _failed(self, method: str, label: str, error: Exception) -> None:
        what = str(error) if isinstance(error, RampFastError) else f"{type(error).__name__}: {error}"
        self._failures[pair_name(method, label)] = f"method {method}, metric {label}, batch {self._batches}: {what}"
        if self.strict:
            raise EvaluationError(self._failures[pair_name(method, label)], self.result()) from error
        warnings.warn(
            f"evaluation goes on without {self._failures[pair_name(method, label)]}", RuntimeWarning, stacklevel=3
        )

    def _took(self, method: str, what: str, started: float) -> None:
        key = pair_name(method, what)
        self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - started


def evaluate(
    model: Model,
    data: Data,
    metrics: Sequence[str | Metric] | Mapping[str, str | Metric],
    methods: Sequence[str] | Mapping[str, str | Method | Explainer],
    *,
    batch_size: int = 16,
    seed: int = 0,
    explain: str = "label",
    strict: bool = False,
    contrast: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate attribution methods of a model.

    Parameters
    ----------
    model
        As for :class:`Evaluator`; it is left as it is.
    data : Tensor, tuple of Tensors, or iterable of batches
        Images ``[N, C, H, W]``; or (images, target ``[N]``), or (images, target, masks ``[N, 1, H, W]``), each of them
        but the images may be None; or an iterable (a DataLoader) of such tuples or of ``ramp_fast.data.Batch``.
    metrics, methods, seed, explain, strict, contrast
        As for :class:`Evaluator`.
    batch_size : int
        Images per batch where data are tensors; and of metrics given by name, images that go through the model
        together. Results do not depend on it, but for GAE's protocol "published" without its setting ``batch``.
    progress : callable, optional
        Called after each batch with its number of images.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        An argument is not as described.
    EvaluationError
        Data or model failed in a later batch; its ``partial`` holds the results of those before. Under ``strict`` also
        what failed of a method or metric. Otherwise a pair of these that fails is reported by a RuntimeWarning and in
        ``failures``, and the others go on.
    """
    positive("evaluate", "batch_size", batch_size)
    run = Evaluator(
        model, metrics, methods, seed=seed, batch_size=batch_size, explain=explain, strict=strict, contrast=contrast
    )
    try:
        for batch in _batches(data, batch_size):
            run.update(batch)
            if progress is not None:
                progress(batch.images.shape[0])
            if run.finished:
                break
    except EvaluationError:
        raise
    except Exception as error:
        before = run.result()
        if not before.images:
            raise
        raise EvaluationError(f"evaluation stopped after {before.images} images: {error}", before) from error
    return run.result()


def _batches(data: Data, batch_size: int) -> Iterator[Batch]:
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, (tuple, list)) and _are_tensors(data):
        whole = _batch(data)
        for start in range(0, whole.images.shape[0], batch_size):
            here = slice(start, start + batch_size)
            target = None if whole.target is None else whole.target[here]
            masks = None if whole.masks is None else whole.masks[here]
            yield Batch(whole.images[here], target, masks, whole.names[here])
        return
    for entry in data:
        yield entry if isinstance(entry, Batch) else _batch(entry)


def _are_tensors(data: Sequence[Any]) -> bool:
    """Whether it is images, with target and masks or without, and not several batches of images."""
    images, *others = data or [None]
    return isinstance(images, Tensor) and not (
        others and isinstance(others[0], Tensor) and others[0].is_floating_point()
    )


def _batch(entry: Any) -> Batch:
    if isinstance(entry, Tensor):
        entry = (entry,)
    if not isinstance(entry, (tuple, list)) or not 1 <= len(entry) <= 3 or not isinstance(entry[0], Tensor):
        raise InputError(
            f"data must be images, (images, target), (images, target, masks) or batches of these; got "
            f"{type(entry).__name__}"
        )
    images, target, masks = (*entry, None, None)[:3]
    if images.dim() != 4:
        raise InputError(f"images must be [N, C, H, W], got {list(images.shape)}")
    for what, tensor in (("target", target), ("masks", masks)):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape[:1] != images.shape[:1]):
            raise InputError(f"{what} must be a Tensor with {images.shape[0]} entries, as the images have")
    if masks is not None and masks.dim() == 3:
        masks = masks.unsqueeze(1)
    return Batch(images, target, masks, [])


def labelled(given: Any, what: str) -> dict[str, Any]:
    """Metrics or methods by label: a mapping as it is, a sequence by their names.

    Raises
    ------
    InputError
        Two would have one label.
    """
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        return dict(given)
    labels = [g if isinstance(g, str) else getattr(g, "name", None) or method_name(g) for g in given]
    double = {label for label in labels if labels.count(label) > 1}
    if double:
        raise InputError(f"{what} {sorted(double)[0]!r} is there twice: give a mapping of labels to {what}s")
    return dict(zip(labels, given, strict=True))


def described(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """What an :class:`Evaluation` says of metrics."""
    return {
        label: {
            "higher_is_better": metric.higher_is_better,
            "settings": metric.settings(),
            "group": metric.group,
            "axis": metric.axis(),
        }
        for label, metric in metrics.items()
    }


def made_metric(spec: str | Metric, model: Model, seed: int, batch_size: int | None) -> Metric:
    """A metric by its name with settings, or as it is given.

    Raises
    ------
    InputError
        It is neither, or one of another model.
    """
    if isinstance(spec, Metric):
        if spec.model is not module_of(model):
            raise InputError(f"the metric {spec.name} is one of another model")
        return spec
    if not isinstance(spec, str):
        raise InputError(f"a metric is a name or a Metric, got {type(spec).__name__}")
    name, settings = parse_spec(spec)
    return make_metric(name, model, **{"seed": seed, "batch_size": batch_size, **settings})


def _method(spec: str | Method | Explainer, model: Model, seed: int) -> Method | Explainer:
    if isinstance(spec, str):
        name, settings = parse_spec(spec)
        return make_method(name, module_of(model), **{"seed": seed, **settings})
    if isinstance(spec, Explainer) and spec.model is not module_of(model):
        raise InputError("an engine among the methods is one of another model")
    if not callable(spec) and not isinstance(spec, Explainer):
        raise InputError(
            f"a method is a name, a function (model, images, target) or an Engine, got {type(spec).__name__}"
        )
    return spec
