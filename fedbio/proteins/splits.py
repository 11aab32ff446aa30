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
    `MIN_VALIDATION` validation proteins (or an equal share, if that is less) then receives proteins, one at a time,
    from the largest class of the site that has most: no draw leaves a site empty.
    """
    if alpha <= 0:
        raise DataError(f"alpha is {alpha}; a Dirichlet distribution needs alpha > 0")
    generator = np.random.default_rng(seed)
    labels = [protein.target or "" for protein in proteins]
    shares = {name: generator.dirichlet(np.full(len(sites), alpha)) for name in sorted(set(labels))}
    owner: dict[int, int] = {}
    for validation, minimum in ((False, MIN_TRAIN), (True, MIN_VALIDATION)):
        by_class: dict[str, list[int]] = defaultdict(list)
        for index in _shared(proteins, validation):
            by_class[labels[index]].append(index)
        part: dict[int, int] = {}
        for name in sorted(by_class):
            shuffled = generator.permutation(by_class[name])
            bounds = np.rint(np.cumsum(shares[name]) * len(shuffled)).astype(int)
            for site, members in enumerate(np.split(shuffled, bounds[:-1])):
                part.update((int(index), site) for index in members)
        _fill_up(part, labels, len(sites), minimum)
        owner |= part
    return _collect(proteins, sites, owner)


def partition_iid(proteins: Sequence[Protein], sites: Sequence[str], *, seed: int) -> dict[str, list[Protein]]:
    """Share proteins out evenly and at random, so that the sites are alike; otherwise as `partition`."""
    generator = np.random.default_rng(seed)
    owner: dict[int, int] = {}
    for validation in (False, True):
        shuffled = generator.permutation(np.array(_shared(proteins, validation), dtype=np.int64))
        owner.update((int(index), position % len(sites)) for position, index in enumerate(shuffled))
    return _collect(proteins, sites, owner)


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
    owner = {index: home[column[protein.id]] for index, protein in enumerate(kept) if protein.set == "train"}
    return _collect(kept, sites, owner)


def sample(proteins: Sequence[Protein], count: int, seed: int) -> list[Protein]:
    """Take `count` proteins at random that keep the proportions of classes and of train, validation and test.

    Parameters
    ----------
    proteins : sequence of Protein
    count : int
        All are taken if there are no more than that.
    seed : int

    Returns
    -------
    list of Protein
        In the order of `proteins`. Each combination of class and split keeps at least one protein where `count` allows.
    """
    if count >= len(proteins):
        return list(proteins)
    strata: dict[tuple[str, str, bool], list[int]] = defaultdict(list)
    for index, protein in enumerate(proteins):
        strata[protein.target or "", protein.set, protein.validation].append(index)
    names = sorted(strata)
    exact = np.array([len(strata[name]) for name in names]) * count / len(proteins)
    quotas = np.floor(exact).astype(int)
    if count >= len(names):
        quotas = np.maximum(quotas, 1)
    while quotas.sum() < count:
        quotas[np.argmax(exact - quotas)] += 1
    while quotas.sum() > count:
        quotas[np.argmax(quotas - exact - (quotas <= 1) * len(proteins))] -= 1
    generator = np.random.default_rng(seed)
    chosen = [
        generator.choice(strata[name], quota, replace=False) for name, quota in zip(names, quotas, strict=True) if quota
    ]
    return [proteins[index] for index in np.sort(np.concatenate(chosen))] if chosen else []


def _shared(proteins: Sequence[Protein], validation: bool) -> list[int]:
    """Return the positions of the proteins that belong to one site: train or, if asked, validation proteins."""
    return [i for i, protein in enumerate(proteins) if protein.set == "train" and protein.validation == validation]


def _fill_up(owner: dict[int, int], labels: Sequence[str], sites: int, minimum: int) -> None:
    """Move proteins, in place, from the fullest site to the emptiest until all have their minimum."""
    members: list[list[int]] = [[] for _ in range(sites)]
    for index in sorted(owner):
        members[owner[index]].append(index)
    floor = min(minimum, len(owner) // sites)
    while len(emptiest := min(members, key=len)) < floor:
        fullest = max(members, key=len)
        frequency = Counter(labels[index] for index in fullest)
        moved = max(fullest, key=lambda index: (frequency[labels[index]], labels[index], index))
        fullest.remove(moved)
        emptiest.append(moved)
    for site, indices in enumerate(members):
        owner.update(dict.fromkeys(indices, site))


def _collect(proteins: Sequence[Protein], sites: Sequence[str], owner: Mapping[int, int]) -> dict[str, list[Protein]]:
    if len(set(sites)) != len(sites) or not sites:
        raise DataError(f"sites {', '.join(map(repr, sites))}: needs at least one, each with its own name")
    train = sum(not proteins[index].validation for index in owner)
    if train < len(sites):
        raise DataError(
            f"{train} training proteins cannot be shared among {len(sites)} sites; use fewer sites or more proteins"
        )
    return {
        name: [protein for i, protein in enumerate(proteins) if protein.set == "test" or owner.get(i) == position]
        for position, name in enumerate(sites)
    }
