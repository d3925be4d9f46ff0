"""Figures of evaluations: bars of means, and mean curves with bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ramp_fast.errors import InputError, RampFastError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ramp_fast.evaluation import Evaluation
    from ramp_fast.metrics import Result

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def _figure(panels: int) -> tuple[Figure, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RampFastError("plots need matplotlib: pip install 'ramp_fast[evaluate]'") from error
    columns = min(4, panels)
    rows = -(-panels // columns)
    # not through pyplot: no window, no global state
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes


def bars(evaluation: Evaluation, metrics: Sequence[str]) -> Figure:
    """Means with standard errors, a panel per metric and a bar per method."""
    if not metrics:
        raise InputError("there are no metrics to plot")
    figure, axes = _figure(len(metrics))
    for axis, metric in zip(axes, metrics, strict=False):
        for place, (method, results) in enumerate(evaluation.results.items()):
            if metric in results:
                error = results[metric].standard_error
                axis.barh(
                    place,
                    results[metric].mean,
                    xerr=error if error == error else None,
                    color=COLOURS[place % len(COLOURS)],
                    label=method,
                    error_kw={"capsize": 2, "linewidth": 1},
                )
        axis.set_yticks(range(len(evaluation.results)), list(evaluation.results))
        axis.invert_yaxis()
        better = "higher" if evaluation.metrics[metric]["higher_is_better"] else "lower"
        axis.set_title(metric, fontsize="medium", wrap=True)
        axis.set_xlabel(f"{better} is better")
        axis.axvline(0, color="black", linewidth=0.8)
    return figure


def curves(evaluation: Evaluation, metrics: Sequence[str]) -> Figure:
    """Mean curves with bands of one standard error, a panel per metric and a colour per method."""
    panels = [m for m in metrics if evaluation.metrics[m]["axis"]]
    if not panels:
        raise InputError(f"none of {', '.join(metrics)} has curves")
    figure, axes = _figure(len(panels))
    for axis, metric in zip(axes, panels, strict=False):
        about = evaluation.metrics[metric]["axis"]
        for place, (method, results) in enumerate(evaluation.results.items()):
            if metric in results:
                _curves(axis, results[metric], about, method, COLOURS[place % len(COLOURS)])
        axis.set_xlabel(about["label"])
        axis.set_title(metric, fontsize="medium", wrap=True)
    axes[0].legend(fontsize="small", frameon=False)
    return figure


def _curves(axis: Any, result: Result, about: dict[str, Any], method: str, colour: str) -> None:
    for name, style in zip(about["curves"], ("-", "--"), strict=False):
        values = result.values[name]
        mean = values.nanmean(0)
        count = (~values.isnan()).sum(0)
        variance = (values - mean).square().nanmean(0) * count / (count - 1)
        error = (variance / count).sqrt().where(count > 1, 0)
        label = method if len(about["curves"]) == 1 else f"{method}, {name}"
        axis.plot(about["values"], mean, style, color=colour, label=label)
        axis.fill_between(about["values"], mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
