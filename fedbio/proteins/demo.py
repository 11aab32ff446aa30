"""Make labelled demo proteins: synthetic, short, built from published sorting signals, in families of homologues.

A family begins with an ancestor: a chain of residues drawn with the composition of its compartment, with that
compartment's sorting signals and membrane helices written into it (`fedbio.proteins.demo_biology` has the tables and
their sources). Its members descend from it by substitutions that follow BLOSUM62 and by short deletions and
duplications; signals' key residues are kept. A whole family goes to train, validation or test, so that the test set
has no near relatives in training.

The proteins are **shortened**: about 100 residues (50 to 200) where natural ones have 400, so that a processor
without accelerator embeds them in seconds. They are made to show the workflow; nothing about biology can be learned
from them that was not put in.
"""

from __future__ import annotations

__all__ = ["LONGEST", "SHORTEST", "generate"]

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedbio.errors import DataError
from fedbio.proteins.demo_biology import (
    BASIC,
    BLOSUM62,
    CLASS_COUNTS,
    COMPOSITIONS,
    ENDS,
    HELIX,
    MOTIFS,
    PLANS,
    RESIDUES,
    STARTS,
    Plan,
    Region,
)
from fedbio.proteins.protein import Protein

SHORTEST, LONGEST = 50, 200
SHORTEST_BODY = 30
"""What remains between the signals at both ends, room for a membrane helix."""

MEDIAN_LENGTH, LENGTH_SPREAD = 95.0, 0.3
"""Lengths are log-normal between the bounds."""

EASIEST_CONTRAST = 6.0
"""How far a compartment's composition stands out at difficulty 0, in logarithms, against nature's 1. Natural chains
are four times longer, and a classifier sees thousands of them; with several hundred short ones, nature's contrast would
teach next to nothing."""

FAMILY_SPREAD = 0.15
"""Standard deviation of the log frequencies of residues between families of one compartment."""

MEAN_FAMILY = 3.0
LARGEST_FAMILY = 12
DIVERGENCE = (0.10, 0.45)
"""Share of residues that are substituted between an ancestor and a member."""

BATCH = 20_000
"""Proteins made at once; a fixed part of the recipe, since each batch has a random stream of its own."""

Codes = NDArray[np.uint8]
Integers = NDArray[np.int64]
_LETTERS = np.frombuffer(RESIDUES.encode(), dtype=np.uint8)
_CODE = {letter: code for code, letter in enumerate(RESIDUES)}


def generate(
    count: int,
    *,
    seed: int,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    difficulty: float = 0.3,
) -> Iterator[Protein]:
    """Yield labelled synthetic proteins; the same arguments give the same proteins.

    Parameters
    ----------
    count : int
        How many; any number from 1.
    seed : int
    test_fraction, validation_fraction : float
        Share of the proteins of each class in the test set and, for validation, in training; whole families, so the
        shares are approximate in small sets.
    difficulty : float
        From 0 (each compartment has a composition much its own) to 1 (all have the same, only signals differ).
        Logistic regression on residue frequencies, trained on 630 proteins, is right for about 82 % at 0, 73 % at 0.3
        (66 % on the average of three sites that train alone, Dirichlet with alpha 1) and 45 % at 1.

    Yields
    ------
    Protein
        Named ``F<family>.<member>``, in random order; classes in the proportions of DeepLoc.

    Raises
    ------
    DataError
        If a number is out of its range.
    """
    if count < 1:
        raise DataError(f"{count} demo proteins cannot be made; ask for at least 1")
    if not 0 <= difficulty <= 1:
        raise DataError(f"difficulty is {difficulty}; allowed is 0 to 1")
    if min(test_fraction, validation_fraction) < 0 or test_fraction + validation_fraction >= 1:
        raise DataError(
            f"test fraction {test_fraction} and validation fraction {validation_fraction} leave nothing to train on; "
            "both are at least 0 and together below 1"
        )
    families = 0
    for number, first in enumerate(range(0, count, BATCH)):
        random = np.random.default_rng([seed, number])
        batch = _Families.draw(min(BATCH, count - first), random, test_fraction, validation_fraction)
        ancestors = _ancestors(batch, random, difficulty)
        yield from _members(batch, ancestors, random, families)
        families += len(batch.sizes)


