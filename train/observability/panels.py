"""The kinds of panel that the dashboard is made of, as Grafana's own library builds them."""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_uppercase
from typing import TypeVar

from grafana_foundation_sdk.builders import common, heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models.common import BigValueTextMode, LegendDisplayMode, StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, DataTransformerConfig, Threshold, ThresholdsMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef("prometheus", "${datasource}")
_WIDTH, _HEIGHT = 24, 8  # of Grafana's grid, and of a graph on it
Panel = TypeVar("Panel", stat.Panel, timeseries.Panel, table.Panel, heatmap.Panel)
Query = tuple[str, str]  # PromQL, and what its series are called


def number(
    title: str, meaning: str, unit: str, *queries: Query, limits: dict[str, float | None] | None = None, decimals: int = 0
) -> stat.Panel:
    """A number as of now. ``limits``: color -> value from which on it has that color, the first one's None."""
    panel = _panel(stat.Panel(), title, meaning, unit, queries, now=True).span(4).height(_HEIGHT // 2)
    if unit == "none":
        panel.decimals(decimals)
    if any(name for _, name in queries):
        panel.text_mode(BigValueTextMode.VALUE_AND_NAME)  # of a single number Grafana leaves the name out otherwise
    colors = [Threshold(value, color) for color, value in (limits or {"text": None}).items()]
    return panel.thresholds(ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(colors))


def graph(title: str, meaning: str, unit: str, *queries: Query, width: int = _WIDTH // 3, stacked: bool = False) -> timeseries.Panel:
    """Curves over time. ``width``: of the 24 columns of a dashboard; ``stacked``: shares that add up to 1 at most."""
    panel = _panel(timeseries.Panel(), title, meaning, unit, queries).span(width).height(_HEIGHT)
    panel.legend(common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST))
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(50).max(1)
    return panel


def listing(title: str, meaning: str, unit: str, expr: str, value: str, width: int = _WIDTH // 2) -> table.Panel:
    """A line per series as of now, the highest first; ``value``: what its number is called."""
    hidden = dict.fromkeys(("Time", "__name__", "instance", "job", "run"), True)
    columns = DataTransformerConfig("organize", options={"excludeByName": hidden, "renameByName": {"Value": value}})
    panel = _panel(table.Panel(), title, meaning, unit, [(expr, "")], now=True, form=PromQueryFormat.TABLE).span(width).height(_HEIGHT)
    return panel.with_transformation(columns).sort_by([common.TableSortByFieldState().display_name(value).desc(True)])


def histogram(title: str, meaning: str, expr: str) -> heatmap.Panel:
    """How values spread, over time; ``expr``: the increase of a histogram's buckets by ``le``."""
    panel = _panel(heatmap.Panel(), title, meaning, "short", [(expr, "{{le}}")], form=PromQueryFormat.HEATMAP)
    return panel.span(_WIDTH // 3).height(_HEIGHT)


def _panel(
    panel: Panel,
    title: str,
    meaning: str,
    unit: str,
    queries: Iterable[Query],
    now: bool = False,
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Panel:
    """``panel`` with what all have. ``now``: one value instead of a curve."""
    panel.title(title).description(meaning).unit(unit).datasource(SOURCE)
    for ref, (expr, name) in zip(ascii_uppercase, queries, strict=False):
        query = Dataquery().ref_id(ref).expr(expr).legend_format(name).format(form)
        panel.with_target(query.instant() if now else query.range())
    return panel
