"""What an evaluation found: a table, files, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ramp_fast._checks import is_whole
from ramp_fast._files import read_text, reason
from ramp_fast.errors import InputError, RampFastError
from ramp_fast.evaluation.plots import bars, curves
from ramp_fast.metrics.base import Result
from ramp_fast.results.marks import SOFTWARE
from ramp_fast.results.store import atomic_write
from ramp_fast.results.tables import csv_text

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

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
        """The table: a row for each method and metric, with mean, its standard error and 95 % interval, and count."""
        return [
            {
                "method": method,
                "metric": metric,
                "mean": result.mean,
                "standard_error": result.standard_error,
                "low_95": result.confidence_interval[0],
                "high_95": result.confidence_interval[1],
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
        failed = " (failed)" if pair_name(method, metric) in self.failures else ""
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
            file.write(csv_text(list(rows[0]), (list(row.values()) for row in rows)).encode())

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
        chosen = list(self.metrics) if metrics is None else list(metrics)
        unknown = [m for m in chosen if m not in self.metrics]
        if unknown:
            raise InputError(f"no metric {unknown[0]!r} in this evaluation; there are {', '.join(self.metrics)}")
        if kind not in ("bars", "curves"):
            raise InputError(f"kind must be bars or curves, got {kind!r}")
        draw = bars if kind == "bars" else curves
        return draw(self.results, self.metrics, chosen)


_PLAIN_FIELDS = ("metrics", "failures", "names", "images", "left_out", "seconds")


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

    return {name: torch.tensor(number(v), dtype=torch.float64, device="cpu") for name, v in values.items()}


def pair_name(method: str, metric: str) -> str:
    """What a pair is called among failures and times."""
    return f"{method} / {metric}"
