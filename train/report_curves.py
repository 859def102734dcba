"""The curves of a run as PNG pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from eval import pictures
from eval.pictures import Theme
from train.run_log import LogEntry, RunLog

_POINTS = 400  # a picture shows at most; of longer logs a running mean is drawn, and the points themselves only faintly
_LOG_RATIO = 20  # of the highest to the lowest value, from which on an axis is logarithmic


@dataclass(frozen=True)
class Curve:
    """A picture: what it is called, and what draws it. ``draw`` gets the axes, the entries and their steps."""

    name: str  # of its file
    title: str
    draw: Callable[[Axes, Sequence[LogEntry]], None]


def smoothing(points: int) -> int:
    """Points of a log of so many that a curve's running mean is over; 1: it goes through each."""
    return 1 if points <= _POINTS else points // (_POINTS // 2)


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Over what is finite of ``width`` values around each, fewer at the ends; NaN where a value is not finite."""
    values, kernel = np.asarray(values, dtype=np.float64), np.ones(width)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    counts = np.convolve(finite, kernel, "same")
    return np.where(finite, sums / np.maximum(counts, 1.0), math.nan)


def curves(run: RunLog) -> list[Curve]:
    """Those that the run has numbers for."""
    cosines = {
        "target_cosine": "own class center",
        "hardest_negative_cosine": "hardest other class",
        "expectation_cosine": "own expectation",
        "center_expectation_cosine": "class center and expectation",
    }
    gradients = {"gradient_norm": "backbone", "head_gradient_norm": "class centers"}
    losses = {"loss": "mean of the window", "loss_maximum": "highest of the window"}
    all_curves = [
        Curve("loss", "Loss", _lines(losses, "nats", may_be_log=True)),
        Curve("cosines", "Cosines", _lines(cosines, "cosine")),
        Curve("accuracy", "Accuracy on pairs", _draw_accuracy),
        Curve("learning_rate", "Learning rate", _lines({"learning_rate": ""}, "")),
        Curve("throughput", "Throughput", _lines({"images_per_second": ""}, "images/s")),
        Curve("time", "Where a step's time goes", _draw_parts),
        Curve("gradient_norm", "Gradient norms before clipping", _lines(gradients, "L2 norm", may_be_log=True)),
        Curve("utilization", "MFU: operations next to the device's peak", _draw_utilization),
        Curve("memory", "Memory", _draw_memory),
    ]
    known = {
        "accuracy": any(entry.mapping("evaluation_accuracy") for entry in run.entries),
        "time": any(entry.parts for entry in run.entries),
        "utilization": any(math.isfinite(entry.utilization) for entry in run.entries),
        "memory": any(entry.mapping("memory") for entry in run.entries),
    }
    return [curve for curve in all_curves if known.get(curve.name, True)]


def picture(curve: Curve, run: RunLog, theme: Theme) -> bytes:
    """A PNG, see ``eval.pictures.picture``."""

    def draw(axes: Axes) -> None:
        curve.draw(axes, run.entries)
        _mark(axes, run, theme)
        axes.set_xlabel("step")

    return pictures.picture(draw, theme)


def _mark(axes: Axes, run: RunLog, theme: Theme) -> None:
    """Stages shaded and named, checkpoints as triangles on the axis, skipped steps as crosses, restarts and rollbacks as dashed lines."""
    last = run.entries[-1].step
    axes.set_xlim(0, last)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for index, span in enumerate(run.stages):
        if index % 2:
            axes.axvspan(span.start, span.stop, color=theme.shade, zorder=0, linewidth=0)
        if span.stop - span.start > 0.08 * last:
            middle = (span.start + span.stop) / 2 / last
            axes.text(middle, 1.02, span.name, transform=axes.transAxes, ha="center", va="bottom", fontsize=9)
    for height, marker, color, steps in (
        (0.0, "^", theme.ink, run.checkpoints),
        (0.98, "x", theme.alarm, [line["step"] for line in run.skipped]),
    ):
        size = 5 if len(steps) <= 30 else 2.5
        heights = [height] * len(steps)
        on_axis = axes.get_xaxis_transform()
        (marks,) = axes.plot(steps, heights, marker, markersize=size, color=color, transform=on_axis, clip_on=False, zorder=3)
        marks.set_in_layout(False)
    for step in run.setbacks:
        axes.axvline(step, color=theme.alarm, linewidth=1, linestyle=(0, (4, 3)), zorder=2)


def _lines(names: dict[str, str], unit: str, may_be_log: bool = False) -> Callable[[Axes, Sequence[LogEntry]], None]:
    """``names``: of the numbers, and what the legend calls them."""

    def draw(axes: Axes, entries: Sequence[LogEntry]) -> None:
        steps, shown = [entry.step for entry in entries], [0.0]
        for name, label in names.items():
            values = [entry.number(name) for entry in entries]
            finite = [value for value in values if math.isfinite(value)]
            if finite:
                _plot(axes, steps, values, label)
                shown += finite
        lowest, highest = min(shown[1:], default=0.0), max(shown)
        if may_be_log and 0 < lowest < highest / _LOG_RATIO:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        elif lowest >= 0:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(loc="best")

    return draw


def _plot(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str) -> None:
    width = smoothing(len(values))
    if width == 1:
        axes.plot(steps, values, label=label, marker="o" if sum(map(math.isfinite, values)) == 1 else None)
        return
    (line,) = axes.plot(steps, running_mean(values, width), label=label, zorder=2.5)
    axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.5)


def _draw_accuracy(axes: Axes, entries: Sequence[LogEntry]) -> None:
    evaluations = {entry.number("evaluation_step"): entry.mapping("evaluation_accuracy") for entry in entries}
    found = [(step, accuracies) for step, accuracies in sorted(evaluations.items()) if accuracies]
    for name in dict.fromkeys(name for _, accuracies in found for name in accuracies):
        points = [(step, 100 * accuracies[name]) for step, accuracies in found if name in accuracies]
        axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3)
    axes.set_ylabel("%")
    axes.legend(loc="best")


def _draw_parts(axes: Axes, entries: Sequence[LogEntry]) -> None:
    timed = [entry for entry in entries if entry.parts]
    names = list(dict.fromkeys(name for entry in timed for name in entry.parts))
    names = [name for name in names if any(entry.parts.get(name, 0.0) for entry in timed)]
    axes.stackplot(
        [entry.step for entry in timed],
        [[1000 * entry.parts.get(name, 0.0) for entry in timed] for name in names],
        labels=names,
        linewidth=0,
    )
    axes.set_ylabel("ms a step")
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_utilization(axes: Axes, entries: Sequence[LogEntry]) -> None:
    _plot(axes, [entry.step for entry in entries], [100 * entry.utilization for entry in entries], "")
    axes.set_ylabel("%")
    axes.set_ylim(bottom=0)


def _draw_memory(axes: Axes, entries: Sequence[LogEntry]) -> None:
    for kind in dict.fromkeys(kind for entry in entries for kind in entry.mapping("memory")):
        axes.plot([entry.step for entry in entries], [entry.mapping("memory").get(kind, math.nan) / 1e9 for entry in entries], label=kind)
    axes.set_ylabel("GB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