@dataclass(slots=True)
class _Families:
    """F families: the class, the number of members and the split of each."""

    classes: Integers  # (F,) index into the sorted class names
    sizes: Integers  # (F,)
    splits: Integers  # (F,) 0 train, 1 validation, 2 test

    @classmethod
    def draw(
        cls, count: int, random: np.random.Generator, test_fraction: float, validation_fraction: float
    ) -> _Families:
        """Divide `count` proteins into classes, the classes into families, and the families into splits."""
        classes, sizes, splits = [], [], []
        for index, members in enumerate(_quotas(count, np.array(list(CLASS_COUNTS.values())))):
            if members == 0:
                continue
            drawn = np.minimum(random.geometric(1 / MEAN_FAMILY, members), LARGEST_FAMILY)
            ends = np.minimum(np.cumsum(drawn), members)
            ends = ends[: np.searchsorted(ends, members) + 1]
            own = np.diff(ends, prepend=0)
            # a family belongs where its middle lies on the class's axis from test over validation to train
            middle = (ends - own / 2) / members
            split = np.where(middle < test_fraction, 2, np.where(middle < test_fraction + validation_fraction, 1, 0))
            if test_fraction > 0 and len(own) > 1:
                split[0] = 2
            classes.append(np.full(len(own), index))
            sizes.append(own)
            splits.append(split)
        return cls(np.concatenate(classes), np.concatenate(sizes), np.concatenate(splits))


def _quotas(count: int, weights: NDArray[np.int64]) -> Integers:
    """Divide `count` in proportion to `weights`, by largest remainder."""
    exact = count * weights / weights.sum()
    quotas: Integers = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: count - quotas.sum()]] += 1
    return quotas


@dataclass(slots=True)
class _Chains:
    """N chains under construction, as codes of `RESIDUES` in rows of `LONGEST`."""

    codes: Codes  # (N, LONGEST)
    kept: NDArray[np.bool_]  # (N, LONGEST) True where evolution changes nothing
    length: Integers  # (N,)
    body_start: Integers  # (N,) where the chain behind the start signal begins
    body_end: Integers  # (N,) where the end signal begins

    def take(self, rows: Integers) -> _Chains:
        return _Chains(self.codes[rows], self.kept[rows], self.length[rows], self.body_start[rows], self.body_end[rows])

    def put(self, rows: Integers, chains: _Chains) -> None:
        self.codes[rows], self.kept[rows], self.length[rows] = chains.codes, chains.kept, chains.length
        self.body_start[rows], self.body_end[rows] = chains.body_start, chains.body_end

    def paint(self, start: Integers, size: Integers, region: Region, random: np.random.Generator) -> None:
        """Fill `size` residues from `start` with letters of the region's pool, its motif at the end of them."""
        stop = start + size
        low, high = int(np.where(size > 0, start, LONGEST).min()), int(np.where(size > 0, stop, 0).max())
        if low >= high:
            return
        offset = np.arange(low, high) - start[:, None]
        inside = (offset >= 0) & (offset < size[:, None])
        drawn = _pool(region.letters)[random.integers(0, len(region.letters), inside.shape)]
        if region.other:
            other = _pool(region.other)[random.integers(0, len(region.other), inside.shape)]
            drawn = np.where(np.cos(np.deg2rad(100.0 * offset)) > 0, drawn, other)
        view = self.codes[:, low:high]
        view[inside] = drawn[inside]
        if region.motif:
            self.stamp(stop - len(region.motif.split()), region.motif, random, present=size > 0)

    def stamp(self, start: Integers, motif: str, random: np.random.Generator, *, present: NDArray[np.bool_]) -> None:
        """Write a motif at `start` into the rows where it is `present`, and keep it from evolving."""
        rows = np.flatnonzero(present)
        for offset, letters in enumerate(motif.split()):
            if letters != "x":
                columns = start[rows] + offset
                self.codes[rows, columns] = _pool(letters)[random.integers(0, len(letters), len(rows))]
                self.kept[rows, columns] = True


