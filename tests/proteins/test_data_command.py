"""``fedbio data`` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedbio.cli import main
from fedbio.proteins import read


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["data", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.fixture
def demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "demo.fasta"
    assert main(["data", "demo", "-o", str(path), "--count", "300", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: 300 synthetic proteins (train ")
    return path


def test_list_names_the_known_sets(capsys: pytest.CaptureFixture[str]) -> None:
    names = [dataset["name"] for dataset in as_json(capsys, "list")["datasets"]]
    assert names[:3] == ["demo", "flip-scl", "mixed_soft"]
    assert main(["data", "list"]) == 0
    assert "mixed_vs_human_2  FLIP: DeepLoc 2.0, several locations per protein (not yet)" in capsys.readouterr().out


def test_fetch_puts_the_proteins_where_they_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "fetch", "demo", "-o", tmp_path / "here" / "proteins.csv")
    assert found["path"] == str(tmp_path / "here" / "proteins.csv")
    assert len(found["sha256"]) == 64
    assert sum(1 for _ in read(found["path"])) == 900


def test_check_describes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(b">A TARGET=cytosol\r\nmkrX\r\n>B TARGET=Nucleus SET=test\r\nMK\r\n>C\r\nMKRAAA\r\n")
    assert as_json(capsys, "check", path) == {
        "file": str(path),
        "residues": 12,
        "proteins": 3,
        "length": {"min": 2, "quartiles": [3, 4, 5], "max": 6},
        "classes": {
            "Cytoplasm": {"train": 1, "validation": 0, "test": 0},
            "Nucleus": {"train": 0, "validation": 0, "test": 1},
        },
        "unlabelled": 1,
        "unusual": {"X": 1},
        "accepted": {
            "records with lower-case letters": 1,
            "label 'cytosol' read as 'Cytoplasm'": 1,
            "lines with Windows ends": 6,
        },
        "skipped": {},
    }


def test_check_says_what_a_table_without_labels_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "proteins.csv"
    table.write_text("id,sequence,location\nP1,MKVLAA,Nucleus\n")
    assert main(["data", "check", str(table)]) == 0
    said = capsys.readouterr().out
    assert "no label at all: these proteins can be embedded and predicted, but not trained on" in said
    assert "column 'location' is passed over: labels stand in a column 'target'" in said


def test_check_says_that_a_test_set_will_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text(">P1 TARGET=Nucleus\nMKVLAA\n")
    assert main(["data", "check", str(fasta)]) == 0
    assert "no test set: a fifth is drawn" in capsys.readouterr().out


def test_check_reports_all_wrong_records_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_bytes(b">A TARGET=Nuclues\nMK\n>B\nMK7\n>C\nMK\n")
    assert main(["data", "check", str(path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"fedbio: {path}: 2 of 3 records are wrong:",
        f"  {path}:1: record 'A': label 'Nuclues' is not a known location; did you mean 'Nucleus'?",
        f"  {path}:3: record 'B': letter '7' at residue 3 is not an amino acid; fix the record or pass --skip-invalid",
    ]
    assert main(["data", "check", str(path), "--skip-invalid"]) == 0
    assert "skipped: unknown label: 1" in capsys.readouterr().out


def test_the_same_seed_writes_the_same_demo(tmp_path: Path, demo: Path) -> None:
    again, other = tmp_path / "again.fasta", tmp_path / "other.fasta"
    assert main(["data", "demo", "-o", str(again), "--count", "300", "--seed", "1"]) == 0
    assert main(["data", "demo", "-o", str(other), "--count", "300", "--seed", "2"]) == 0
    assert again.read_bytes() == demo.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("how", [["--sites", "2"], ["--names", "a,b", "--iid"], ["--names", "a,b", "--by", "iid"]])
def test_split_writes_one_file_per_site(
    tmp_path: Path, demo: Path, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sites = as_json(capsys, "split", demo, "-o", tmp_path / "sites", *how)["sites"]
    assert list(sites) == (["site-1", "site-2"] if "--sites" in how else ["a", "b"])
    read_back = {name: list(read(site["path"], require_labels=True)) for name, site in sites.items()}
    whole = list(read(demo))
    tests = [protein for protein in whole if protein.set == "test"]
    assert all([protein for protein in part if protein.set == "test"] == tests for part in read_back.values())
    shared = sorted(protein.id for part in read_back.values() for protein in part if protein.set == "train")
    assert shared == sorted(protein.id for protein in whole if protein.set == "train")
    assert all(sum(site["classes"].values()) == site["train"] + site["validation"] for site in sites.values())


def test_split_by_a_column_with_a_limit(tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "kingdoms.csv"
    proteins = list(read(demo))
    rows = [f"{protein.id},{'Fungi' if i % 3 else 'Metazoa'}\n" for i, protein in enumerate(proteins)]
    table.write_text("id,kingdom\n" + "".join(rows))
    sites = as_json(
        capsys, "split", demo, "--by", "kingdom", "--table", table, "--sites", 2, "--limit", 200, "-o", tmp_path
    )["sites"]
    assert sites["site-1"]["train"] > sites["site-2"]["train"] > 20
    assert sum(1 for _ in read(tmp_path / "site-1.fasta")) < 200
    assert main(["data", "split", str(demo), "--by", "kingdom", "--sites", "2", "-o", str(tmp_path)]) == 2
    assert "no column 'kingdom' among" in capsys.readouterr().err


def test_split_draws_a_test_set_where_the_file_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.fasta"
    path.write_text("".join(f">P{i} TARGET={'Nucleus' if i % 2 else 'Plastid'}\nMK{'A' * i}\n" for i in range(100)))
    assert main(["data", "split", str(path), "--sites", "2", "-o", str(tmp_path / "sites")]) == 0
    assert "no protein is marked as test; 20 were drawn at random" in capsys.readouterr().out
    for site in ("site-1", "site-2"):
        assert sum(protein.set == "test" for protein in read(tmp_path / "sites" / f"{site}.fasta")) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (">P1\nMK\n", "record 'P1': has no label"),
        (">P1 TARGET=Nucleus SET=train\nMK\n>P2 TARGET=Nucleus SET=test\nMK\n", "1 training proteins cannot be shared"),
    ],
)
def test_split_refuses_what_cannot_be_trained_on(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.fasta"
    path.write_text(content)
    assert main(["data", "split", str(path), "--sites", "2", "-o", str(tmp_path / "sites")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sites").exists()


def test_site_names_stay_inside_the_folder(tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "split", str(demo), "--names", "a,../b", "-o", str(tmp_path / "sites")]) == 2
    assert "'../b' cannot name a site and its file" in capsys.readouterr().err


def test_other_classes_than_the_ten_are_taken_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_text(">A TARGET=Soluble\nMKR\n>B TARGET=Membrane_bound SET=test\nMKK\n")
    found = as_json(capsys, "check", path, "--classes", "Soluble,Membrane bound")
    assert {row for row in found["classes"] if any(found["classes"][row].values())} == {"Soluble", "Membrane bound"}
    assert main(["data", "check", str(path), "--classes", "Soluble,Membrane anchored"]) == 2
    assert "did you mean 'Membrane anchored'?" in capsys.readouterr().err
