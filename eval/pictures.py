"""How every report looks: pictures as PNG, on white for light pages and on near-black for dark ones, and the page that holds them."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INCHES, _DPI = (5.4, 3.0), 180  # small, so that text can be read on a phone


@dataclass(frozen=True)
class Theme:
    """Colors of a picture."""

    curves: tuple[str, ...]
    paper: str
    ink: str
    faint: str  # of grid and edges
    shade: str  # of every second stage
    alarm: str  # of skipped steps and restarts


# The curves' are those of Okabe and Ito, which people with any color vision can tell apart; brighter ones of them on dark paper.
_ON_LIGHT = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
_ON_DARK = ("#56B4E9", "#E69F00", "#2BC79A", "#E58FC0", "#7C9CFF", "#FF7A45", "#A9A9A9", "#F0E442")
LIGHT = Theme(_ON_LIGHT, "#ffffff", "#1f2328", "#d0d7de", "#eef1f5", "#c1121f")
DARK = Theme(_ON_DARK, "#161b22", "#e6edf3", "#3d444d", "#1f2630", "#ff7b72")


def picture(draw: Callable[[Axes], None], theme: Theme) -> bytes:
    """A PNG of 972 x 540 pixels, of what ``draw`` draws on its axes."""
    style = {
        "font.size": 10,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=theme.curves),
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.4,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor=theme.paper, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot(facecolor=theme.paper))
        file = io.BytesIO()
        figure.savefig(file, format="png", facecolor=theme.paper)
    return file.getvalue()


def embedded(title: str, light: bytes, dark: bytes) -> dict[str, str]:
    """A picture for a page that needs no other file: ``title``, and both PNGs in base64."""
    return {"title": title, **{name: base64.b64encode(png).decode() for name, png in (("light", light), ("dark", dark))}}


def page(template: Path, values: dict) -> str:
    """HTML from a template that extends ``page.html``, which shows ``title``; all values are escaped."""
    folders = [template.parent, Path(__file__).parent]
    return Environment(loader=FileSystemLoader(folders), autoescape=True).get_template(template.name).render(values)
