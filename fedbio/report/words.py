"""Put numbers into words: percentages, points, bytes, durations, and the sentence that opens the report."""

from __future__ import annotations

__all__ = [
    "NONE",
    "Verdict",
    "bytes_words",
    "duration",
    "encoder_words",
    "gain_with_interval",
    "headline_line",
    "how_many_sites",
    "interval",
    "named",
    "not_above_zero",
    "percent",
    "perplexity_words",
    "points",
    "verdict",
    "with_interval",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedbio.report.bootstrap import Estimate
from fedbio.report.study import Study
from fedbio.results import EncoderInfo

NONE = "–"
"""What a table shows where there is no number."""

MOST_NAMES = 6
"""The most names in a row."""


def encoder_words(encoder: EncoderInfo | None) -> str:
    """Return ``encoder esm1nv-mini, perplexity 11.20``, or nothing for nothing."""
    if encoder is None:
        return ""
    told = "untrained" if not encoder.trained else None
    if encoder.trained and encoder.perplexity is not None:
        told = f"perplexity {encoder.perplexity:.2f}"
    return f"encoder {encoder.name}" + (f", {told}" if told else "")


def perplexity_words(perplexity: float) -> str:
    """Say what a perplexity was measured on, since the number alone tells nothing."""
    return f"{perplexity:.2f} at masked residues of held-out proteins"


def named(parties: Sequence[str]) -> str:
    """Return names in a row; of many the first ones, and how many more there are.

    Examples
    --------
    >>> named(["server", "site-1"]), named([f"site-{number}" for number in range(1, 101)])
    ('server, site-1', 'site-1, site-2, site-3 and 97 more')
    """
    if len(parties) <= MOST_NAMES:
        return ", ".join(parties)
    return f"{', '.join(parties[:3])} and {len(parties) - 3} more"


def percent(estimate: Estimate | float | None, digits: int = 1) -> str:
    """Return ``71.3 %``, or a dash for nothing."""
    value = estimate.value if isinstance(estimate, Estimate) else estimate
    return NONE if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def points(estimate: Estimate | None) -> str:
    """Return a difference in percentage points with its sign, ``+12.4``, or a dash for nothing."""
    return NONE if estimate is None or math.isnan(estimate.value) else _signed(estimate.value)


def interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    """Return a 95 % interval in percent without the sign of percent, ``9.8 to 15.1``, or a dash for nothing."""
    if estimate is None or math.isnan(estimate.low):
        return NONE
    low, high = (_signed(end) if signed else f"{100 * end:.1f}" for end in (estimate.low, estimate.high))
    return f"{low} to {high}"


def with_interval(estimate: Estimate | None) -> str:
    """Return ``71.3 % (67.8 to 75.6)``, or a dash for nothing."""
    return NONE if estimate is None or math.isnan(estimate.value) else f"{percent(estimate)} ({interval(estimate)})"


def gain_with_interval(estimate: Estimate | None) -> str:
    """Return ``+12.4 (+9.8 to +15.1)``, or a dash for nothing."""
    if estimate is None or math.isnan(estimate.value):
        return NONE
    return f"{points(estimate)} ({interval(estimate, signed=True)})"


def not_above_zero(estimate: Estimate | None) -> str:
    """Return in how many resamples a gain was zero or less, ``3 of 2,000``, or a dash for nothing."""
    return NONE if estimate is None else f"{estimate.not_above_zero:,} of {estimate.resamples:,}"


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def bytes_words(count: float) -> str:
    """Return a number of bytes in human units of 1,000: ``214 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Return ``0.4 s``, ``58 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def how_many_sites(study: Study) -> str:
    """Return ``3 sites``: how many had classes to count, or else how many are here."""
    number = len(study.run.counts) or len(study.run.sites)
    return "1 site" if number == 1 else f"{number} sites"


@dataclass(frozen=True)
class Verdict:
    """The report's first words: a title and the paragraph below it."""

    title: str
    lead: str


def verdict(study: Study) -> Verdict:
    """Say what joining was worth, as strongly as the interval allows and no more."""
    best = study.accuracies[study.best]
    whom = f"For {study.run.sites[0].party}, joining" if study.run.own and study.run.sites else "Joining"
    together = percent(best.federated)
    tested = f"{study.test_proteins:,} test protein{'s' * (study.test_proteins != 1)}"
    first = (
        f"On {tested}, the classifier that {how_many_sites(study)} trained together (MLP {study.best}) places "
        f"{together} correctly (95 % interval {interval(best.federated)})"
    )
    if best.gain is None or best.local is None:
        return Verdict(
            f"Together: {together} of the test proteins placed correctly",
            f"{first}. No site here trained a classifier alone, so that what joining was worth is not known.",
        )
    alone = percent(best.local)
    against = f"{together} together against {alone} alone"
    size = f"{abs(100 * best.gain.value):.1f} points of accuracy"
    unclear = best.gain.low <= 0 <= best.gain.high
    if unclear:
        title = f"{whom} made no clear difference: {against}"
    else:
        title = f"{whom} {'was worth' if best.gain.value > 0 else 'cost'} {size}: {against}"
    trained = "the one that the site trained alone" if study.run.own else "one that a site trained alone"
    average = "" if study.run.own or len(best.sites) == 1 else " on average"
    doubt = (
        " The interval includes zero: on these test proteins, joining cannot be told from training alone."
        if unclear
        else ""
    )
    return Verdict(
        title,
        f"{first}; {trained} places {alone} correctly{average} ({interval(best.local)}). The difference is "
        f"{points(best.gain)} points (95 % interval {interval(best.gain, signed=True)}); it was zero or less in "
        f"{best.gain.not_above_zero:,} of {best.gain.resamples:,} resamples of the test proteins.{doubt}",
    )


def headline_line(study: Study) -> str:
    """Say what a run found, and with which encoder, in one line of plain text."""
    best = study.accuracies[study.best]
    how = "; ".join(filter(None, [f"MLP {study.best}", encoder_words(study.run.encoder)]))
    if best.gain is None or best.local is None:
        return f"federated {percent(best.federated)}, no site trained alone ({how})"
    low, high = (f"{100 * end:.1f}" for end in (best.gain.low, best.gain.high))
    unclear = ": no clear difference" if best.gain.low <= 0 <= best.gain.high else ""
    return (
        f"federated {percent(best.federated)} against {percent(best.local)} alone "
        f"(gain {100 * best.gain.value:.1f} points, 95 % interval {low} to {high}{unclear}; {how})"
    )
