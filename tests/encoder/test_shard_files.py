"""Tests of writing a file's proteins as shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedbio.cli import main
from fedbio.encoder import shard_files
from fedbio.encoder.shard_files import write_shards
from fedbio.errors import DataError
from fedbio.proteins import Protein, read

PROTEINS = (
    ">a TARGET=Cell_membrane SET=train VALIDATION=False\nMKV\n"
    ">b SET=test VALIDATION=False\nMKVLAA\n"
    ">c SET=train VALIDATION=True\nACD\n"
    ">d TARGET=Nucleus SET=train VALIDATION=False\nGGGGGG\n"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "proteins.fasta"
    path.write_text(PROTEINS)
    return path


def test_shards_one_after_another_are_the_file_with_its_labels(source: Path, tmp_path: Path) -> None:
    shards = write_shards(source, tmp_path / "shards", 2)
    assert [(each.path.name, each.proteins, each.residues) for each in shards] == [
        ("1-of-2.fasta", 2, 9),
        ("2-of-2.fasta", 2, 9),
    ]
    assert "".join(each.path.read_text() for each in shards) == PROTEINS


def test_labels_of_a_table_go_into_the_headers(tmp_path: Path) -> None:
    (tmp_path / "p.fasta").write_text(">a\nMKV\n>b\nAC\n")
    (tmp_path / "labels.csv").write_text("id,target,set\nb,Nucleus,test\n")
    shards = write_shards(tmp_path / "p.fasta", tmp_path, 2, labels=tmp_path / "labels.csv")
    assert list(read(shards[1].path)) == [Protein("b", "AC", "Nucleus", "test")]


@pytest.mark.parametrize("shards", [0, 5])
def test_fewer_proteins_than_shards_are_refused(source: Path, tmp_path: Path, shards: int) -> None:
    with pytest.raises(DataError, match=rf"proteins\.fasta: 4 proteins cannot make {shards} shards; ask for 1 to 4"):
        write_shards(source, tmp_path / "shards", shards)


@pytest.mark.parametrize(
    "later",
    [PROTEINS.replace("MKVLAA", "MKVLA"), PROTEINS + ">e\nAC\n", PROTEINS.rpartition(">")[0]],
    ids=["a sequence changes", "a protein comes", "a protein goes"],
)
def test_file_that_changes_between_the_two_readings_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    plan: Callable[..., list[range]] = shard_files.plan_shards

    def changing(*arguments: object) -> list[range]:
        source.write_text(later)
        return plan(*arguments)

    monkeypatch.setattr(shard_files, "plan_shards", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        write_shards(source, tmp_path / "shards", 2)


def test_no_sequence_is_kept_in_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = most = 0

    class Counted(str):
        __slots__ = ()

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def counting(*arguments: object, **options: object) -> Iterator[Protein]:
        nonlocal alive, most
        for number in range(300):
            alive += 1
            most = max(most, alive)
            yield Protein(f"p{number}", Counted("MKV"))

    monkeypatch.setattr(shard_files, "read", counting)
    assert sum(each.proteins for each in write_shards(source, tmp_path / "shards", 3)) == 300
    assert most <= 3


def test_command_says_what_each_shard_holds(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["data", "shard", str(source), "--shards", "2", "-o", str(tmp_path / "s")]
    assert main(call) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{source}: 4 proteins, 18 residues in 2 shards",
        "  shard           proteins    residues",
        "  1-of-2.fasta           2           9",
        "  2-of-2.fasta           2           9",
    ]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shards"][1] == {"path": str(tmp_path / "s" / "2-of-2.fasta"), "proteins": 2, "residues": 9}
    assert found["skipped"] == {}
