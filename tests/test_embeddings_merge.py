"""Tests of joining embeddings files."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest

from fedbio import embeddings_joined
from fedbio.cli import main
from fedbio.embeddings import Embeddings, sequence_digest, write_embeddings
from fedbio.embeddings_merge import MergeReport, Proteins, merge
from fedbio.errors import DataError, FormatError
from fedbio.files import sha256_file
from fedbio.results import EncoderInfo

INFO = EncoderInfo(
    name="tiny",
    weights_sha256="ab" * 32,
    trained=True,
    width=3,
    pooling="mean",
    layer=2,
    dtype="float32",
    max_residues=510,
    long="cut",
)


def store(path: Path, proteins: dict[str, str], info: EncoderInfo = INFO, first: float = 0.0) -> Path:
    """Write an embeddings file; its rows count on from `first`."""
    rows = sum(map(len, proteins.values())) if info.pooling == "residues" else len(proteins)
    write_embeddings(
        path,
        info=info,
        ids=list(proteins),
        lengths=[len(sequence) for sequence in proteins.values()],
        digests=[sequence_digest(sequence) for sequence in proteins.values()],
        blocks=[first + np.arange(rows * 3, dtype=np.float32).reshape(-1, 3)],
        pointers=np.cumsum([0, *map(len, proteins.values())]) if info.pooling == "residues" else None,
    )
    return path


def given(**proteins: str) -> Proteins:
    return lambda: iter(proteins.items())


def test_order_is_that_of_the_arguments_and_the_first_of_equal_proteins_is_taken(tmp_path: Path) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK", "b": "AC"})
    two = store(tmp_path / "2.h5", {"c": "GG", "a": "MK", "d": "V"}, first=100)
    assert merge([one, two], tmp_path / "all.h5") == MergeReport(proteins=4, repeated=1, left_out=0)
    with h5py.File(tmp_path / "all.h5", "r") as file:
        assert file["ids"].asstr()[:].tolist() == ["a", "b", "c", "d"]
        assert file["lengths"][:].tolist() == [2, 2, 2, 1]
        assert file["embeddings"][:, 0].tolist() == [0, 3, 100, 106]
        assert file["digests"][3].tobytes() == sequence_digest("V")


def test_shards_together_are_the_bytes_of_the_whole(tmp_path: Path) -> None:
    proteins = {f"p{number}": "MK" * (number + 1) for number in range(10)}
    whole = store(tmp_path / "whole.h5", proteins)
    names = list(proteins)
    shards = [
        store(tmp_path / f"{first}.h5", {name: proteins[name] for name in names[first : first + 4]}, first=first * 3)
        for first in (0, 4, 8)
    ]
    merge(shards, tmp_path / "all.h5")
    assert sha256_file(tmp_path / "all.h5") == sha256_file(whole)


def test_order_is_that_of_another_file_if_one_is_given(tmp_path: Path) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK", "b": "AC"})
    two = store(tmp_path / "2.h5", {"c": "GG", "d": "V"}, first=100)
    report = merge([one, two], tmp_path / "all.h5", like=given(d="V", b="AC", c="GG"))
    assert report == MergeReport(proteins=3, repeated=0, left_out=1)
    with Embeddings.open(tmp_path / "all.h5") as embeddings:
        assert embeddings.ids == ["d", "b", "c"]
        assert embeddings.lengths.tolist() == [1, 2, 2]
        assert np.concatenate(list(embeddings.blocks()))[:, 0].tolist() == [103, 3, 100]


def test_proteins_that_no_file_has_are_refused(tmp_path: Path) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK"})
    with pytest.raises(
        DataError, match=r"2 of 3 proteins given with --like are in none of the files, first 'x'; embed"
    ):
        merge([one], tmp_path / "all.h5", like=given(x="V", a="MK", y="V"))
    with pytest.raises(DataError, match=r"1\.h5: id 'a' has another sequence there than in the file given with --like"):
        merge([one], tmp_path / "all.h5", like=given(a="MV"))
    assert not (tmp_path / "all.h5").exists()


def test_one_id_for_two_sequences_is_refused(tmp_path: Path) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK", "b": "V", "c": "M"})
    two = store(tmp_path / "2.h5", {"x": "M", "a": "MV", "b": "G", "c": "M"})
    with pytest.raises(
        DataError, match=r"2\.h5: id 'a' \(and 1 more\) has another sequence there than in .*1\.h5; rename"
    ):
        merge([one, two], tmp_path / "all.h5")


def test_one_id_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK", "b": "MK"})
    with h5py.File(one, "r+") as file:
        file["ids"][1] = "a"
    with pytest.raises(FormatError, match=r"1\.h5: id 'a' stands there twice"):
        merge([store(tmp_path / "0.h5", {"z": "MK"}), one], tmp_path / "all.h5")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("layer", 1, "layer is 1, not 2"),
        ("pooling", "max", "pooling is 'max', not 'mean'"),
        ("dtype", "int8", "dtype"),
        ("bins", "start 50, end 50", "bins is 'start 50, end 50', not ''"),
    ],
)
def test_two_encoders_are_refused(tmp_path: Path, name: str, value: object, found: str) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK"})
    two = store(tmp_path / "2.h5", {"b": "MV"}, msgspec.structs.replace(INFO, **{name: value}))
    with pytest.raises(
        DataError, match=rf"2\.h5: made with another encoder: {found}.*; merge files of one encoder only"
    ):
        merge([one, two], tmp_path / "all.h5")


def test_rows_per_residue_follow_their_protein(tmp_path: Path) -> None:
    info = msgspec.structs.replace(INFO, pooling="residues")
    one = store(tmp_path / "1.h5", {"a": "MK", "b": "ACD"}, info)
    two = store(tmp_path / "2.h5", {"c": "G", "d": "VV"}, info, first=100)
    merge([one, two], tmp_path / "all.h5")
    with Embeddings.open(tmp_path / "all.h5") as embeddings:
        assert embeddings.residues("b")[:, 0].tolist() == [6, 9, 12]
        assert embeddings.residues("d")[:, 0].tolist() == [103, 106]
    merge([one, two], tmp_path / "like.h5", like=given(d="VV", a="MK", b="ACD"))
    with Embeddings.open(tmp_path / "like.h5") as embeddings:
        assert embeddings.ids == ["d", "a", "b"]
        assert embeddings.residues("d")[:, 0].tolist() == [103, 106]
        assert embeddings.residues("b")[:, 0].tolist() == [6, 9, 12]


def test_more_files_than_may_be_open_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings_joined, "OPEN_FILES", 2)
    files = [store(tmp_path / f"{number}.h5", {f"p{number}": "MK"}, first=number) for number in range(7)]
    backwards = {f"p{number}": "MK" for number in range(6, -1, -1)}
    merge(files, tmp_path / "all.h5", like=given(**backwards))
    with Embeddings.open(tmp_path / "all.h5") as embeddings:
        assert embeddings.ids == list(backwards)
        assert np.concatenate(list(embeddings.blocks()))[:, 0].tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_more_proteins_than_a_block_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings_joined, "BLOCK_ROWS", 100)
    monkeypatch.setattr(embeddings_joined, "HEADS", 70)
    files = [
        store(tmp_path / f"{part}.h5", {f"p{n}": "MK" for n in range(part, 900, 3)}, first=1000 * part)
        for part in range(3)
    ]
    order = np.random.default_rng(1).permutation(900).tolist()
    merge(files, tmp_path / "all.h5", like=given(**{f"p{n}": "MK" for n in order}))
    with Embeddings.open(tmp_path / "all.h5") as embeddings:
        assert embeddings.ids == [f"p{n}" for n in order]
        expected = [1000 * (n % 3) + 3 * (n // 3) for n in order]
        assert np.concatenate(list(embeddings.blocks()))[:, 0].tolist() == expected


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Two files of 192 MB are joined in less memory than one of them beyond what the imports need."""
    info = msgspec.structs.replace(INFO, width=2000)
    for part in range(2):
        rows = 24_000
        write_embeddings(
            tmp_path / f"{part}.h5",
            info=info,
            ids=[f"{part}-{n}" for n in range(rows)],
            lengths=[2] * rows,
            digests=[sequence_digest("MK")] * rows,
            blocks=(np.full((1000, 2000), part, dtype=np.float32) for _ in range(rows // 1000)),
        )
    code = (
        "import sys; from fedbio.embeddings_merge import merge\n"
        # not ru_maxrss, which counts what the parent held
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "merge(sys.argv[1:3], sys.argv[3])\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("0.h5", "1.h5", "all.h5"))]
    grown = int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    # 2,048 rows of 8 kB three times (read, gathered, and those before that are being written), and what HDF5 keeps
    assert grown < 130_000


def test_a_merge_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    one = store(tmp_path / "1.h5", {f"p{n}": "MK" for n in range(2000)})
    (tmp_path / "all.h5").write_text("before")
    code = (
        "import resource, signal, sys; from fedbio.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, {resource.RLIM_INFINITY}))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    call = ["embeddings", "merge", str(one), "-o", str(tmp_path / "all.h5")]
    ended = subprocess.run([sys.executable, "-c", code, *call], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "all.h5" in ended.stderr
    assert (tmp_path / "all.h5").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"1.h5", "all.h5"}


def test_command_orders_like_a_fasta_file_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = store(tmp_path / "1.h5", {"a": "MK", "b": "AC"})
    two = store(tmp_path / "2.h5", {"a": "MK", "c": "V"}, first=100)
    (tmp_path / "p.fasta").write_text(">c TARGET=Anywhere\nV\n>a\nmk\n")
    call = [
        "embeddings",
        "merge",
        str(one),
        str(two),
        "-o",
        str(tmp_path / "all.h5"),
        "--like",
        str(tmp_path / "p.fasta"),
    ]
    assert main(call) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/all.h5: 2 proteins",
        "ids that stand in several files, taken from the first: 1",
        "proteins that were not asked for, left out: 1",
    ]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"proteins": 2, "output": str(tmp_path / "all.h5"), "repeated": 1, "left_out": 1}


def test_show_says_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path / "1.h5", {"a": "MK", "b": "MK", "c": "V" * 600})
    assert main(["embeddings", "show", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[:6] == [
        f"{path}: 3 proteins (2 distinct sequences), 604 residues, 2 to 600 each",
        "first ids: a, b, c",
        "3 rows of width 3, one per protein",
        "1 proteins longer than 510 residues were cut",
        "made with trained encoder tiny:",
        f"  weights_sha256 {'ab' * 32}",
    ]
    assert main(["embeddings", "show", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first_ids"] == ["a", "b", "c"]
    assert (found["width"], found["rows"], found["longer"]) == (3, 3, 1)
    assert found["encoder"] == msgspec.structs.asdict(INFO)