def _pool(letters: str) -> Codes:
    return np.array([_CODE[letter] for letter in letters], dtype=np.uint8)


def _ancestors(families: _Families, random: np.random.Generator, difficulty: float) -> _Chains:
    """Make one ancestor per family."""
    n = len(families.sizes)
    length = np.exp(random.normal(np.log(MEDIAN_LENGTH), LENGTH_SPREAD, n)).astype(np.int64).clip(SHORTEST, LONGEST)
    chains = _Chains(
        _background(families.classes, random, difficulty),
        np.zeros((n, LONGEST), dtype=np.bool_),
        length,
        np.ones(n, dtype=np.int64),
        length.copy(),
    )
    for index, name in enumerate(CLASS_COUNTS):
        plans = PLANS[name]
        rows = np.flatnonzero(families.classes == index)
        shares = np.array([plan.share for plan in plans])
        chosen = random.permutation(np.repeat(np.arange(len(plans)), _quotas(len(rows), shares)))
        for position, plan in enumerate(plans):
            group = rows[chosen == position]
            if len(group):
                built = chains.take(group)
                _build(built, plan, random)
                chains.put(group, built)
    chains.codes[:, 0] = _CODE["M"]
    chains.kept[:, 0] = True
    return chains


def _background(classes: Integers, random: np.random.Generator, difficulty: float) -> Codes:
    """Draw (F, LONGEST) residues, each row with the composition of a family of its class."""
    own = np.log(np.array([COMPOSITIONS[name] for name in CLASS_COUNTS], dtype=float))
    common = np.log(np.array(list(COMPOSITIONS.values())).mean(axis=0))
    logits = common + EASIEST_CONTRAST * (1 - difficulty) * (own - common)
    weights = np.exp(logits[classes] + random.normal(0, FAMILY_SPREAD, (len(classes), len(RESIDUES))))
    bounds = (np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True) * 65_536).astype(np.uint32)
    drawn = random.integers(0, 65_536, (len(classes), LONGEST), dtype=np.uint16)
    codes = np.zeros(drawn.shape, dtype=np.uint8)
    for code in range(len(RESIDUES) - 1):
        codes += drawn >= bounds[:, code, None]
    return codes


def _build(chains: _Chains, plan: Plan, random: np.random.Generator) -> None:
    """Write the signals and helices of a plan into chains that all follow it."""
    n = len(chains.length)

    def sizes(region: Region) -> Integers:
        return random.integers(region.shortest, region.longest + 1, n)

    at = np.ones(n, dtype=np.int64)
    for region in STARTS.get(plan.start, ()):
        size = sizes(region)
        chains.paint(at, size, region, random)
        at = at + size
    chains.body_start = at
    ends = [(region, sizes(region)) for region in ENDS.get(plan.end, ())]
    end_size = sum((size for _, size in ends), np.zeros(n, dtype=np.int64))
    chains.length = np.maximum(chains.length, chains.body_start + SHORTEST_BODY + end_size)
    at = chains.body_end = chains.length - end_size
    for region, size in ends:
        chains.paint(at, size, region, random)
        at = at + size
    _write_helices(chains, plan.helices, random)
    for name in plan.motifs:
        motif = MOTIFS[name][random.integers(len(MOTIFS[name]))]
        room = chains.body_end - chains.body_start - len(motif.split())
        start = chains.body_start + (random.random(n) * np.maximum(room, 0)).astype(np.int64)
        chains.stamp(start, motif, random, present=room >= 0)


