from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedbio.classifier import ModelCard, Standardizer, initialize, save_model
from fedbio.cli import main
from fedbio.encoder import embed_file
from fedbio.proteins import Protein, write_fasta
from fedbio.results import EncoderInfo

WriteSite = Callable[..., tuple[Path, Path]]


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _save(folder: Path, encoder: EncoderInfo, classes: tuple[str, ...]) -> str:
    card = ModelCard(classes=list(classes), hidden=[8], encoder=encoder, unsure_below=0.5)
    width = encoder.width
    standardizer = Standardizer(np.zeros(width, dtype=np.float32), np.ones(width, dtype=np.float32))
    save_model(folder, initialize(width, (8,), len(classes), seed=0), standardizer, card)
    return str(folder)


@pytest.fixture
def model(tmp_path: Path, info: EncoderInfo, classes: tuple[str, ...]) -> str:
    return _save(tmp_path / "model", info, classes)


def test_every_protein_gets_a_row_in_the_order_of_the_file(
    write_site: WriteSite,
    proteins: list[Protein],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    classes: tuple[str, ...],
) -> None:
    _, store = write_site("site-1", proteins)
    unlabelled = [dataclasses.replace(each, target=None) for each in (proteins[50], proteins[3], proteins[70])]
    write_fasta(unlabelled, tmp_path / "new.fasta")
    arguments = ["predict", str(tmp_path / "new.fasta"), "--model", model, "--embeddings", str(store)]
    assert main([*arguments, "-o", str(tmp_path / "new.csv"), "--json"]) == 0
    rows = _rows(tmp_path / "new.csv")
    assert tuple(rows[0]) == ("id", "location", "probability", "unsure", *classes)
    assert [row["id"] for row in rows] == ["p50", "p3", "p70"]
    for row in rows:
        probabilities = {name: float(row[name]) for name in classes}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["location"] == max(probabilities, key=lambda name: probabilities[name])
        assert float(row["probability"]) == max(probabilities.values())
        assert row["unsure"] == str(float(row["probability"]) < 0.5).lower()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["proteins"] == sum(printed["locations"].values()) == 3
    assert printed["unsure"] == sum(row["unsure"] == "true" for row in rows)


