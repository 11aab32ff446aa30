"""Figures of how well each compartment is told from the others."""

from __future__ import annotations

__all__ = ["confusion_plate", "scores_plate"]

from typing import TYPE_CHECKING

import numpy as np

from fedbio.report.drawing import CENTRAL_STYLE, FEDERATED_STYLE, INK, LOCAL_STYLE, MUTED, STYLES, draw, legend, tidy
from fedbio.report.plates import Plate, Table
from fedbio.report.study import Study
from fedbio.report.words import NONE, gain_with_interval, percent, with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def scores_plate(study: Study) -> Plate:
    """F1 of every class: alone, federated, central."""
    scores = study.class_scores

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        tidy(axes, grid="x")
        for place, score in enumerate(scores):
            found = [100 * each.value for each in (score.local, score.federated, score.central) if each is not None]
            if found:
                axes.plot([min(found), max(found)], [place, place], color="#c4c4c4", lw=2, zorder=1)
            else:
                axes.annotate(
                    "no test protein", (0, place), (6, 0), textcoords="offset points", va="center", color=MUTED
                )
        for style, kind, size in (  # federated last: it lies on top
            (CENTRAL_STYLE, "central", 8),
            (LOCAL_STYLE, "local", 9),
            (FEDERATED_STYLE, "federated", 8.5),
        ):
            for place, score in enumerate(scores):
                if (mean := getattr(score, kind)) is not None:
                    axes.plot(100 * mean.value, place, style.marker, ms=size, mec="white", color=style.color)
        axes.set_yticks(range(len(scores)), [f"{score.name} ({score.test_proteins})" for score in scores])
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("F1, %")
        kinds = zip(STYLES, ("local", "federated", "central"), strict=True)
        legend(figure, [style for style, kind in kinds if any(getattr(score, kind) for score in scores)])

    present = [score for score in scores if score.test_proteins]

    def macro(kind: str) -> str:
        values = [mean.value for score in present if (mean := getattr(score, kind)) is not None]
        return percent(float(np.mean(values))) if values else NONE

    rows = [
        [
            score.name,
            f"{score.test_proteins:,}",
            percent(score.local),
            with_interval(score.federated),
            percent(score.central),
            gain_with_interval(score.gain),
        ]
        for score in scores
    ]
    rows.append(
        ["mean (macro F1)", f"{study.test_proteins:,}", macro("local"), macro("federated"), macro("central"), NONE]
    )
    height = 90 + 30 * len(scores)
    return Plate(
        name="scores",
        drawing=draw("scores", "F1 of every compartment: alone, federated, and all data in one place", paint,
                     heights=(height, height)),
        caption=(
            f"F1 of each compartment (the harmonic mean of precision and recall) for the MLP {study.best}, mean over "
            f"seeds{'' if study.run.own else ' and, for training alone, over sites'}. In brackets: the number of test "
            "proteins; with few of them a score is uncertain, as the intervals in the table show."
        ),
        table=Table(
            "F1 by compartment, with 95 % intervals",
            ["Compartment", "Test proteins", "Alone", "Federated", "All in one place", "Gain, points"],
            rows,
        ),
    )  # fmt: skip


def confusion_plate(study: Study) -> Plate:
    """Where the federated model of the best MLP puts the proteins of each compartment."""
    classes = study.run.classes
    totals = study.confusion.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(study.confusion, totals, out=np.zeros_like(study.confusion), where=totals > 0)

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        tidy(axes, grid="")
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=115, edgecolors="white", linewidth=1.5)
        small = 8.0 if narrow else 11.0
        for row, column in np.argwhere(shares >= 0.5):
            share = shares[row, column]
            axes.text(column + 0.5, row + 0.5, f"{share:.0f}", ha="center", va="center", fontsize=small,
                      fontweight="bold" if row == column else "normal",
                      color="white" if share > 60 else INK)  # fmt: skip
        places = np.arange(len(classes)) + 0.5
        axes.set_xticks(places, classes, rotation=90 if narrow else 45, ha="center" if narrow else "right",
                        rotation_mode="default" if narrow else "anchor")  # fmt: skip
        axes.set_yticks(places, classes)
        axes.invert_yaxis()
        axes.set_xlabel("predicted by the federated model")
        axes.set_ylabel("true compartment")
        for spine in axes.spines.values():
            spine.set_visible(False)

    return Plate(
        name="confusion",
        drawing=draw("confusion", "Confusion matrix of the federated model", paint, heights=(560, 400)),
        caption=(
            f"Of 100 test proteins of the compartment on the left, how many the federated model (MLP {study.best}, "
            "mean over seeds) puts into each compartment below. The diagonal is right; shares under one half of a "
            "percent are left out."
        ),
        table=Table(
            "Test proteins by true (rows) and predicted (columns) compartment, mean over seeds",
            ["True compartment", *classes, "All"],
            [
                [name, *(f"{count:.1f}" if count else "0" for count in row), f"{row.sum():.0f}"]
                for name, row in zip(classes, study.confusion, strict=True)
            ],
        ),
    )
