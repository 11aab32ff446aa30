"""Make one model of the updates of several sites, some of which may send nonsense.

Median and trimmed mean are those of Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates"; Krum is that of Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent". As in the papers every site counts the same: a weight is one more thing to lie about.
"""

from __future__ import annotations

__all__ = ["NormOutlier", "coordinate_median", "krum", "norm_outliers", "trimmed_mean"]

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import FederationError
from fedbio.federation.model import Parameters
from fedbio.tensors.combine import MEAN_DTYPE, Tensors, aligned, weighted_mean

Updates = Sequence[tuple[str, Parameters, float]]
"""Site, parameters and weight of each update, as `weighted_mean` takes them."""

TABLE_VALUES = 1 << 18
"""Values looked at a time, of all sites together: a table of float64 that a core's L2 cache about holds."""


def coordinate_median(updates: Updates) -> Parameters:
    """Return the median of every coordinate over the sites (Yin et al. 2018, Definition 1).

    As long as fewer than half of the sites send nonsense, every value lies within the range of the others' values.

    Parameters
    ----------
    updates : sequence of (site, parameters, weight)
        In any order; weights are not looked at. A value that is not a number counts as the largest.

    Returns
    -------
    dict of str to ndarray, dtype=np.float32
        Of an even number of sites, the mean of the two middle values.

    Raises
    ------
    ProtocolError
        If a site's names or shapes differ from the first one's.
    """
    low, high = (len(updates) - 1) // 2, len(updates) // 2

    def median(values: NDArray[np.float64], out: NDArray[Any]) -> None:
        values.sort(axis=0)
        out[:] = (values[low] + values[high]) / 2

    return _by_coordinate(updates, median)


def trimmed_mean(updates: Updates, trim: float) -> Parameters:
    """Return the mean of every coordinate without its largest and smallest values (Yin et al. 2018, Definition 2).

    As long as no more sites send nonsense than are left out at one end, every value lies within the range of the
    others'.

    Parameters
    ----------
    updates : sequence of (site, parameters, weight)
        In any order; weights are not looked at. A value that is not a number counts as the largest.
    trim : float
        Share of the sites to leave out at each end, rounded down, but at least one site unless it is 0: of three sites
        a share of 0.2 would else protect from nothing.

    Returns
    -------
    dict of str to ndarray, dtype=np.float32

    Raises
    ------
    FederationError
        If nothing would be left.
    ProtocolError
        If a site's names or shapes differ from the first one's.
    """
    count = len(updates)
    # a hair more: 0.29 * 100 is 28.999999999999996
    cut = max(1, math.floor(trim * count + 1e-9)) if trim else 0
    if updates and 2 * cut >= count:
        raise FederationError(
            f"trimmed_mean: {count} update(s) came, and nothing is left without {cut} at each end; lower trim (now "
            f"{trim:g}), or wait for more sites with a higher min_sites"
        )

    def mean(values: NDArray[np.float64], out: NDArray[Any]) -> None:
        values.sort(axis=0)
        out[:] = values[cut : count - cut].sum(axis=0) / (count - 2 * cut)

    return _by_coordinate(updates, mean)


def krum(updates: Updates, byzantine: int) -> Parameters:
    """Return the one update that is nearest to its neighbours (Blanchard et al. 2017, section 4).

    The score of an update is the sum of the squared distances to its ``n - byzantine - 2`` nearest others; the lowest
    wins, the first by name of equals. Integer tensors are no part of the distance: a counter of batches would outweigh
    all parameters.

    Parameters
    ----------
    updates : sequence of (site, parameters, weight)
        In any order; weights are not looked at.
    byzantine : int
        How many sites may send nonsense.

    Returns
    -------
    dict of str to ndarray, dtype=np.float32

    Raises
    ------
    FederationError
        If there are fewer than ``2 * byzantine + 3`` updates, or no update has enough others at a finite distance.
    ProtocolError
        If a site's names or shapes differ from the first one's.
    """
    ordered, needed = aligned(updates), 2 * byzantine + 3
    count = len(ordered)
    if count < needed:
        raise FederationError(
            f"krum: {count} update(s) came, and {needed} are needed to withstand {byzantine} site(s) that send "
            "nonsense; lower byzantine, or wait for more sites with a higher min_sites"
        )
    distances = np.zeros((count, count))
    with np.errstate(over="ignore", invalid="ignore"):
        for _, _, values in _tables(ordered, _floating(ordered)):
            for site in range(count - 1):
                change = values[site + 1 :] - values[site]
                # without BLAS, whose sums may depend on the number of threads
                distances[site, site + 1 :] += np.einsum("ij,ij->i", change, change)
    distances += distances.T
    # what is no number is far away
    distances[np.isnan(distances)] = np.inf
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, : count - byzantine - 2].sum(axis=1)
    best = int(scores.argmin())
    if not np.isfinite(scores[best]):
        raise FederationError(
            f"krum: no update is near {count - byzantine - 2} others: more than {byzantine} site(s) sent values that "
            "are not finite; look at the sites' logs"
        )
    winner, chosen, _ = ordered[best]
    return weighted_mean([(winner, chosen, 1.0)])


