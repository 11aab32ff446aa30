"""Figures of what the sites have: who has which compartments, and the map of their embeddings."""

from __future__ import annotations

__all__ = ["counts_plate", "map_plate"]

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from fedbio.report.collect import natural
from fedbio.report.crowd import paint_counts
from fedbio.report.drawing import FEDERATED_STYLE, INK, MUTED, draw, tidy
from fedbio.report.plates import MANY_SITES, Plate, Table
from fedbio.report.study import Study
from fedbio.results import MapPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 9
ALL = "all sites"
MOST_VECTOR_POINTS = 2_500
"""Beyond this the map's points are one picture: smaller than so many vector marks."""

CLASS_COLORS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#AA4499",
    "#88CCEE",
    "#999933",
    "#882255",
    "#44AA99",
    "#661100",
    "#DDAA33",
)
"""P. Tol's muted scheme, safe for the colour-blind, and two more; markers tell classes apart too."""
CLASS_MARKERS = "oDs^vPX<>*"


def counts_plate(study: Study) -> Plate | None:
    """Who has which classes, as in Figure 6 of arXiv:2402.07792."""
    classes = study.run.classes
    trained = {site: counts.train for site, counts in study.run.counts.items()}
    totals = {name: sum(counts.get(name, 0) for counts in trained.values()) for name in classes}
    if not any(totals.values()):
        return None
    many = len(trained) > MANY_SITES
    shown = trained
    most = max(count for counts in shown.values() for count in (0, *counts.values())) or 1

    def paint(figure: Figure, narrow: bool) -> None:
        if many:
            return paint_counts(figure, classes, trained)
        axes = figure.add_subplot()
        tidy(axes)
        diameter = min(30.0, (175 if narrow else 480) / len(shown) * 0.6)
        numbered = len(shown) <= (4 if narrow else 8)
        for column, counts in enumerate(shown.values()):
            for row, name in enumerate(classes):
                count = counts.get(name, 0)
                size = diameter * (count / most) ** 0.5
                if count:
                    axes.plot(column, row, "o", ms=size, mew=0, color=FEDERATED_STYLE.color, alpha=0.75)
                if numbered:
                    axes.annotate(
                        f"{count:,}",
                        (column, row),
                        (size / 2 + 3, 0),
                        textcoords="offset points",
                        va="center",
                        color=INK if count else MUTED,
                    )
        axes.set_xticks(range(len(shown)), list(shown), rotation=0 if len(shown) <= 4 else 90)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(classes)), classes)
        axes.set_xlim(-0.5, len(shown) - 0.3)
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.spines[:].set_visible(False)
        return None

    gaps = {
        site: [name for name in classes if totals[name] and not counts.get(name)] for site, counts in trained.items()
    }
    lacking = [f"{site} has no {', '.join(names)}" for site, names in gaps.items() if names]
    shape = "the darker, the more; white is none" if many else "the area of a bubble is the count"
    return Plate(
        name="counts",
        drawing=draw(
            "counts",
            "Training proteins of each compartment at each site",
            paint,
            heights=(60 + 34 * len(classes), 50 + 32 * len(classes)),
        ),
        caption=(
            f"Training proteins of each compartment at each site (as Figure 6 of arXiv:2402.07792); {shape}. The more "
            "the columns differ, the less a site can learn alone about what others see."
            + (f" To train on, {'; '.join(lacking)}." if 0 < len(lacking) <= 4 else "")
        ),
        table=_counts_table(study, totals, turned=many),
    )


def _counts_table(study: Study, totals: dict[str, int], *, turned: bool) -> Table:
    """Return the counts with a column for each site, or, turned, a row for each."""
    title = "Proteins for training + for validation"
    sites = study.run.counts

    def cell(site: str, name: str) -> str:
        return f"{sites[site].train.get(name, 0):,} + {sites[site].validation.get(name, 0):,}"

    if turned:
        rows = [[site, *(cell(site, name) for name in totals)] for site in sites]
        return Table(
            title, ["Site", *totals], [["all, for training", *(f"{each:,}" for each in totals.values())], *rows]
        )
    return Table(
        title,
        ["Compartment", *sites, "All, for training"],
        [[name, *(cell(site, name) for site in sites), f"{total:,}"] for name, total in totals.items()],
    )


def map_plate(study: Study) -> Plate | None:
    """All sites' embeddings on one plane, where the sites allowed it."""
    by_site: dict[str, list[MapPoint]] = defaultdict(list)
    for point in study.run.points:
        by_site[point.site].append(point)
    if not by_site:
        return None
    sites = sorted(by_site, key=natural)
    for site in sites:  # test proteins may be the same at every site: who has what is seen on the others
        by_site[site] = [point for point in by_site[site] if point.split != "test"] or by_site[site]
    shown = sites
    if len(sites) > MOST_PANELS:
        # all of them in one panel, and those with the most points
        by_site[ALL] = [point for site in sites for point in by_site[site]]
        largest = sorted(sites, key=lambda site: -len(by_site[site]))[: MOST_PANELS - 1]
        shown = [ALL, *sorted(largest, key=natural)]
    as_picture = sum(len(by_site[site]) for site in shown) > MOST_VECTOR_POINTS

    def paint(figure: Figure, narrow: bool) -> None:
        columns = min(len(shown), 2 if narrow else 3)
        grid = figure.subplots(-(-len(shown) // columns), columns, sharex=True, sharey=True, squeeze=False)
        for axes, site in zip(grid.flat, shown, strict=False):
            panel(axes, site, 3.2 if narrow else 4.5)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(),
            loc="outside lower left",
            ncols=2 if narrow else 4,
            handletextpad=0.1,
            columnspacing=1.0,
            markerscale=1.8,
        )

    def panel(axes: Axes, site: str, size: float) -> None:
        tidy(axes, grid="")
        axes.set_title(site)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(visible=True, color="#d0d0d0")
        for number, name in enumerate(study.run.classes):
            here = [point for point in by_site[site] if point.target == name]
            axes.plot(
                [point.x for point in here],
                [point.y for point in here],
                CLASS_MARKERS[number % len(CLASS_MARKERS)],
                ms=size,
                mew=0.3,
                mec="white",
                color=CLASS_COLORS[number % len(CLASS_COLORS)],
                alpha=0.85,
                rasterized=as_picture,
                label=name,
            )

    def row(site: str) -> list[str]:
        middle = np.mean([(point.x, point.y) for point in by_site[site]], axis=0)
        return [site, f"{len(by_site[site]):,}", *(f"{value:.2f}" for value in middle)]

    rows_wide, rows_narrow = -(-len(shown) // 3), -(-len(shown) // 2)
    heights = (100 + 245 * rows_wide, 135 + 165 * rows_narrow) if len(shown) > 1 else (580, 430)
    return Plate(
        name="map",
        drawing=draw(
            "map",
            "Two-dimensional map of the embeddings, one panel per site, coloured by compartment",
            paint,
            heights=heights,
        ),
        caption=(
            "The sites' training proteins on one plane: the two directions in which all sites' embeddings vary most, "
            "found from sums that the sites sent. Clouds of one colour are what a classifier can use; a site's gaps "
            "are what it lacks."
            + (
                f" Beside all {len(sites)} sites together, the {len(shown) - 1} with the most points are shown."
                if ALL in shown
                else ""
            )
        ),
        table=Table("Points on the map", ["Site", "Points", "Mean x", "Mean y"], [row(site) for site in sites]),
    )
