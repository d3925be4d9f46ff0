"""Evaluation: metrics of several attribution methods over a data set, as a table, values per image and plots."""

from __future__ import annotations

import csv
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ramp_fast._checks import flag, is_whole, positive
from ramp_fast._files import printable, read_text, reason
from ramp_fast.data import Batch
from ramp_fast.engine import CONTRASTS, Engine
from ramp_fast.errors import InputError, RampFastError
from ramp_fast.marks import SOFTWARE
from ramp_fast.methods import METHODS, Method, make_method
from ramp_fast.metrics import METRICS, Metric, make_metric
from ramp_fast.metrics.base import (
    Model,
    Result,
    answer,
    check_classes,
    checked_images,
    checked_masks,
    method_name,
    module_of,
)
from ramp_fast.model_checks import in_training
from ramp_fast.specs import parse_spec
from ramp_fast.store import atomic_write

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Data = Tensor | tuple[Tensor, ...] | Iterable[Batch | tuple[Tensor, ...]]
EXPLAINED = ("label", "predicted")
FORMAT = 1
MAX_BYTES = 2**32  # curves of a million images


class EvaluationError(RampFastError):
    """An evaluation stopped, or a pair of method and metric failed under ``strict``.

    ``partial`` holds what was finished before.
    """

    def __init__(self, message: str, partial: Evaluation) -> None:
        super().__init__(message)
        self.partial = partial


