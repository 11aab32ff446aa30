"""Tests of the vocabularies that rows of token tables stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedbio.errors import FormatError
from fedbio.vocabularies import VOCABULARIES, check_vocabulary, read_pieces

Change = Callable[[tuple[str, ...]], tuple[str, ...]]


@pytest.mark.parametrize("name", ["esm1nv", "esm"])
def test_what_is_written_is_recognised(tmp_path: Path, name: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text(VOCABULARIES[name].text)
    assert check_vocabulary(read_pieces(path), where="x") == name


def test_scores_of_sentencepiece_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "protein_sequence.vocab"
    path.write_text("".join(f"{piece}\t-{n}\r\n" for n, piece in enumerate(VOCABULARIES["esm1nv"].pieces)))
    assert check_vocabulary(read_pieces(path), where="x") == "esm1nv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pieces: pieces[:-1], "x: token 32 is nothing, not '<mask>'"),
        (lambda pieces: (*pieces, "J"), "x: token 33 is 'J', not nothing"),
        (lambda pieces: (*pieces[:4], "A", "L", *pieces[6:]), "x: token 4 is 'A', not 'L'"),
    ],
)
def test_the_first_token_that_differs_is_named(change: Change, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        check_vocabulary(change(VOCABULARIES["esm"].pieces), where="x")