def test_one_protein_is_embedded_with_the_encoder_that_is_named(
    small_encoder: Path,
    tmp_path: Path,
    classes: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "one.fasta").write_text(">P1\nMKVLAAGIVGAA\n")
    encoder = embed_file(tmp_path / "one.fasta", tmp_path / "one.h5", encoder=small_encoder, threads=1).encoder
    model = _save(tmp_path / "model", encoder, classes)
    arguments = ["predict", str(tmp_path / "one.fasta"), "--model", model, "-o", str(tmp_path / "one.csv")]
    assert main([*arguments, "--encoder", str(small_encoder), "--threads", "1"]) == 0
    assert len(_rows(tmp_path / "one.csv")) == 1
    assert "1 proteins," in capsys.readouterr().out

    # the same through a file of embeddings that is made on the way and kept
    again = [*arguments[:-1], str(tmp_path / "again.csv"), "--embeddings", str(tmp_path / "kept.h5")]
    assert main([*again, "--encoder", str(small_encoder), "--threads", "1"]) == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert (tmp_path / "kept.h5").is_file()

    # an encoder in the cache is found by the name that the model remembers
    monkeypatch.setenv("FEDBIO_ENCODERS", str(small_encoder.parent))
    assert main([*arguments[:-1], str(tmp_path / "named.csv"), "--threads", "1"]) == 0
    assert (tmp_path / "named.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_a_model_of_ends_embeds_them_and_is_refused_where_its_bins_are_others(
    small_encoder: Path, tmp_path: Path, classes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "one.fasta"
    source.write_text(">P1\nMKVLAAGIVGAA\n")
    encoder = embed_file(source, tmp_path / "one.h5", encoder=small_encoder, threads=1, pooling="ends").encoder
    model = _save(tmp_path / "model", encoder, classes)
    options = ["--encoder", str(small_encoder), "--threads", "1", "-o", str(tmp_path / "one.csv")]
    assert main(["predict", str(source), "--model", model, *options]) == 0
    assert len(_rows(tmp_path / "one.csv")) == 1
    capsys.readouterr()
    other = _save(tmp_path / "other", msgspec.structs.replace(encoder, bins="start 1, end 1"), classes)
    kept = tmp_path / "kept.h5"
    assert main(["predict", str(source), "--model", other, "--embeddings", str(kept), *options]) == 2
    assert f"other bins (start 1, end 1) than this release makes ({encoder.bins})" in capsys.readouterr().err
    assert not kept.exists()


def test_another_encoder_is_refused_by_its_digest(
    small_encoder: Path,
    tmp_path: Path,
    classes: tuple[str, ...],
    info: EncoderInfo,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "one.fasta").write_text(">P1\nMKVLAAGIVGAA\n")
    encoder = msgspec.structs.replace(info, name="small", width=32)
    model = _save(tmp_path / "model", encoder, classes)
    arguments = ["predict", str(tmp_path / "one.fasta"), "--model", model, "-o", str(tmp_path / "one.csv")]
    assert main([*arguments, "--encoder", str(small_encoder)]) == 2
    found = capsys.readouterr().err
    digest = embed_file(tmp_path / "one.fasta", tmp_path / "one.h5", encoder=small_encoder).encoder.weights_sha256
    assert digest in found
    assert "a" * 64 in found
    assert "give that encoder with --encoder" in found
    assert not (tmp_path / "one.csv").exists()

    assert main(arguments) == 2
    assert f"trained with the encoder 'small' of SHA-256 {'a' * 64}; give its folder or file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"weights_sha256": "b" * 64}, ["site-1.h5: made with the encoder", "b" * 64, "a" * 64, "use that encoder"]),
        ({"long": "window"}, ["site-1.h5: made with long 'window', but the classifier was trained with 'cut'"]),
        (
            {"pooling": "ends", "bins": "start 1, end 1"},
            ["site-1.h5: made with pooling 'ends', but the classifier was trained with 'mean'"],
        ),
    ],
)
def test_embeddings_made_otherwise_are_refused(
    write_site: WriteSite,
    proteins: list[Protein],
    model: str,
    info: EncoderInfo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    messages: list[str],
) -> None:
    fasta, store = write_site("site-1", proteins, encoder=msgspec.structs.replace(info, **change))
    output = tmp_path / "new.csv"
    assert main(["predict", str(fasta), "--model", model, "--embeddings", str(store), "-o", str(output)]) == 2
    found = capsys.readouterr().err
    assert all(message in found for message in messages)
    assert not output.exists()


def test_embeddings_in_other_arithmetic_are_taken(
    write_site: WriteSite, proteins: list[Protein], model: str, info: EncoderInfo, tmp_path: Path
) -> None:
    fasta, store = write_site("site-1", proteins, encoder=msgspec.structs.replace(info, dtype="bfloat16"))
    output = tmp_path / "new.csv"
    assert main(["predict", str(fasta), "--model", model, "--embeddings", str(store), "-o", str(output)]) == 0
    assert len(_rows(output)) == 90


def test_a_wrong_fasta_and_a_wrong_folder_are_named(
    write_site: WriteSite, proteins: list[Protein], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = write_site("site-1", proteins)
    (tmp_path / "bad.fasta").write_text(">P1\nMK7V\n")
    arguments = ["-o", str(tmp_path / "out.csv"), "--embeddings", str(store), "--model"]
    assert main(["predict", str(tmp_path / "bad.fasta"), *arguments, model]) == 2
    assert "bad.fasta:1: record 'P1': letter '7' at residue 3 is not an amino acid" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "bad.fasta"), *arguments, str(tmp_path)]) == 2
    assert "model.json: not found; a model folder holds" in capsys.readouterr().err