def _write_helices(chains: _Chains, wanted: tuple[int, int], random: np.random.Generator) -> None:
    """Spread membrane helices over the body, each with its positive flank on the inner side.

    The positive-inside rule: von Heijne 1989, Nature 341:456.
    """
    if wanted[1] == 0:
        return
    n = len(chains.length)
    body = chains.body_end - chains.body_start
    number = np.minimum(random.integers(wanted[0], wanted[1] + 1, n), np.maximum(body // 28, 1))
    slot = body // number
    for turn in range(wanted[1]):
        present = turn < number
        size = np.where(present, np.minimum(random.integers(19, 24, n), slot - 4), 0)
        start = chains.body_start + turn * slot + (random.random(n) * np.maximum(slot - size - 4, 0)).astype(np.int64)
        flank = np.where(present, 4, 0)
        before = turn % 2 == 0
        chains.paint(start + (4 if before else 0), size, Region(19, 23, HELIX), random)
        chains.paint(start if before else start + size, flank, Region(4, 4, BASIC), random)


def _substitutions() -> Codes:
    """Return (20, 1024): a row of residues that replace each residue, as often as BLOSUM62 says."""
    scores = np.array([[int(score) for score in row.split()] for row in BLOSUM62], dtype=float)
    frequencies = np.array(list(COMPOSITIONS.values())).mean(axis=0)
    odds = frequencies * np.exp2(scores / 2)
    np.fill_diagonal(odds, 0)
    return np.stack([np.repeat(np.arange(20), _quotas(1024, (row * 1e6).astype(np.int64))) for row in odds]).astype(
        np.uint8
    )


_SUBSTITUTE = _substitutions()


def _members(
    families: _Families, ancestors: _Chains, random: np.random.Generator, first_family: int
) -> Iterator[Protein]:
    """Let every family's members descend from its ancestor, and yield all of them in random order."""
    parent = np.repeat(np.arange(len(families.sizes)), families.sizes)
    member = np.arange(len(parent)) - np.repeat(np.cumsum(families.sizes) - families.sizes, families.sizes)
    order = random.permutation(len(parent))
    parent, member = parent[order], member[order]
    codes, length = _descend(ancestors.take(parent), random)
    inside = np.arange(LONGEST) < length[:, None]
    residues = _LETTERS[codes[inside]].tobytes().decode()
    names = tuple(CLASS_COUNTS)
    targets = [names[index] for index in families.classes[parent]]
    stops = np.cumsum(length).tolist()
    start = 0
    for family, number, target, split, stop in zip(
        (parent + first_family).tolist(), member.tolist(), targets, families.splits[parent].tolist(), stops, strict=True
    ):
        yield Protein(
            f"F{family:07d}.{number}", residues[start:stop], target, "test" if split == 2 else "train", split == 1
        )
        start = stop


def _descend(chains: _Chains, random: np.random.Generator) -> tuple[Codes, Integers]:
    """Return the codes and lengths of chains after one indel in half of them and substitutions in all."""
    n = len(chains.length)
    size = random.integers(1, 5, n) * (random.random(n) < 0.5)
    size *= chains.body_end - chains.body_start > 10
    deletes = random.random(n) < 0.5
    deletes &= chains.length - size >= SHORTEST
    size[~deletes & (chains.length + size > LONGEST)] = 0
    # a deletion skips `size` residues of the body; a duplication goes back by `size` and repeats them
    shift = np.where(deletes, size, -size)
    room = np.maximum(chains.body_end - chains.body_start - size, 1)
    at = chains.body_start + (random.random(n) * room).astype(np.int64) + np.where(deletes, 0, size)
    column = np.arange(LONGEST, dtype=np.int32)
    source = column + np.where(column >= at[:, None], shift[:, None], 0).astype(np.int32)
    flat = (np.arange(n, dtype=np.int32) * LONGEST)[:, None] + source.clip(0, LONGEST - 1)
    codes, kept = chains.codes.ravel()[flat], chains.kept.ravel()[flat]
    rate = (random.uniform(*DIVERGENCE, n) * 256).astype(np.uint8)
    changed = np.flatnonzero((random.integers(0, 256, codes.shape, dtype=np.uint8) < rate[:, None]) & ~kept)
    new = codes.ravel()
    new[changed] = _SUBSTITUTE[new[changed], random.integers(0, 1024, len(changed), dtype=np.uint16)]
    return codes, chains.length - shift
