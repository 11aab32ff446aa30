"""Every letter of a file, from FASTA to token numbers, in both alphabets."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.errors import DataError
from fedbio.proteins import read

# numbers of A C D E F G H I K L M N P Q R S T V W Y and then of U O B Z X J, typed from the published vocabularies
STANDARD = {
    "esm1nv": [6, 23, 14, 10, 18, 8, 21, 13, 16, 5, 22, 17, 15, 19, 11, 7, 12, 9, 24, 20],
    "esm": [5, 23, 13, 9, 18, 6, 21, 12, 15, 4, 20, 17, 14, 16, 10, 8, 11, 7, 22, 19],
}
UNUSUAL = {"esm1nv": [28, 29, 26, 27, 25, 25], "esm": [26, 28, 25, 27, 24, 24]}


@pytest.mark.parametrize("alphabet", ["esm1nv", "esm"])
@pytest.mark.parametrize(
    "text", ["ACDEFGHIKLMNPQRSTVWYUOBZXJ*", "acdefghiklmnpqrstvwyuobzxj", "acdefghiklMNPQRSTVWY\nUOBZXJ"]
)
def test_letters_become_the_published_numbers(tmp_path: Path, alphabet: str, text: str) -> None:
    path = tmp_path / "p.fasta"
    path.write_text(f">P1\n{text}\n")
    (protein,) = read(path)
    assert ALPHABETS[alphabet].encode(protein.sequence).tolist() == STANDARD[alphabet] + UNUSUAL[alphabet]


@pytest.mark.parametrize(
    ("text", "message"),
    [("MK-AC", "'-'"), ("MK.AC", r"'\.'"), ("MK*AC", r"stop '\*' at residue 3"), ("MK<mask>", "'<'"), ("MK7", "'7'")],
)
def test_gaps_stops_inside_and_special_tokens_never_reach_the_encoder(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.fasta"
    path.write_text(f">P1\n{text}\n")
    with pytest.raises(DataError, match=rf"p\.fasta:1: record 'P1': .*{message}"):
        list(read(path))
