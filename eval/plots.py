"""Pictures of scores: ROC, DET (ISO/IEC 19795-1, here on logarithmic axes), and histograms of genuine and impostor pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, PercentFormatter

from eval.curves import ScoreCurves
from eval.pictures import LIGHT, Theme, picture
from eval.results import Curves

_DASHES = ("-", "--", ":", "-.")  # of every next set of colors
_LABEL = 40  # characters at most


@dataclass(frozen=True)
class ModelScores:
    """What is drawn of one model.

    Args:
        bars: (FAR, low, high) of confidence intervals of TAR.
    """

    label: str
    curves: ScoreCurves | Curves
    bars: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Plot:
    """``draw`` gets the axes and the theme."""

    name: str  # of its file
    title: str
    draw: Callable[[Axes, Theme], None]

    def png(self, theme: Theme = LIGHT) -> bytes:
        return picture(partial(self.draw, theme=theme), theme)


def plots(models: Sequence[ModelScores]) -> list[Plot]:
    """Of models whose pairs are the same: one ROC and one DET with all of them, and a histogram of each, on one scale."""
    histograms = [
        Plot(
            f"histogram-{number}" if len(models) > 1 else "histogram",
            f"Scores, {model.label}" if len(models) > 1 else "Scores",
            partial(_draw_histogram, model=model, models=models),
        )
        for number, model in enumerate(models, start=1)
    ]
    return [
        Plot("roc", "ROC: true accepts over false accepts", partial(_draw_roc, models=models)),
        Plot("det", "DET: false non-matches over false matches", partial(_draw_det, models=models)),
        *histograms,
    ]


def _draw_roc(axes: Axes, theme: Theme, models: Sequence[ModelScores]) -> None:
    for index, model in enumerate(models):
        style = _style(index, theme)
        axes.step(model.curves.far, model.curves.tar, where="post", label=_label(model), **style)
        for far, low, high in model.bars:
            middle, beside = (low + high) / 2, far * 1.08 ** (index - (len(models) - 1) / 2)  # bars of several models at one FAR
            axes.errorbar([beside], [middle], [[middle - low], [high - middle]], fmt="none", color=style["color"], capsize=3, elinewidth=1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_ylim(top=1 + 0.03 * (1 - axes.get_ylim()[0]))
    _finish(axes, models, "FAR", "TAR", "lower right")


def _draw_det(axes: Axes, theme: Theme, models: Sequence[ModelScores]) -> None:
    """Both axes logarithmic. A curve ends where no genuine pair is refused any more."""
    rates = []
    for index, model in enumerate(models):
        misses = 1 - np.array(model.curves.tar)
        misses[misses < 0.5 / model.curves.genuine] = np.nan  # none, but for rounding
        rates.extend(misses[np.isfinite(misses)])
        axes.step(model.curves.far, misses, where="post", label=_label(model), **_style(index, theme))
    axes.set_yscale("log")
    lowest = min(rates, default=min(1 / model.curves.genuine for model in models))
    axes.set_ylim(lowest / 1.5, min(1, 1.5 * max(rates, default=1)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if not rates:
        axes.text(0.5, 0.5, "no genuine pair is refused at any of these FMR", transform=axes.transAxes, ha="center", color=theme.ink)
    _finish(axes, models, "FMR (false match rate)", "FNMR", "upper right")


def _draw_histogram(axes: Axes, theme: Theme, model: ModelScores, models: Sequence[ModelScores]) -> None:
    edges, width = np.array(model.curves.edges), model.curves.edges[1] - model.curves.edges[0]
    shares = (
        ("impostor", model.curves.impostor_counts, model.curves.impostor, theme.curves[5]),
        ("genuine", model.curves.genuine_counts, model.curves.genuine, theme.curves[0]),
    )
    for name, counts, total, color in shares:
        density = np.array(counts) / total / width
        axes.stairs(density, edges, fill=True, color=color, alpha=0.3, linewidth=0)
        axes.stairs(density, edges, color=color, linewidth=1.2, label=f"{name}, {total:,}")
    axes.set_xlim(min(each.curves.edges[0] for each in models), max(each.curves.edges[-1] for each in models))
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("score")
    axes.set_ylabel("density")
    axes.legend(loc="upper center", ncols=2)


def _finish(axes: Axes, models: Sequence[ModelScores], x: str, y: str, corner: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(model.curves.far[0] for model in models), 1)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major")
    axes.set_axisbelow(True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if len(models) > 6:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif len(models) > 1:
        axes.legend(loc=corner)


def _style(index: int, theme: Theme) -> dict[str, str]:
    return {"color": theme.curves[index % len(theme.curves)], "linestyle": _DASHES[index // len(theme.curves) % len(_DASHES)]}


def _label(model: ModelScores) -> str:
    """For a legend: not too long, and no mathematics; a label that begins with an underscore would be left out."""
    text = model.label if len(model.label) <= _LABEL else f"…{model.label[1 - _LABEL :]}"
    return f" {text}".replace("$", r"\$")