@dataclass(frozen=True)
class Evaluation:
    """Metrics of methods.

    Attributes
    ----------
    results : dict of method to dict of metric to Result
        In the order asked for. A pair that failed in its first batch is missing.
    metrics : dict of metric to dict
        "higher_is_better", "settings", "group" (images that belong together), and "axis" (label and
        values) where it has curves.
    failures : dict of "method / metric" to str
        Why a pair stopped; its values of earlier batches are in the results.
    names : list of str
        Of the images, in the order of the values (empty where the data have none).
    images : int
        How many were evaluated.
    left_out : dict of metric to int
        Images at the end that did not make up a group.
    seconds : dict of "method / metric" to float
        What a pair took; the maps that metrics share count under "method / maps".
    """

    results: dict[str, dict[str, Result]]
    metrics: dict[str, dict[str, Any]]
    failures: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    images: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """The table: a row for each method and metric, with mean, standard error and count."""
        return [
            {
                "method": method,
                "metric": metric,
                "mean": result.mean,
                "standard_error": result.standard_error,
                "count": result.count,
                "higher_is_better": self.metrics[metric]["higher_is_better"],
            }
            for method, results in self.results.items()
            for metric, result in results.items()
        ]

    def value_rows(self) -> list[dict[str, Any]]:
        """A row for each value: method, metric, entry (an image, or a group of images), image (its name), value."""
        rows = []
        for method, results in self.results.items():
            for metric, result in results.items():
                values = result.values[result.name].tolist()
                # a pair that stopped has the values of the first images
                names = self.names if self.metrics[metric]["group"] == 1 else []
                for entry, value in enumerate(values):
                    image = names[entry] if entry < len(names) else ""
                    rows.append({"method": method, "metric": metric, "entry": entry, "image": image, "value": value})
        return rows

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a data frame.

        Raises
        ------
        RampFastError
            pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise RampFastError("to_pandas needs pandas: pip install 'ramp_fast[evaluate]'") from error
        frame: pandas.DataFrame = pandas.DataFrame(self.rows())
        return frame

    def __str__(self) -> str:
        """Methods by metrics: means with standard errors; arrows say which direction is better."""
        metrics = list(self.metrics)
        arrows = {m: "↑" if self.metrics[m]["higher_is_better"] else "↓" for m in metrics}
        table = [["method", *(f"{m} {arrows[m]}" for m in metrics)]]
        for method, results in self.results.items():
            table.append([method, *(self._cell(method, m, results.get(m)) for m in metrics)])
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        )

    def markdown(self) -> str:
        """The same table in Markdown."""
        metrics = list(self.metrics)
        arrows = {m: "↑" if self.metrics[m]["higher_is_better"] else "↓" for m in metrics}
        lines = [
            "| method | " + " | ".join(f"{m} {arrows[m]}" for m in metrics) + " |",
            "|---" * (len(metrics) + 1) + "|",
        ]
        for method, results in self.results.items():
            cells = (self._cell(method, m, results.get(m)) for m in metrics)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _cell(self, method: str, metric: str, result: Result | None) -> str:
        failed = " (failed)" if _pair(method, metric) in self.failures else ""
        if result is None:
            return failed.strip() or "-"
        error = "" if math.isnan(result.standard_error) else f" ± {result.standard_error:.3f}"
        return f"{result.mean:.3f}{error}{failed}"

    def save(self, path: str | Path) -> None:
        """Write all of it as JSON; a file that is there is whole."""
        document = {
            "software": SOFTWARE,  # first, by which the file is known
            "format": FORMAT,
            "results": {
                method: {metric: {"name": r.name, "values": _plain(r.values)} for metric, r in results.items()}
                for method, results in self.results.items()
            },
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
        }
        with atomic_write(path) as file:
            file.write(json.dumps(document, allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises
        ------
        InputError
            The file is not one of these.
        """
        try:
            document = json.loads(read_text(path, most=MAX_BYTES))
            if document["format"] != FORMAT:
                raise InputError(f"{path} has format {document['format']}; this version reads {FORMAT}")
            results = {
                method: {metric: Result(r["name"], _tensors(r["values"])) for metric, r in of_method.items()}
                for method, of_method in document["results"].items()
            }
            loaded = cls(results, **{name: document[name] for name in _PLAIN_FIELDS})
            loaded._check_fields()
        except InputError:
            raise
        except Exception as error:  # what is no evaluation may fail in any way, by its depth too
            raise InputError(f"{path} is not an evaluation: {type(error).__name__}: {reason(error)}") from error
        return loaded

    def _check_fields(self) -> None:
        """Raise where a field is not as described: JSON may hold anything."""
        kinds = {"metrics": dict, "failures": dict, "names": list, "left_out": dict, "seconds": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(getattr(self, name), kind)]
        if wrong or not is_whole(self.images, 0) or not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"{wrong[0] if wrong else 'images or names'} is of another type")
        for about in self.metrics.values():
            if not {"higher_is_better", "settings", "group", "axis"} <= about.keys():
                raise KeyError("a metric is not described")
        for of_method in self.results.values():
            for metric, result in of_method.items():
                if metric not in self.metrics or result.name not in result.values:
                    raise KeyError(metric)

    def to_csv(self, path: str | Path, *, per_image: bool = False) -> None:
        """Write the table, or the values of all images, as CSV.

        Text that a spreadsheet would take for a formula gets an apostrophe in front; control characters and names that
        are not Unicode are written as escapes.
        """
        rows = self.value_rows() if per_image else self.rows()
        if not rows:
            raise InputError("there are no results to write")
        with atomic_write(path) as file:
            lines = _Lines()
            writer = csv.DictWriter(lines, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _inert(value) for key, value in row.items()} for row in rows)
            file.write("".join(lines).encode())

    def plot(self, kind: str = "bars", metrics: Sequence[str] | None = None) -> Figure:
        """A figure of one panel per metric.

        Parameters
        ----------
        kind : {"bars", "curves"}
            Means with standard errors by method; or mean curves with bands of one standard error, of those metrics
            that have curves.
        metrics : sequence of str, optional
            Which; all by default.

        Raises
        ------
        InputError
            There is nothing of that kind.
        RampFastError
            matplotlib is not installed.
        """
        from ramp_fast.plots import bars, curves

        chosen = list(self.metrics) if metrics is None else list(metrics)
        unknown = [m for m in chosen if m not in self.metrics]
        if unknown:
            raise InputError(f"no metric {unknown[0]!r} in this evaluation; there are {', '.join(self.metrics)}")
        if kind not in ("bars", "curves"):
            raise InputError(f"kind must be bars or curves, got {kind!r}")
        return bars(self, chosen) if kind == "bars" else curves(self, chosen)


_PLAIN_FIELDS = ("metrics", "failures", "names", "images", "left_out", "seconds")


_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""What spreadsheets take for the start of a formula, full-width forms included."""


def _inert(value: Any) -> Any:
    """Text as a cell in one line that no spreadsheet computes; numbers as they are."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


class _Lines(list[str]):
    """What csv writes to."""

    def write(self, line: str) -> None:
        self.append(line)


def _plain(values: dict[str, Tensor]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null stands for the one, text for the other."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        return value if math.isfinite(value) else (None if math.isnan(value) else str(value))

    return {name: plain(tensor.tolist()) for name, tensor in values.items()}


def _tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(v) for v in value]
        return math.nan if value is None else float(value)

    return {name: torch.tensor(number(v), dtype=torch.float64) for name, v in values.items()}


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
        methods: Sequence[str] | Mapping[str, str | Method | Engine],
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
            label: _metric(spec, model, seed, batch_size) for label, spec in labelled(metrics, "metric").items()
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
                if _pair(method, label) in self._failures:
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
        described = {
            label: {
                "higher_is_better": m.higher_is_better,
                "settings": m.settings(),
                "group": m.group,
                "axis": m.axis(),
            }
            for label, m in self._templates.items()
        }
        left_out = {label: waiting[0].shape[0] for label, waiting in self._waiting.items() if waiting[0].shape[0]}
        names = self._names if len(self._names) >= self._images else []
        return Evaluation(
            results, described, dict(self._failures), list(names), self._images, left_out, dict(self._seconds)
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
            return answer(self._answering, images)

    def _grouped(self, label: str, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Whole groups of what waited and what is new; the rest waits."""
        if label in self._waiting:
            before = self._waiting[label]
            images, target = torch.cat([before[0], images]), torch.cat([before[1], target])
        whole = images.shape[0] // self._templates[label].group * self._templates[label].group
        self._waiting[label] = images[whole:], target[whole:]
        return images[:whole], target[:whole]

    def _maps(self, method: str, function: Method | Engine, images: Tensor, target: Tensor) -> Tensor | None:
        """The method's maps of the images where metrics share them; None where none wants them or the method fails."""
        metrics = self._metrics[method]
        users = [label for label, m in metrics.items() if m.uses_maps and _pair(method, label) not in self._failures]
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
        self._failures[_pair(method, label)] = f"method {method}, metric {label}, batch {self._batches}: {what}"
        if self.strict:
            raise EvaluationError(self._failures[_pair(method, label)], self.result()) from error
        warnings.warn(
            f"evaluation goes on without {self._failures[_pair(method, label)]}", RuntimeWarning, stacklevel=3
        )

    def _took(self, method: str, what: str, started: float) -> None:
        key = _pair(method, what)
        self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - started


def evaluate(
    model: Model,
    data: Data,
    metrics: Sequence[str | Metric] | Mapping[str, str | Metric],
    methods: Sequence[str] | Mapping[str, str | Method | Engine],
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


def _metric(spec: str | Metric, model: Model, seed: int, batch_size: int | None) -> Metric:
    if isinstance(spec, Metric):
        if spec.model is not module_of(model):
            raise InputError(f"the metric {spec.name} is one of another model")
        return spec
    if not isinstance(spec, str):
        raise InputError(f"a metric is a name or a Metric, got {type(spec).__name__}")
    name, settings = parse_spec(spec)
    return make_metric(name, model, **{"seed": seed, "batch_size": batch_size, **settings})


def _method(spec: str | Method | Engine, model: Model, seed: int) -> Method | Engine:
    if isinstance(spec, str):
        name, settings = parse_spec(spec)
        return make_method(name, module_of(model), **{"seed": seed, **settings})
    if isinstance(spec, Engine) and spec.model is not module_of(model):
        raise InputError("an engine among the methods is one of another model")
    if not callable(spec) and not isinstance(spec, Engine):
        raise InputError(
            f"a method is a name, a function (model, images, target) or an Engine, got {type(spec).__name__}"
        )
    return spec


def _pair(method: str, metric: str) -> str:
    return f"{method} / {metric}"
