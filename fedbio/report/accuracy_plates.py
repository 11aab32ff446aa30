"""Figures of how well the classifiers did: by size, by site, and round by round."""

from __future__ import annotations

__all__ = ["accuracy_plate", "curves_plate", "gain_plate"]

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from fedbio.report.bootstrap import Estimate
from fedbio.report.collect import natural
from fedbio.report.crowd import paint_band, paint_gains
from fedbio.report.drawing import (
    CENTRAL_STYLE,
    FEDERATED_STYLE,
    LOCAL_STYLE,
    MUTED,
    STYLES,
    SeriesStyle,
    draw,
    legend,
    tidy,
)
from fedbio.report.plates import MANY_SITES, Plate, Table
from fedbio.report.study import Accuracy, Study
from fedbio.report.words import NONE, gain_with_interval, not_above_zero, percent, with_interval
from fedbio.results import CENTRAL, FEDERATED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _style(party: str) -> SeriesStyle:
    return {FEDERATED: FEDERATED_STYLE, CENTRAL: CENTRAL_STYLE}.get(party, LOCAL_STYLE)


def _mean(accuracy: Accuracy, style: SeriesStyle) -> Estimate | None:
    return {LOCAL_STYLE: accuracy.local, FEDERATED_STYLE: accuracy.federated}.get(style, accuracy.central)


def _scores(accuracy: Accuracy, style: SeriesStyle) -> list[float]:
    """Every trained classifier of one kind: its test accuracy in percent."""
    return [
        100 * score
        for party, by_seed in accuracy.scores.items()
        if _style(party) is style
        for score in by_seed.values()
    ]


def _broken(model: str) -> str:
    """Break an MLP's name into two lines where it is long."""
    parts = model.split("-")
    return model if len(parts) < 3 else "-".join(parts[:-2]) + "-\n" + "-".join(parts[-2:])


def accuracy_plate(study: Study) -> Plate:
    """Accuracy on the test proteins by size of the classifier, as in Figure 9 of arXiv:2402.07792."""
    accuracies = list(study.accuracies.values())
    majority = 100 * accuracies[0].majority.value

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        tidy(axes)
        for style, offset in zip(STYLES, (-0.24, 0.0, 0.24), strict=True):
            for place, accuracy in enumerate(accuracies):
                scores = _scores(accuracy, style)
                jitter = np.linspace(-0.07, 0.07, len(scores)) if len(scores) > 1 else np.zeros(len(scores))
                axes.plot(place + offset + jitter, scores, style.marker, ms=4, mew=0, color=style.color, alpha=0.4)
            means = [
                (place + offset, mean)
                for place, accuracy in enumerate(accuracies)
                if (mean := _mean(accuracy, style)) is not None
            ]
            x, y = [place for place, _ in means], [100 * mean.value for _, mean in means]
            axes.plot(x, y, color=style.color, lw=1, alpha=0.5)
            axes.vlines(x, [100 * mean.low for _, mean in means], [100 * mean.high for _, mean in means],
                        color=style.color, lw=1.8)  # fmt: skip
            axes.plot(x, y, style.marker, ms=8 if narrow else 9, mec="white", color=style.color)
        axes.axhline(majority, color=MUTED, lw=1.2, ls=(0, (4, 3)))
        axes.annotate(
            f"always “{study.majority_class}”: {majority:.1f} %",
            (len(accuracies) - 0.55, majority),
            (0, 4),
            textcoords="offset points",
            color=MUTED,
            ha="right",
        )
        names = [_broken(each.model) if narrow or len(accuracies) > 5 else each.model for each in accuracies]
        axes.set_xticks(range(len(accuracies)), names)
        axes.set_xlim(-0.5, len(accuracies) - 0.5)
        axes.set_xlabel("hidden layers of the classifier")
        axes.set_ylabel("test accuracy, %")
        axes.margins(y=0.08)
        legend(figure, [style for style in STYLES if any(_mean(accuracy, style) for accuracy in accuracies)])

    def row(accuracy: Accuracy) -> list[str]:
        spread = _scores(accuracy, LOCAL_STYLE)
        return [
            accuracy.model + (" (best)" if accuracy.model == study.best else ""),
            f"{accuracy.weights:,}",
            with_interval(accuracy.local),
            f"{min(spread):.1f} to {max(spread):.1f}" if spread else NONE,
            with_interval(accuracy.federated),
            with_interval(accuracy.central),
            gain_with_interval(accuracy.gain),
            not_above_zero(accuracy.gain),
        ]

    several = f"one per site and seed; {len(study.seeds)} seeds"
    seeds = several if len(study.seeds) > 1 else "one per site; a single seed"
    return Plate(
        name="accuracy",
        drawing=draw(
            "accuracy",
            "Test accuracy by size of the classifier: trained alone, federated, and on all data in one place",
            paint,
            heights=(350, 380),
        ),
        caption=(
            "Share of test proteins placed in the right compartment, by size of the classifier (as Figure 9 of "
            f"arXiv:2402.07792). Each small mark is one trained classifier ({seeds}); the large marks are means with "
            "95 % intervals over test proteins. The dashed line is what always answering "
            f"“{study.majority_class}” reaches."
        ),
        table=Table(
            "Test accuracy by classifier, with 95 % intervals",
            ["MLP", "Weights", "Alone, mean", "Alone, lowest to highest", "Federated", "All in one place",
             "Gain, points", "Resamples with gain ≤ 0"],
            [row(accuracy) for accuracy in accuracies],
        ),
    )  # fmt: skip


