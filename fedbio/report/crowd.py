"""Draw more sites than can be told apart: all of them, as one shape."""

from __future__ import annotations

__all__ = ["paint_band", "paint_counts", "paint_gains"]

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedbio.report.bootstrap import Estimate
from fedbio.report.drawing import FEDERATED_STYLE, LOCAL_STYLE, MUTED, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 8
"""The most sites that are named at an axis."""


def paint_gains(figure: Figure, gains: Sequence[tuple[str, Estimate]]) -> None:
    """Draw every site's gain with its interval, from the smallest to the largest."""
    ordered = sorted((each for _, each in gains), key=lambda gain: gain.value)
    places = np.arange(1, len(ordered) + 1)
    axes = figure.add_subplot()
    tidy(axes)
    axes.axhline(0, color=MUTED, lw=1.2)
    lows, highs = ([100 * getattr(gain, end) for gain in ordered] for end in ("low", "high"))
    axes.vlines(places, lows, highs, color=FEDERATED_STYLE.color, lw=max(0.6, 240 / len(ordered) * 0.5), alpha=0.35)
    axes.plot(places, [100 * gain.value for gain in ordered], ".", ms=4, mew=0, color=FEDERATED_STYLE.color)
    axes.set_xlim(0, len(ordered) + 1)
    axes.set_xlabel("sites, from the smallest gain to the largest")
    axes.set_ylabel("gain, points")


def paint_counts(figure: Figure, classes: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> None:
    """Draw the counts of all sites as a picture: a column for each site, a row for each class."""
    found = np.array([[each.get(name, 0) for each in counts.values()] for name in classes])
    axes = figure.add_subplot()
    tidy(axes, grid="")
    image = axes.imshow(
        np.ma.masked_equal(found, 0), aspect="auto", cmap="Blues", vmin=-0.15 * found.max(), interpolation="nearest"
    )
    names = list(counts)
    shown = np.unique(np.linspace(0, len(names) - 1, NAMED).round().astype(int))
    axes.set_xticks(shown, [names[place] for place in shown], rotation=45, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(classes)), classes)
    bar = figure.colorbar(image, ax=axes, pad=0.02, label="training proteins")
    bar.ax.set_ylim(0, found.max())
    axes.spines[:].set(visible=True, color="#d0d0d0")


def paint_band(axes: Axes, curves: Sequence[Mapping[int, float]]) -> None:
    """Draw many curves as their median and the range of the middle eight tenths."""
    rounds = sorted({number for curve in curves for number in curve})
    last: list[NDArray[Any]] = []
    for number in rounds:
        # one that has stopped stays where it was
        reached = [curve[max(each for each in curve if each <= number)] for curve in curves if min(curve) <= number]
        last.append(100 * np.percentile(reached, (10, 50, 90)))
    low, middle, high = np.array(last).T
    axes.fill_between(rounds, low, high, color=LOCAL_STYLE.color, alpha=0.2, lw=0)
    axes.plot(rounds, middle, color=LOCAL_STYLE.color, lw=1.6)
