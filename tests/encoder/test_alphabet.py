"""Tests of the byte table that turns residues into token numbers."""

from __future__ import annotations

import pytest

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.errors import DataError


def test_esm1nv_numbers_are_those_of_the_published_vocabulary() -> None:
    alphabet = ALPHABETS["esm1nv"]
    assert (alphabet.start, alphabet.end, len(alphabet.pieces)) == (1, 2, 30)
    assert alphabet.encode("LASGVERTIDPKNFQYHMCWXBZUO").tolist() == list(range(5, 30))


def test_esm_numbers_equal_fair_esm() -> None:
    esm = pytest.importorskip("esm")
    theirs, ours = esm.data.Alphabet.from_architecture("ESM-1b"), ALPHABETS["esm"]
    assert list(ours.pieces) == theirs.all_toks
    assert (ours.start, ours.end) == (theirs.cls_idx, theirs.eos_idx)
    residues = "ACDEFGHIKLMNPQRSTVWYXBUZO"
    assert ours.encode(residues).tolist() == theirs.encode(residues)


@pytest.mark.parametrize("name", ["esm1nv", "esm"])
def test_j_is_read_as_x(name: str) -> None:
    assert ALPHABETS[name].encode("JX").tolist() == ALPHABETS[name].encode("XX").tolist()


@pytest.mark.parametrize("name", ["esm1nv", "esm"])
@pytest.mark.parametrize("residues", ["MK-A", "MK.A", "MK7A", "MKaA", "MK A"])
def test_a_letter_outside_the_alphabet_is_refused(name: str, residues: str) -> None:
    with pytest.raises(DataError, match=f"letter '[{residues[2]}]' at residue 3 is not in the encoder's alphabet"):
        ALPHABETS[name].encode(residues)
