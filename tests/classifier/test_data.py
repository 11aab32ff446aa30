from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedbio.classifier import TrainData, load_site_data, merge_sites
from fedbio.errors import DataError
from fedbio.proteins import Protein
from fedbio.results import ClassCounts, EncoderInfo

WriteSite = Callable[..., tuple[Path, Path]]
Classes = tuple[str, ...]


def test_proteins_meet_their_embeddings_and_classes(
    write_site: WriteSite, proteins: list[Protein], classes: Classes, blobs: Callable[..., TrainData]
) -> None:
    fasta, store = write_site("site-1", proteins)
    data = load_site_data(fasta, store, classes)
    everything = blobs(90)
    for part, size in ((data.train, 65), (data.validation, 7), (data.test, 18)):
        places = [int(name[1:]) for name in part.ids]
        assert len(part) == size
        assert np.array_equal(part.features, everything.features[places])
        assert part.targets.tolist() == everything.targets[places].tolist()
    assert data.test.ids == tuple(f"p{number}" for number in range(18))
    assert data.describe().proteins == 90
    assert data.describe().residues == 90 * 33
    assert data.counts.test == {"Cytoplasm": 6, "Extracellular": 6, "Nucleus": 6}


def test_flags_of_the_file_make_the_validation_set(
    write_site: WriteSite, proteins: list[Protein], classes: Classes
) -> None:
    proteins[20] = dataclasses.replace(proteins[20], validation=True)
    data = load_site_data(*write_site("site-1", proteins), classes, validation_fraction=0.5)
    assert data.validation.ids == ("p20",)


def test_without_flags_a_share_of_each_class_is_held_back_whatever_the_order(
    write_site: WriteSite, proteins: list[Protein], classes: Classes
) -> None:
    data = load_site_data(*write_site("site-1", proteins), classes, validation_fraction=0.25)
    again = load_site_data(*write_site("site-2", proteins[::-1]), classes, validation_fraction=0.25)
    assert data.counts.validation == {"Cytoplasm": 6, "Extracellular": 6, "Nucleus": 6}
    assert data.counts.train == {"Cytoplasm": 18, "Extracellular": 18, "Nucleus": 18}
    assert set(data.validation.ids) == set(again.validation.ids)


def test_equal_sequences_are_held_back_together(
    write_site: WriteSite, proteins: list[Protein], classes: Classes
) -> None:
    twins = [dataclasses.replace(each, id=f"{each.id}-twin") for each in proteins]
    data = load_site_data(*write_site("site-1", proteins + twins), classes, validation_fraction=0.3)
    held_back = {name.removesuffix("-twin") for name in data.validation.ids}
    assert len(data.validation) == 2 * len(held_back) == 44


@pytest.mark.parametrize(("count", "validation"), [(1, 0), (2, 1), (3, 1)])
def test_a_few_proteins_leave_some_to_train_on(
    write_site: WriteSite, proteins: list[Protein], classes: Classes, count: int, validation: int
) -> None:
    data = load_site_data(*write_site("site-1", proteins[18 : 18 + count]), classes, validation_fraction=0.9)
    assert (len(data.train), len(data.validation), len(data.test)) == (count - validation, validation, 0)
    assert data.test.features.shape == (0, 16)


def test_a_share_of_0_holds_nothing_back(write_site: WriteSite, proteins: list[Protein], classes: Classes) -> None:
    assert len(load_site_data(*write_site("site-1", proteins), classes, validation_fraction=0).validation) == 0


def test_a_missing_embedding_is_named_with_the_remedy(
    write_site: WriteSite, proteins: list[Protein], classes: Classes
) -> None:
    _, store = write_site("some", proteins[:80])
    fasta, _ = write_site("all", proteins)
    with pytest.raises(DataError, match=r"some\.h5: \d+ of \d+ proteins have no embedding.*embed the file"):
        load_site_data(fasta, store, classes)


