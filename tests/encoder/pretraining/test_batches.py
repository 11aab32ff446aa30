"""Tests of windows, packs and their order."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.pretraining import batches
from fedbio.encoder.pretraining.batches import Packs, Place, mean_pack_tokens, pack_order, windows_of
from fedbio.encoder.pretraining.corpus import Inputs, Proteins, corpus_of
from fedbio.encoder.pretraining.feed import portions
from fedbio.encoder.pretraining.masking import Masker

from .conftest import write_proteins

MASKER = Masker("esm1nv", share=0.15, mask_token_share=0.8, random_share=0.1)


def packs_of(proteins: Proteins, seed: int = 0, budget: int = 256) -> Packs:
    return Packs(proteins, alphabet="esm1nv", masker=MASKER, max_residues=64, budget=budget, seed=seed)


@pytest.fixture
def corpus(tmp_path: Path) -> Proteins:
    path = write_proteins(tmp_path / "p.fasta", [10 + number % 37 for number in range(150)] + [64, 65, 300])
    return corpus_of(tmp_path / "corpus", Inputs(sources=[path], valid_fraction=0.0)).train


def test_windows_stay_inside_and_see_the_ends_as_often_as_half_the_middle() -> None:
    lengths = np.array([30] * 100 + [64] * 100 + [1_000] * 20_000)
    begins, sizes = windows_of(lengths, 64, np.random.default_rng(0))
    assert np.array_equal(sizes, np.minimum(lengths, 64))
    assert np.all(begins[:200] == 0)
    assert begins.min() == 0
    assert np.all(begins + sizes <= lengths)
    long = begins[200:]
    # 32 or 33 of 1,001 places lead to either end; 20,000 draws, five standard deviations are 127
    assert np.count_nonzero(long == 0) == pytest.approx(20_000 * 33 / 1_001, abs=127)
    assert np.count_nonzero(long == 936) == pytest.approx(20_000 * 33 / 1_001, abs=127)


def test_packs_hold_like_lengths_and_fill_the_budget() -> None:
    sizes = np.random.default_rng(0).integers(5, 60, 5_000)
    order, borders = pack_order(sizes, 256)
    assert sorted(order.tolist()) == list(range(5_000))
    tokens = [int((sizes[order[a:b]] + 2).sum()) for a, b in itertools.pairwise(borders)]
    spread = [int(np.ptp(sizes[order[a:b]])) for a, b in itertools.pairwise(borders)]
    assert max(tokens) <= 256
    assert np.mean(tokens) > 0.85 * 256
    assert max(spread) <= 1


def test_a_piece_longer_than_the_budget_is_a_pack_of_its_own() -> None:
    order, borders = pack_order(np.array([300, 10, 400]), 256)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(borders)] == [[1], [0], [2]]


def test_an_epoch_has_every_protein_once_and_the_next_is_another_order(corpus: Proteins) -> None:
    epochs: dict[int, list[int]] = {0: [], 1: []}
    for here, _, begins, _ in packs_of(corpus).places(Place()):
        if here.epoch == 2:
            break
        epochs[here.epoch] += np.searchsorted(corpus.ends, begins, side="right").tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, len(corpus) + 1))
    assert epochs[0] != epochs[1]


def test_the_stream_goes_on_from_any_place(corpus: Proteins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "STRETCH", 40)  # several stretches an epoch
    packs = packs_of(corpus)
    whole = list(itertools.islice(packs.places(Place()), 60))
    assert {here.epoch for here, *_ in whole} >= {0, 1}
    assert {here.stretch for here, *_ in whole} >= {0, 1, 2, 3}
    for number in range(59):
        here, _, begins, sizes = next(packs.places(whole[number][1]))
        expected = packs.batch(whole[number + 1][0], *whole[number + 1][2:])
        found = packs.batch(here, begins, sizes)
        assert here == whole[number + 1][0]
        assert found.tokens.equal(expected.tokens)
        assert found.places.equal(expected.places)


def test_seeds_differ(corpus: Proteins) -> None:
    first = next(packs_of(corpus, seed=0).places(Place()))[2]
    second = next(packs_of(corpus, seed=1).places(Place()))[2]
    assert first.tolist() != second.tolist()


def test_a_batch_holds_whole_proteins_between_start_and_end(corpus: Proteins) -> None:
    packs = packs_of(corpus)
    here, _, begins, sizes = next(packs.places(Place()))
    batch = packs.batch(here, begins, sizes)
    known = ALPHABETS["esm1nv"]
    tokens = batch.tokens.clone()
    tokens[batch.places] = batch.targets
    expected: list[int] = []
    for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
        expected += [known.start, *known.encode(corpus.residues[begin : begin + size].tobytes()).tolist(), known.end]
    assert tokens.tolist() == expected
    assert sum(count * length for count, length in batch.runs) == len(tokens)


def test_the_mean_of_packs_is_that_of_an_epoch(corpus: Proteins) -> None:
    epoch = itertools.takewhile(lambda each: each[0].epoch == 0, packs_of(corpus).places(Place()))
    tokens = [int((sizes + 2).sum()) for _, _, _, sizes in epoch]
    assert mean_pack_tokens(corpus, 64, 256) == pytest.approx(np.mean(tokens))


def test_two_processes_share_the_packs_of_an_update(corpus: Proteins) -> None:
    with portions(packs_of(corpus), Place(), packs_per_update=3) as whole:
        alone = [next(whole) for _ in range(4)]
    for rank in (0, 1):
        with portions(packs_of(corpus), Place(), packs_per_update=3, share=(rank, 2)) as part:
            for expected in alone:
                found = next(part)
                assert (found.tokens, found.after) == (expected.tokens, expected.after)
                wanted = expected.batches[rank::2]
                assert [each.tokens.tolist() for each in found.batches] == [each.tokens.tolist() for each in wanted]


def test_an_error_while_batches_are_made_reaches_the_caller(corpus: Proteins) -> None:
    packs = packs_of(Proteins(np.full_like(corpus.residues, ord("?")), corpus.ends))
    with (
        pytest.raises(Exception, match="not in the encoder's alphabet"),
        portions(packs, Place(), packs_per_update=1) as coming,
    ):
        next(coming)