def gain_plate(study: Study) -> Plate | None:
    """What each site gained, for the best MLP."""
    best = study.accuracies[study.best]
    if not best.sites:
        return None
    if len(best.sites) > MANY_SITES:
        return _gain_of_many(study, best)
    shown = list(best.sites.items())

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        tidy(axes, grid="x")
        for place, (_, (own, federated, gain)) in enumerate(shown):
            left, right = 100 * own.value, 100 * federated.value
            axes.plot([left, right], [place, place], color="#b0b0b0", lw=2, zorder=1)
            axes.plot(left, place, LOCAL_STYLE.marker, ms=10, mec="white", color=LOCAL_STYLE.color)
            axes.plot(right, place, FEDERATED_STYLE.marker, ms=9, mec="white", color=FEDERATED_STYLE.color)
            axes.annotate(
                gain_with_interval(gain).replace(" (", "\n(" if narrow else " points ("),
                (max(left, right), place),
                (9, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        low, high = axes.get_xlim()
        axes.set_xlim(low - 1, high + max(high - low, 4) * (0.75 if narrow else 0.5))
        axes.set_xlabel("test accuracy, %")
        legend(figure, [LOCAL_STYLE, FEDERATED_STYLE])

    height = 105 + 40 * len(shown)
    return Plate(
        name="gain",
        drawing=draw(
            "gain",
            "Test accuracy of each site's own classifier and of the federated one",
            paint,
            heights=(height, height),
        ),
        caption=(
            f"Each site's own classifier against the federated one on the same test proteins (MLP {study.best}, mean "
            "over seeds). The numbers are the gain in percentage points with its 95 % interval."
        ),
        table=_gain_table(study, best),
    )


def _gain_of_many(study: Study, best: Accuracy) -> Plate:
    gains = [(name, each.gain) for name, each in best.sites.items()]
    sure = sum(gain.low > 0 for _, gain in gains), sum(gain.high < 0 for _, gain in gains)
    return Plate(
        name="gain",
        drawing=draw(
            "gain",
            "Gain of every site, from the smallest to the largest",
            lambda figure, narrow: paint_gains(figure, gains),
            heights=(330, 300),
        ),
        caption=(
            f"What each of the {len(gains)} sites gained: the federated classifier less its own one, on the same test "
            f"proteins (MLP {study.best}, mean over seeds), with 95 % intervals, in order of size. The interval lies "
            f"above zero for {sure[0]} sites and below it for {sure[1]}. The table names them."
        ),
        table=_gain_table(study, best),
    )


def _gain_table(study: Study, best: Accuracy) -> Table:
    trained = {name: sum(counts.train.values()) for name, counts in study.run.counts.items()}
    return Table(
        "Gain of each site, with 95 % intervals",
        ["Site", "Training proteins", "Alone", "Federated", "Gain, points", "Resamples with gain ≤ 0"],
        [
            [
                name,
                f"{trained[name]:,}" if name in trained else NONE,
                with_interval(own),
                with_interval(federated),
                gain_with_interval(gain),
                not_above_zero(gain),
            ]
            for name, (own, federated, gain) in best.sites.items()
        ],
    )


def curves_plate(study: Study) -> Plate | None:
    """Validation accuracy round by round, one panel per MLP."""
    curves: dict[str, dict[str, dict[int, dict[int, float]]]] = defaultdict(lambda: defaultdict(dict))
    kept: dict[tuple[str, str, int], int] = {
        (CENTRAL if party.role == "central" else FEDERATED, model, int(seed)): best_round
        for party in study.run.parties
        for model, by_seed in party.rounds.items()
        for seed, best_round in by_seed.items()
    }
    told = {FEDERATED, CENTRAL, *(site.party for site in study.run.sites)}  # a site's own report is about that site
    for metric in study.run.metrics:
        if metric.party not in told:
            continue
        if metric.split == "test":
            kept[metric.party, metric.model, metric.seed] = metric.round
        elif (metric.split, metric.metric) == ("validation", "accuracy") and metric.model in study.accuracies:
            curves[metric.model][metric.party].setdefault(metric.seed, {})[metric.round] = metric.value
    models = [model for model in study.accuracies if model in curves]
    if not models:
        return None
    parties = {party for model in models for party in curves[model]}
    many = sum(_style(party) is LOCAL_STYLE for party in parties) > MANY_SITES

    def paint(figure: Figure, narrow: bool) -> None:
        columns = 1 if narrow or len(models) == 1 else 2
        grid = figure.subplots(-(-len(models) // columns), columns, sharex=True, sharey=True, squeeze=False)
        for axes, model in zip(grid.flat, models, strict=False):
            panel(axes, model)
        for axes in grid.flat[len(models) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("round")
        for axes in grid[:, 0]:
            axes.set_ylabel("validation\naccuracy, %")
        legend(figure, [style for style in STYLES if any(_style(party) is style for party in parties)])

    def panel(axes: Axes, model: str) -> None:
        tidy(axes)
        axes.set_title(model)
        # sites first, so that the few federated lines lie on top of the many local ones
        shown = sorted(curves[model], key=lambda party: (party == FEDERATED, party == CENTRAL))
        if many:
            paint_band(
                axes,
                [each for party in shown if _style(party) is LOCAL_STYLE for each in curves[model][party].values()],
            )
            shown = [party for party in shown if _style(party) is not LOCAL_STYLE]
        for party in shown:
            style = _style(party)
            local = style is LOCAL_STYLE
            for seed, by_round in curves[model][party].items():
                rounds = sorted(by_round)
                axes.plot(rounds, [100 * by_round[number] for number in rounds], color=style.color,
                          lw=0.9 if local else 1.6, alpha=0.45 if local else 0.85)  # fmt: skip
                best = kept.get((party, model, seed))
                if best in by_round:
                    axes.plot(best, 100 * by_round[best], style.marker, ms=4.5 if local else 7, mec="white", mew=0.6,
                              color=style.color, alpha=0.7 if local else 1, zorder=4)  # fmt: skip

    def row(model: str, party: str) -> list[str]:
        seeds = sorted(curves[model][party])
        return [
            model,
            party,
            ", ".join(str(max(curves[model][party][seed])) for seed in seeds),
            ", ".join(str(kept.get((party, model, seed), NONE)) for seed in seeds),
            percent(float(np.mean([max(curves[model][party][seed].values()) for seed in seeds]))),
        ]

    lines = -(-len(models) // (1 if len(models) == 1 else 2))
    lone = "" if study.run.own or many else " and, for training alone, per site"
    band = (
        " Training alone is drawn for all sites together: the median, and the range of all but the highest and the "
        "lowest tenth."
        if many
        else ""
    )
    return Plate(
        name="curves",
        drawing=draw(
            "curves",
            "Validation accuracy by round for each classifier",
            paint,
            heights=(70 + 220 * lines, 70 + 185 * len(models)),
        ),
        caption=(
            f"Accuracy on validation proteins after each round, one line per seed{lone}; a mark is the round that was "
            f"kept.{band} A site that trains alone is validated on its own proteins only, so that lines of different "
            "kinds can be compared only roughly: the test accuracies above are the fair comparison."
        ),
        table=Table(
            "Rounds, one number per seed",
            ["MLP", "Trained by", "Last round", "Round kept", "Best validation accuracy, mean"],
            [row(model, party) for model in models for party in sorted(curves[model], key=natural)],
        ),
    )
