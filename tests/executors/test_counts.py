"""The executor that counts, on real FASTA files."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.compartments import COMPARTMENTS
from fedbio.errors import DataError, ProtocolError
from fedbio.executors import registry
from fedbio.executors.statistics import CountProteins
from fedbio.federation import FLModel, SiteContext, Task
from fedbio.federation.policy import Policy
from fedbio.federation.workflows.counting import SPLITS, Counted, CountSpec
from fedbio.federation.workflows.study import meta, read_meta
from fedbio.proteins import Protein, write_fasta
from fedbio.proteins.demo import generate
from fedbio.results import EventLog, PartyRecord

BINS = (100, 200, 400)


@pytest.fixture
def count(tmp_path: Path) -> Callable[..., tuple[Counted, PartyRecord]]:
    """Count the proteins of a FASTA file as a site does."""

    def run(proteins: Any, *, bins: tuple[int, ...] = BINS, least: int = 5, **options: Any) -> Any:
        path = tmp_path / "own.fasta"
        write_fasta(proteins, path)
        events, record = EventLog(tmp_path, "site-1"), PartyRecord("site-1", "site")
        context = SiteContext(site="site-1", workspace=tmp_path, data=path, record=record, events=events, **options)
        model = FLModel(meta=meta(CountSpec(COMPARTMENTS, bins, least)))
        try:
            answer = CountProteins().execute(Task(name="count", model=model), model, context)
        finally:
            events.close()
        assert not answer.params
        assert not answer.metrics
        return read_meta(answer.meta, Counted), record

    return run


def flat(counted: Counted) -> list[int | None]:
    return [count for row in counted.classes for count in row]


def many(number: int, **options: Any) -> list[Protein]:
    return [Protein(f"{options} {number} {place}".replace(" ", ""), "MA" * 20, **options) for place in range(number)]


def test_counts_by_class_split_and_length(count: Any) -> None:
    proteins = list(generate(400, seed=3))
    counted, _ = count(proteins, least=1)
    by_class = Counter((each.target, "validation" if each.validation else each.set) for each in proteins)
    for row, name in enumerate(COMPARTMENTS):
        # with min_count 1, what is held back is nothing
        assert [number or 0 for number in counted.classes[row]] == [by_class[name, split] for split in SPLITS]
    lengths = np.array([len(each.sequence) for each in proteins])
    expected = np.histogram(lengths, bins=[1, *(end + 1 for end in BINS), 10**9])[0]
    assert [number or 0 for number in counted.lengths] == expected.tolist()
    assert sum(expected) == 400


def test_a_protein_as_long_as_a_bin_ends_is_in_it(count: Any) -> None:
    proteins = [Protein(f"p{length}", "A" * length, "Nucleus") for length in (1, 10, 11, 20, 21)]
    counted, _ = count(proteins, bins=(10, 20), least=1)
    assert counted.lengths == [2, 2, 1]


def test_proteins_without_a_label_have_a_row_of_their_own(count: Any) -> None:
    counted, _ = count([*many(7), *many(3, target="Nucleus", set="test")], least=1)
    assert counted.classes[-1] == [7, None, None]
    assert counted.classes[COMPARTMENTS.index("Nucleus")] == [None, None, 3]


def test_no_count_below_the_minimum_leaves_and_the_site_says_how_many(count: Any) -> None:
    proteins = [*many(4, target="Nucleus"), *many(90, target="Cytoplasm"), *many(120, target="Plastid", set="test")]
    counted, record = count(proteins)
    told = [number for number in flat(counted) if number is not None]
    # one of the two large ones hides the small ones: 31 x 4 = 124 is not in reach of one, so both are held back
    assert told == []
    assert counted.lengths == [None] * 4
    assert record.remarks == [
        "site-1 held back 33 of 33 counts by class and split and 4 of 4 by length: those below 5, and others "
        "that would give them away."
    ]


def test_a_job_cannot_get_below_the_minimum_of_the_site(count: Any, tmp_path: Path) -> None:
    proteins = [*many(12, target="Nucleus"), *many(9, target="Cytoplasm"), *many(2_000, target="Plastid", set="test")]
    open_to_all, _ = count(proteins, least=1)
    # Nucleus and Cytoplasm could be told, as far as the job goes
    assert {9, 12} < set(flat(open_to_all))
    counted, record = count(proteins, least=1, policy=Policy(min_count=10))
    assert all(number is None or number >= 10 for number in [*flat(counted), *counted.lengths])
    assert 9 not in flat(counted)
    assert counted.min_count == 10
    assert "those below 10" in record.remarks[-1]
    said = [line for line in (tmp_path / "events.jsonl").read_text().splitlines() if "minimum raised" in line]
    assert "the policy of site-1 lets no count below 10 leave; the job asks for 1" in said[-1]
    # one that asks for more gets no less
    counted, _ = count(proteins, least=11, policy=Policy(min_count=10))
    assert counted.min_count == 11


def test_what_is_told_does_not_give_the_rest_away_with_the_number_of_proteins(count: Any) -> None:
    proteins = [each for number, name in enumerate(COMPARTMENTS) for each in many(40 + number, target=name)]
    proteins += many(2, target="Nucleus", set="test")
    counted, _ = count(proteins, bins=(50,))
    told = [number for number in flat(counted) if number is not None]
    assert told
    assert set(told) <= {40 + number for number in range(10)}
    # the 23 small counts are anything from 0 to 4 each, and those held back with them make up for it
    hidden = [40 + number for number in range(10) if 40 + number not in told]
    assert sum(each - 5 for each in hidden) >= 23 * 4
    # all lengths are in one bin, the other is empty: both are held back, or the number of proteins would be told
    assert counted.lengths == [None, None]


def test_labels_beside_the_file_are_joined(count: Any, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("id,target,set\n" + "".join(f"p{place},Plastid,test\n" for place in range(6)))
    proteins = [Protein(f"p{place}", "MAKL") for place in range(6)]
    write_fasta(proteins, tmp_path / "bare.fasta")
    bare = (tmp_path / "bare.fasta").read_text().replace(" SET=train", "").replace(" VALIDATION=False", "")
    context = SiteContext(
        site="site-1",
        workspace=tmp_path,
        data=tmp_path / "bare.fasta",
        labels=labels,
        record=PartyRecord("site-1", "site"),
        events=EventLog(tmp_path, "site-1"),
    )
    context.data.write_text(bare)
    model = FLModel(meta=meta(CountSpec(COMPARTMENTS, BINS, 1)))
    counted = read_meta(CountProteins().execute(Task(name="count", model=model), model, context).meta, Counted)
    context.events.close()
    assert counted.classes[COMPARTMENTS.index("Plastid")] == [None, None, 6]


def test_unknown_label_is_refused(count: Any) -> None:
    with pytest.raises(DataError, match="Cell_wall"):
        count([Protein("p1", "MAKL", "Cell wall")])


@pytest.mark.parametrize(("bins", "least"), [((), 5), ((0,), 5), ((20, 10), 5), ((10, 10), 5), ((10,), 0)])
def test_server_that_asks_for_nonsense_is_refused(count: Any, bins: tuple[int, ...], least: int) -> None:
    with pytest.raises(ProtocolError, match=r"ascend|at most"):
        count(many(6), bins=bins, least=least)


def test_memory_does_not_grow_with_the_residues(count: Any) -> None:
    def proteins() -> Any:
        for place in range(400):
            yield Protein(f"p{place}", "MAKLV" * 6000)

    tracemalloc.start()
    try:
        counted, _ = count(proteins())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counted.lengths == [None] * 4
    # 12 MB of residues
    assert peak < 3_000_000


def test_every_site_knows_the_task() -> None:
    executor = registry()["count"]
    assert (executor.kind, executor.leaves) == ("statistics", "counts")
