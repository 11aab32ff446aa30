"""Draw a figure twice, for a wide and for a narrow page, as SVG that can stand inside HTML."""

from __future__ import annotations

__all__ = [
    "CENTRAL_STYLE",
    "FEDERATED_STYLE",
    "INK",
    "LOCAL_STYLE",
    "MUTED",
    "STYLES",
    "Drawing",
    "SeriesStyle",
    "draw",
    "legend",
    "tidy",
]

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedbio.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 720, 328
"""Widths in CSS pixels: the page's column, and a phone of 360 pixels less its margins."""

INK, MUTED, GRID = "#1a1a1a", "#595959", "#e3e3e3"


@dataclass(frozen=True)
class SeriesStyle:
    """One of the three ways to train, told by colour (Okabe and Ito, safe for the colour-blind) and by marker."""

    label: str
    color: str
    marker: str


LOCAL_STYLE = SeriesStyle("alone", "#D55E00", "o")
FEDERATED_STYLE = SeriesStyle("federated", "#0072B2", "D")
CENTRAL_STYLE = SeriesStyle("all in one place", "#009E73", "^")
STYLES = (LOCAL_STYLE, FEDERATED_STYLE, CENTRAL_STYLE)

_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#8c8c8c",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page's own font is narrower, so that labels fit
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud, and takes the page's font
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Drawing:
    """A figure as two ``<svg>`` elements of which the page shows one."""

    wide: str
    narrow: str


def draw(
    name: str,
    title: str,
    paint: Callable[[Figure, bool], None],
    *,
    heights: tuple[float, float],
) -> Drawing:
    """Draw a figure for both widths.

    Parameters
    ----------
    name : str
        A word that is unique on the page; ids inside the SVG begin with it.
    title : str
        What a person hears who cannot see the figure.
    paint : callable
        ``paint(figure, narrow)`` draws on an empty matplotlib figure.
    heights : tuple of float
        Height of the wide and of the narrow figure in CSS pixels.

    Raises
    ------
    MachineError
        If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MachineError(
            f"the report's figures need {error.name or 'matplotlib'}, which is not installed; "
            "install it with: pip install 'fedbio[report]'"
        ) from error
    drawn = []
    for kind, width, height, size in (("wide", WIDE, heights[0], 12.5), ("narrow", NARROW, heights[1], 11.0)):
        rc: dict[Any, Any] = {
            **_RC,
            "font.size": size,
            "axes.titlesize": size,
            "legend.fontsize": size,
            "svg.hashsalt": name,
        }
        with matplotlib.rc_context(rc):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")  # an SVG unit is 1/72 inch
            FigureCanvasSVG(figure)
            paint(figure, kind == "narrow")
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None})
        drawn.append(_embeddable(buffer.getvalue(), prefix=f"{name}-{kind}", kind=kind, title=title))
    return Drawing(*drawn)


def _embeddable(svg: str, *, prefix: str, kind: str, title: str) -> str:
    """Cut a stand-alone SVG file down to an element with ids of its own, a title and short numbers."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"(?<![\w#])(\d+\.\d{3,})", lambda number: f"{float(number[1]):.2f}".rstrip("0").rstrip("."), body)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    view = re.search(r'viewBox="[^"]+"', body)
    assert view is not None
    said = html.escape(title)
    head = f'<svg class="{kind}" {view[0]} role="img" aria-label="{said}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + f"<title>{said}</title>" + body[body.index(">") + 1 :].strip()


def tidy(axes: Axes, *, grid: str = "y") -> None:
    """Keep grid lines along one axis only and drop the ticks' little lines."""
    axes.grid(visible=False)
    if grid in ("x", "y"):
        axes.grid(visible=True, axis=grid)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def legend(figure: Figure, styles: Sequence[SeriesStyle]) -> None:
    """Name the ways to train above the figure, in one line."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker=style.marker, ms=9, mec="white", lw=1.6, color=style.color, label=style.label)
        for style in styles
    ]
    figure.legend(handles=marks, loc="outside upper left", ncols=len(marks), handlelength=1.5, handletextpad=0.4,
                  columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