class NormOutlier(NamedTuple):
    """A site whose change is too long, and the numbers that say so."""

    site: str
    norm: float
    median: float
    bound: float

    @property
    def reason(self) -> str:
        """Why the site's update may not count, for people."""
        return (
            f"its change has norm {self.norm:.4g}, more than {self.bound:g} times {self.median:.4g}, the median of all "
            "sites; look at the site's data and learning rate, or raise norm_bound"
        )


def norm_outliers(base: Parameters | None, updates: Updates, bound: float) -> list[NormOutlier]:
    """Return the sites whose change's L2 norm is more than `bound` times the median of all sites' norms.

    Two updates tell nothing about each other: the median lies between them. Integer tensors are no part of the norm: a
    counter of batches would outweigh all parameters.

    Parameters
    ----------
    base : dict of str to ndarray, or None
        The model that the sites were sent; None if updates are differences.
    updates : sequence of (site, parameters, weight)
        In any order; weights are not looked at. Tensors may be fewer than the model's.
    bound : float

    Returns
    -------
    list of NormOutlier
        Sorted by site. A norm that is not finite is always one.

    Raises
    ------
    ProtocolError
        If a site's names or shapes differ from the first one's.
    """
    ordered = aligned(updates)
    squares = np.zeros(len(ordered))
    with np.errstate(over="ignore", invalid="ignore"):
        for name, part, values in _tables(ordered, _floating(ordered)):
            if base is not None:
                values -= base[name].reshape(-1)[part]
            squares += np.einsum("ij,ij->i", values, values)
    norms = np.sqrt(squares)
    norms[np.isnan(norms)] = np.inf
    middle = np.sort(norms)[[(len(norms) - 1) // 2, len(norms) // 2]]
    median = float(middle.mean())
    return [
        NormOutlier(site, norm, median, bound)
        for (site, _, _), norm in zip(ordered, norms.tolist(), strict=True)
        if norm > bound * median or math.isinf(norm)
    ]


def _by_coordinate(updates: Updates, combine: Callable[[NDArray[np.float64], NDArray[Any]], None]) -> Parameters:
    """Have `combine` write to each run of the result what it makes of the sites' values, of shape (sites, run)."""
    ordered = aligned(updates)
    combined = {name: np.empty(tensor.shape, MEAN_DTYPE) for name, tensor in ordered[0][1].items()}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, part, values in _tables(ordered, combined):
            combine(values, combined[name].reshape(-1)[part])
    return combined


def _floating(ordered: Sequence[tuple[str, Tensors, float]]) -> list[str]:
    """Return the names of the tensors that no site sent as integers."""
    return [name for name in ordered[0][1] if all(tensors[name].dtype.kind == "f" for _, tensors, _ in ordered)]


def _tables(
    ordered: Sequence[tuple[str, Tensors, float]], names: Iterable[str]
) -> Iterator[tuple[str, slice, NDArray[np.float64]]]:
    """Yield name, run and the sites' values in it, shape (sites, run): one piece of memory, filled again and again."""
    width = max(1, TABLE_VALUES // len(ordered))
    table = np.empty((len(ordered), width))
    for name in names:
        flat = [tensors[name].reshape(-1) for _, tensors, _ in ordered]
        for begin in range(0, flat[0].size, width):
            part = slice(begin, min(begin + width, flat[0].size))
            values = table[:, : part.stop - part.start]
            for row, tensor in zip(values, flat, strict=True):
                row[:] = tensor[part]
            yield name, part, values
