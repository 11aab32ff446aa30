"""Nothing of a test set is trained on: small runs that leave it out, and the encoders that come with fedbio."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedbio.cli import main
from fedbio.encoder.pretraining.corpus import FACTS_FILE, Inputs, corpus_of

from .conftest import Command, write_proteins
from .training_list import Banned, check_account, read_again, table_sequences

ROOT = Path(__file__).parents[3]
ENCODERS = ROOT / "fedbio" / "encoders"
DATA = ROOT.parent / "shared" / "data"
TEST_PROTEINS = 2_768
"""Of DeepLoc 1.0."""


def sequences_of(fasta: Path) -> list[str]:
    return fasta.read_text().split("\n")[1::2]


def digest(sequence: str) -> bytes:
    return hashlib.sha256(sequence.encode()).digest()


def as_fasta(path: Path, banned: list[str]) -> None:
    # as other tools write it: in lower case, broken into lines, with the stop codon
    path.write_text("".join(f">t{number}\n{each[:9].lower()}\n{each[9:]}*\n" for number, each in enumerate(banned)))


def as_packed_fasta(path: Path, banned: list[str]) -> None:
    path.write_bytes(gzip.compress("".join(f">t{number}\n{each}\n" for number, each in enumerate(banned)).encode()))


def as_table(path: Path, banned: list[str]) -> None:
    path.write_text("sequence,target,set,validation\n" + "".join(f"{each},Nucleus,test,\n" for each in banned))


def as_digests(path: Path, banned: list[str]) -> None:
    path.write_text("\n".join(digest(each).hex() for each in banned) + "\n")


FORMS = {"test.fasta": as_fasta, "test.fasta.gz": as_packed_fasta, "test.csv": as_table, "test.txt": as_digests}


@pytest.mark.parametrize("name", FORMS)
def test_a_run_leaves_out_what_it_is_told_to_and_its_account_proves_it(
    command: Command, proteins: Path, tmp_path: Path, name: str
) -> None:
    everything = sequences_of(proteins)
    banned = everything[4:13]
    write: Callable[[Path, list[str]], None] = FORMS[name]
    write(tmp_path / name, [*banned, "MKVMKVMKV"])
    assert main(command("--exclude", str(tmp_path / name), "--steps", "1")) == 0
    corpus = json.loads((tmp_path / "out" / "training.json").read_text())["corpus"]
    assert corpus["excluded"] == 9
    assert corpus["proteins"]["train"] + corpus["proteins"]["valid"] == 31
    assert [each["name"] for each in corpus["excluded_sources"]] == [name]
    packed = b"".join((tmp_path / "out" / "corpus" / f"{part}.residues").read_bytes() for part in ("train", "valid"))
    assert not any(each.encode() in packed for each in banned)
    assert all(each.encode() in packed for each in everything if each not in banned)
    known = Banned([each.encode() for each in banned], parts=write is not as_digests)
    check_account(corpus, read_again(corpus, tmp_path, banned=known))


def test_a_run_leaves_out_parts_of_test_proteins_and_what_has_them_as_parts(
    command: Command, proteins: Path, tmp_path: Path
) -> None:
    everything = sequences_of(proteins)
    tests = [everything[20][5:-5], "M" + everything[21], everything[22][:-1] + "W" + everything[23]]
    as_fasta(tmp_path / "test.fasta", tests)
    assert main(command("--exclude", str(tmp_path / "test.fasta"), "--steps", "1")) == 0
    corpus = json.loads((tmp_path / "out" / "training.json").read_text())["corpus"]
    # 22 has another last residue than its part there
    assert (corpus["excluded"], corpus["excluded_parts"]) == (0, 3)
    packed = b"".join((tmp_path / "out" / "corpus" / f"{part}.residues").read_bytes() for part in ("train", "valid"))
    assert [number for number, each in enumerate(everything) if each.encode() not in packed] == [20, 21, 23]
    check_account(corpus, read_again(corpus, tmp_path, banned=Banned([each.encode() for each in tests])))


def test_a_run_that_has_learnt_a_test_protein_is_found_out(command: Command, proteins: Path, tmp_path: Path) -> None:
    assert main(command("--steps", "1")) == 0
    corpus = json.loads((tmp_path / "out" / "training.json").read_text())["corpus"]
    everything = {digest(each) for each in sequences_of(proteins)}
    honest = read_again(corpus, tmp_path, banned=Banned(), looked_for=everything)
    check_account(corpus, honest)
    assert honest.found == corpus["proteins"]["train"] < 40
    with pytest.raises(AssertionError, match="another number of banned proteins"):
        check_account(corpus, read_again(corpus, tmp_path, banned=Banned([sequences_of(proteins)[7].encode()])))
    # the same number of proteins and residues, but others
    with pytest.raises(AssertionError, match="another list"):
        check_account({**corpus, "sha256": {"train": "0" * 64}}, honest)
    proteins.write_text(proteins.read_text().replace("A", "G", 1))
    with pytest.raises(AssertionError, match=r"proteins\.fasta is not the file that was trained on"):
        read_again(corpus, tmp_path, banned=Banned())


def test_a_corpus_that_was_packed_before_its_digest_was_kept_still_opens_and_has_it(tmp_path: Path) -> None:
    source = write_proteins(tmp_path / "a.fasta", [30] * 20)
    inputs = Inputs(sources=[source], valid_fraction=0.2)
    packed = corpus_of(tmp_path / "corpus", inputs).facts
    facts = json.loads((tmp_path / "corpus" / FACTS_FILE).read_text())
    del facts["sha256"]
    (tmp_path / "corpus" / FACTS_FILE).write_text(json.dumps(facts))
    assert corpus_of(tmp_path / "corpus", inputs, build=False).facts == packed
    assert packed.sha256.keys() == {"train", "valid"}


@pytest.mark.slow
def test_encoders_that_come_with_fedbio_have_seen_no_test_protein_of_deeploc(
    record_property: Callable[[str, Any], None],
) -> None:
    accounts = {path.parent.name: json.loads(path.read_text()) for path in ENCODERS.glob("*/training.json")}
    if not accounts:
        pytest.skip(f"no encoder in {ENCODERS}")
    if not (DATA / "corpus").is_dir():
        pytest.skip(f"{DATA} is not on this machine: what the encoders have learnt cannot be read again")
    parts = table_sequences(DATA / "deeploc" / "mixed_soft.csv.gz")
    validation = {hashlib.sha256(each).digest() for each in parts["validation"]}
    assert len(parts["test"]) == TEST_PROTEINS
    assert not parts["test"] & (parts["train"] | parts["validation"])
    for name, account in accounts.items():
        assert account["from"] is None, "what the encoder before has learnt is not in this account"
        again = read_again(account["corpus"], DATA / "corpus", banned=Banned(parts["test"]), looked_for=validation)
        check_account(account["corpus"], again)
        # these may overlap: validation chooses, it reports nothing
        record_property(f"{name}: validation proteins among those it was trained on", again.found)
        print(f"{name}: {again.proteins} proteins, none of the test; {again.found} of validation")
