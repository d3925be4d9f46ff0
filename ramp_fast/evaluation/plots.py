"""Figures of evaluations: bars of means, and mean curves with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ramp_fast.errors import InputError, RampFastError
from ramp_fast.metrics.base import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Mapping[str, Result]]  # of methods, by metric
About = Mapping[str, Mapping[str, Any]]  # of metrics: "higher_is_better", and "axis" where there are curves

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


def bars(results: Results, about: About, metrics: Sequence[str]) -> Figure:
    """Means with standard errors, a panel per metric and a bar per method."""
    if not metrics:
        raise InputError("there are no metrics to plot")
    figure, axes = _figure(len(metrics))
    for axis, metric in zip(axes, metrics, strict=False):
        for place, (method, own) in enumerate(results.items()):
            if metric in own:
                error = own[metric].standard_error
                axis.barh(
                    place,
                    own[metric].mean,
                    xerr=error if error == error else None,
                    color=COLOURS[place % len(COLOURS)],
                    label=method,
                    error_kw={"capsize": 2, "linewidth": 1},
                )
        axis.set_yticks(range(len(results)), list(results))
        axis.invert_yaxis()
        better = "higher" if about[metric]["higher_is_better"] else "lower"
        axis.set_title(metric, fontsize="medium", wrap=True)
        axis.set_xlabel(f"{better} is better")
        axis.axvline(0, color="black", linewidth=0.8)
    return figure


def curves(results: Results, about: About, metrics: Sequence[str]) -> Figure:
    """Mean curves with bands of one standard error, a panel per metric and a colour per method."""
    panels = [m for m in metrics if about[m]["axis"]]
    if not panels:
        raise InputError(f"none of {', '.join(metrics)} has curves")
    figure, axes = _figure(len(panels))
    for axis, metric in zip(axes, panels, strict=False):
        lines = about[metric]["axis"]
        for place, (method, own) in enumerate(results.items()):
            if metric in own:
                _curves(axis, own[metric], lines, method, COLOURS[place % len(COLOURS)])
        axis.set_xlabel(lines["label"])
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
