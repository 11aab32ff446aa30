"""Tests of packing proteins once, holding some out, and leaving out what must not be learnt."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from fedbio.encoder.pretraining.corpus import Corpus, Inputs, Proteins, corpus_of
from fedbio.errors import DataError, FormatError, SettingsError

from .conftest import write_proteins


def sequences(proteins: Proteins) -> list[str]:
    return [proteins.residues[proteins.ends[k] : proteins.ends[k + 1]].tobytes().decode() for k in range(len(proteins))]


def read_fasta(path: Path) -> list[str]:
    return path.read_text().split("\n")[1::2]


def test_what_was_packed_is_what_was_read(tmp_path: Path) -> None:
    plain = write_proteins(tmp_path / "a.fasta", [5, 900, 17], seed=1)
    packed = tmp_path / "b.fasta.gz"
    packed.write_bytes(gzip.compress(b">x\nmkv*\n>y\nMKVJ\n"))
    inputs = Inputs(sources=[plain, packed], valid_fraction=0.0)
    corpus = corpus_of(tmp_path / "corpus", inputs)
    assert sequences(corpus.train) == [*read_fasta(plain), "MKV", "MKVJ"]
    assert len(corpus.valid) == 0
    assert corpus.facts.sources[0].sha256 == hashlib.sha256(plain.read_bytes()).hexdigest()
    again = corpus_of(tmp_path / "corpus", inputs, build=False)
    assert sequences(again.train) == sequences(corpus.train)


def test_a_hash_of_the_sequence_holds_out_twins_alike_whatever_the_order(tmp_path: Path) -> None:
    path = write_proteins(tmp_path / "a.fasta", [30] * 400)
    lines = path.read_text().strip().split("\n")
    twins = tmp_path / "b.fasta"
    records = [f">q{number}\n{lines[2 * number + 1]}\n" for number in range(400)]
    twins.write_text("".join(reversed(records)))
    one = corpus_of(tmp_path / "one", Inputs(sources=[path], valid_fraction=0.25, seed=3))
    both = corpus_of(tmp_path / "both", Inputs(sources=[twins, path], valid_fraction=0.25, seed=3))
    assert set(sequences(one.valid)) == set(sequences(both.valid))
    assert not set(sequences(both.valid)) & set(sequences(both.train))
    # 100 of 400 are expected; five standard deviations are 43
    assert len(one.valid) == pytest.approx(100, abs=43)
    other = corpus_of(tmp_path / "other", Inputs(sources=[path], valid_fraction=0.25, seed=4))
    assert set(sequences(other.valid)) != set(sequences(one.valid))


def test_held_out_proteins_are_never_trained_on(tmp_path: Path) -> None:
    train = write_proteins(tmp_path / "a.fasta", [30] * 20)
    valid = tmp_path / "v.fasta"
    valid.write_text(f">v\n{read_fasta(train)[4].lower()}\n>w\nMKVMKV\n")
    corpus = corpus_of(tmp_path / "corpus", Inputs(sources=[train], valid=[valid]))
    assert sequences(corpus.valid) == [read_fasta(train)[4], "MKVMKV"]
    assert len(corpus.train) == 19
    assert read_fasta(train)[4] not in sequences(corpus.train)
    assert corpus.facts.held_out_twins == 1
    assert corpus.facts.valid_fraction == 0


@pytest.mark.parametrize("form", ["fasta", "digests", "ids"])
def test_what_is_excluded_is_nowhere(tmp_path: Path, form: str) -> None:
    path = write_proteins(tmp_path / "a.fasta", [30] * 20)
    banned = [read_fasta(path)[3], read_fasta(path)[11]]
    listed = tmp_path / "list"
    if form == "fasta":
        listed.write_text("".join(f">t{number}\n{each}*\n" for number, each in enumerate(banned)))
    elif form == "digests":
        listed.write_text("\n".join(hashlib.sha256(each.encode()).hexdigest().upper() for each in banned))
    else:
        listed.write_text("p3\np11\n")
    option = {"exclude_ids": [listed]} if form == "ids" else {"exclude": [listed]}
    corpus = corpus_of(tmp_path / "corpus", Inputs(sources=[path], valid_fraction=0.3, **option))
    everywhere = [*sequences(corpus.train), *sequences(corpus.valid)]
    assert len(everywhere) == 18
    assert not set(banned) & set(everywhere)
    assert corpus.facts.excluded == 2
    assert corpus.facts.excluded_sources[0].sha256 == hashlib.sha256(listed.read_bytes()).hexdigest()


def test_a_list_of_digests_with_a_wrong_line_is_refused(tmp_path: Path) -> None:
    path = write_proteins(tmp_path / "a.fasta", [30] * 3)
    listed = tmp_path / "list"
    listed.write_text("a" * 64 + "\n" + "b" * 63 + "\n")
    with pytest.raises(DataError, match=r"list: entry 2: .* is not a SHA-256 digest"):
        corpus_of(tmp_path / "corpus", Inputs(sources=[path], exclude=[listed]))
    assert not (tmp_path / "corpus").exists()


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write_proteins(tmp_path / "a.fasta", [30] * 3)
    with pytest.raises(DataError, match="no protein is left to train on; 3 are excluded"):
        corpus_of(tmp_path / "corpus", Inputs(sources=[path], exclude=[path]))


def build(tmp_path: Path) -> tuple[Corpus, Inputs, Path]:
    path = write_proteins(tmp_path / "a.fasta", [30] * 20)
    inputs = Inputs(sources=[path], valid_fraction=0.2)
    return corpus_of(tmp_path / "corpus", inputs), inputs, path


def test_a_file_that_changed_is_refused_by_name_of_the_key(tmp_path: Path) -> None:
    _, inputs, path = build(tmp_path)
    write_proteins(path, [30] * 21)
    with pytest.raises(SettingsError, match="began with other proteins: sources was "):
        corpus_of(tmp_path / "corpus", inputs)


def test_a_file_that_was_only_copied_is_the_same(tmp_path: Path) -> None:
    corpus, inputs, path = build(tmp_path)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert sequences(corpus_of(tmp_path / "corpus", inputs).train) == sequences(corpus.train)


def test_a_damaged_corpus_is_refused(tmp_path: Path) -> None:
    _, inputs, _ = build(tmp_path)
    with open(tmp_path / "corpus" / "train.residues", "ab") as file:
        file.write(b"A")
    with pytest.raises(FormatError, match=r"train\.residues: not the \d+ residues"):
        corpus_of(tmp_path / "corpus", inputs)