def test_an_embedding_of_another_sequence_is_refused(
    write_site: WriteSite, proteins: list[Protein], classes: Classes
) -> None:
    _, store = write_site("old", proteins)
    proteins[7] = dataclasses.replace(proteins[7], sequence="MKV")
    fasta, _ = write_site("new", proteins)
    with pytest.raises(DataError, match=r"old\.h5: record 'p7': the embedding is that of another sequence"):
        load_site_data(fasta, store, classes)


def test_a_class_that_the_federation_does_not_know_is_refused_with_the_nearest(
    write_site: WriteSite, proteins: list[Protein], classes: Classes
) -> None:
    fasta, store = write_site("site-1", proteins)
    with pytest.raises(DataError, match=r"site-1\.fasta:1: .*'Cytoplasm'.*did you mean 'Cytoplasmatic'"):
        load_site_data(fasta, store, ("Cytoplasmatic", *classes[1:]))


def test_a_protein_without_a_label_is_refused(write_site: WriteSite, proteins: list[Protein], classes: Classes) -> None:
    proteins[3] = dataclasses.replace(proteins[3], target=None)
    with pytest.raises(DataError, match=r"site-1\.fasta:\d+: record 'p3': has no label"):
        load_site_data(*write_site("site-1", proteins), classes)


def test_a_class_that_the_site_lacks_keeps_its_number(
    write_site: WriteSite, proteins: list[Protein], classes: Classes
) -> None:
    data = load_site_data(*write_site("site-1", proteins[18:80]), ("Peroxisome", *classes))
    assert data.counts.train.keys() == set(classes)
    assert set(data.train.targets.tolist()) == {1, 2, 3}


def test_merged_sites_count_a_protein_once(write_site: WriteSite, proteins: list[Protein], classes: Classes) -> None:
    first = load_site_data(*write_site("site-1", proteins[:60]), classes)
    second = load_site_data(*write_site("site-2", proteins[:18] + proteins[60:]), classes)
    merged = merge_sites([first, second])
    assert len(merged.test) == 18
    assert len(merged.train) == len(first.train) + len(second.train)
    assert set(merged.validation.ids) == {*first.validation.ids, *second.validation.ids}
    assert merged.describe().proteins == len(merged) == 90
    assert merged.source == "site-1.fasta, site-2.fasta"
    assert sum(sum(part.values()) for part in msgspec.to_builtins(merged.counts).values()) == 90
    assert isinstance(merged.counts, ClassCounts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set": "train"}, r"site-1\.fasta: record 'p0' is for test here|record 'p0' is for train"),
        ({"target": "Nucleus"}, "record 'p0' has another sequence or label than in site-1.fasta"),
        ({"sequence": "MKV"}, "record 'p0' has another sequence or label than in site-1.fasta"),
    ],
)
def test_merged_sites_that_contradict_each_other_are_refused(
    write_site: WriteSite, proteins: list[Protein], classes: Classes, change: dict[str, str], message: str
) -> None:
    first = load_site_data(*write_site("site-1", proteins), classes)
    changed = [dataclasses.replace(proteins[0], **change), *proteins[18:30]]  # type: ignore[arg-type]
    second = load_site_data(*write_site("site-2", changed), classes, validation_fraction=0)
    with pytest.raises(DataError, match=message):
        merge_sites([first, second])


def test_embeddings_of_two_encoders_are_not_merged(
    write_site: WriteSite, proteins: list[Protein], classes: Classes, info: EncoderInfo
) -> None:
    other = msgspec.structs.replace(info, weights_sha256="b" * 64)
    first = load_site_data(*write_site("site-1", proteins), classes)
    second = load_site_data(*write_site("site-2", proteins, encoder=other), classes)
    with pytest.raises(DataError, match=r"site-2\.fasta: embedded with .*bbbb.*, but site-1\.fasta with .*aaaa"):
        merge_sites([first, second])
