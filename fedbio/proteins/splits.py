"""Share proteins out among sites, and take a smaller set that looks like the whole.

Every test protein goes to every site, so that all sites are measured on the same proteins. Only train and validation
proteins are shared out; each belongs to one site.
"""

from __future__ import annotations

__all__ = ["MIN_TRAIN", "MIN_VALIDATION", "partition", "partition_by", "partition_iid", "sample"]

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from fedbio.errors import DataError
from fedbio.proteins.protein import Protein

MIN_TRAIN = 10
MIN_VALIDATION = 2
"""What every site gets at least, as far as there are enough proteins for all sites."""


def partition(
    proteins: Sequence[Protein], sites: Sequence[str], *, alpha: float, seed: int
) -> dict[str, list[Protein]]:
    """Share proteins out by class: for each class the shares of the sites are drawn from Dirichlet(alpha).

    Parameters
    ----------
    proteins : sequence of Protein
    sites : sequence of str
        The sites' names.
    alpha : float
        Small values give each site its own classes, 100 makes the sites alike.
    seed : int

    Returns
    -------
    dict of str to list of Protein
        By site, in the order of `proteins`, with all test proteins at every site.

    Raises
    ------
    DataError
        If there are fewer training proteins than sites.

    Notes
    -----
    Train and validation proteins of a class follow the same shares. A site left with fewer than `MIN_TRAIN` train or
    `MIN_VALIDATION` validation proteins (or an equal share, if that is less) then receives proteins, one at a time, from
    the largest class of the site that has most: no draw leaves a site empty.
    """
    if alpha <= 0:
        raise DataError(f"alpha is {alpha}; a Dirichlet distribution needs alpha > 0")
    generator = np.random.default_rng(seed)
    classes = sorted({protein.target or "" for protein in proteins if protein.set == "train"})
    shares = {name: generator.dirichlet(np.full(len(sites), alpha)) for name in classes}

    def assign(members: list[int]) -> list[int]:
        owner = {}
        by_class = defaultdict(list)
        for index in members:
            by_class[proteins[index].target or ""].append(index)
        for name in sorted(by_class):
            shuffled = generator.permutation(by_class[name])
            bounds = np.rint(np.cumsum(shares[name]) * len(shuffled)).astype(int)
            for site, part in enumerate(np.split(shuffled, bounds[:-1])):
                owner.update((int(index), site) for index in part)
        return [owner[index] for index in members]

    return _share_out(proteins, sites, assign)


def partition_iid(proteins: Sequence[Protein], sites: Sequence[str], *, seed: int) -> dict[str, list[Protein]]:
    """Share proteins out evenly and at random, so that the sites are alike; otherwise as `partition`."""
    generator = np.random.default_rng(seed)

    def assign(members: list[int]) -> list[int]:
        dealt = np.arange(len(members)) % len(sites)
        return [int(site) for site in generator.permutation(dealt)]

    return _share_out(proteins, sites, assign)


def partition_by(
    proteins: Sequence[Protein], sites: Sequence[str], *, column: Mapping[str, str], source: str = "the table"
) -> dict[str, list[Protein]]:
    """Share proteins out by a property, such as the kingdom: proteins with one value stay together.

    Parameters
    ----------
    proteins : sequence of Protein
    sites : sequence of str
    column : mapping of str to str
        The value of each protein, by id.
    source : str
        Where the values come from, for messages.

    Returns
    -------
    dict of str to list of Protein
        As `partition`. The most frequent value goes to the first site; with more values than sites, each further value
        goes to the site that has fewest proteins so far. Train proteins without a value are left out.

    Raises
    ------
    DataError
        If there are fewer values than sites.
    """
    kept = [protein for protein in proteins if protein.set == "test" or protein.id in column]
    values = Counter(column[protein.id] for protein in kept if protein.set == "train")
    if len(values) < len(sites):
        raise DataError(
            f"{source}: {len(values)} values ({', '.join(sorted(values))}) cannot make {len(sites)} sites; "
            f"ask for at most {len(values)} sites"
        )
    load = [0] * len(sites)
    home = {}
    for value, number in sorted(values.items(), key=lambda item: (-item[1], item[0])):
        home[value] = load.index(min(load))
        load[home[value]] += number
    return _collect(kept, sites, {i: home[column[p.id]] for i, p in enumerate(kept) if p.set == "train"})


def _share_out(proteins: Sequence[Protein], sites: Sequence[str], assign: object) -> dict[str, list[Protein]]:
    raise NotImplementedError
