"""Known data sets: a real server, a real plug-in, and what happens without either."""

from __future__ import annotations

import hashlib
import http.server
import io
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbio.errors import DataError, FormatError, PeerUnreachable, RefusedError, TransportError
from fedbio.proteins import COMPARTMENTS, Protein, datasets, download, read
from fedbio.proteins.datasets import DATASETS, fetch, fetch_flip_scl, is_named, known_datasets, resolve

SPLITS = ("mixed_soft", "mixed_hard", "human_soft", "human_hard", "balanced")
ROWS = "sequence,target,set,validation\nMKRKRPAS,Nucleus,train,False\nMASSTVLK,Cell membrane,test,\n"


def archive(rows: str = ROWS, names: tuple[str, ...] = SPLITS) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        for name in names:
            target.writestr(f"splits/{name}.csv", rows)
            target.writestr(f"__MACOSX/splits/._{name}.csv", "no table")
        target.writestr("../outside.csv", ROWS)
    return packed.getvalue()


class _Server(http.server.ThreadingHTTPServer):
    content: bytes = b""
    requests: int = 0
    cut: bool = False


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.path != "/splits.zip":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: 100 if self.server.cut else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as serving:
        serving.content = archive()
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def address(server: _Server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(download, "PAUSE_S", 0.01)
    return f"http://127.0.0.1:{server.server_address[1]}/splits.zip"


def test_the_splits_are_downloaded_once_and_their_checksum_is_kept(
    tmp_path: Path, server: _Server, address: str
) -> None:
    folder = fetch_flip_scl(tmp_path, address=address)
    digest = hashlib.sha256(server.content).hexdigest()
    assert (folder / "splits.zip.sha256").read_text() == f"{digest}  splits.zip\n"
    assert sorted(path.name for path in folder.glob("*.csv")) == sorted(f"{split}.csv" for split in SPLITS)
    assert list(read(folder / "mixed_soft.csv")) == [
        Protein("Sequence0", "MKRKRPAS", "Nucleus"),
        Protein("Sequence1", "MASSTVLK", "Cell membrane", "test"),
    ]
    assert not (tmp_path / "outside.csv").exists()
    assert fetch_flip_scl(tmp_path, address=address) == folder
    assert server.requests == 1


def test_a_file_that_changed_at_its_address_is_refused_and_not_kept(
    tmp_path: Path, server: _Server, address: str
) -> None:
    zipped = fetch_flip_scl(tmp_path, address=address) / "splits.zip"
    zipped.unlink()
    server.content = archive(ROWS.replace("Nucleus", "Plastid"))
    with pytest.raises(RefusedError, match=r"splits\.zip: SHA-256 [0-9a-f]{64} differs from [0-9a-f]{64} of the first"):
        fetch_flip_scl(tmp_path, address=address)
    assert sorted(path.name for path in zipped.parent.iterdir() if path.suffix != ".csv") == ["splits.zip.sha256"]


def test_a_file_that_changed_on_this_machine_is_refused(tmp_path: Path, address: str) -> None:
    zipped = fetch_flip_scl(tmp_path, address=address) / "splits.zip"
    zipped.write_bytes(zipped.read_bytes() + b"\0")
    with pytest.raises(RefusedError, match="was changed or damaged"):
        fetch_flip_scl(tmp_path, address=address)


def test_a_broken_transfer_leaves_nothing_behind(tmp_path: Path, server: _Server, address: str) -> None:
    server.cut = True
    with pytest.raises(PeerUnreachable, match=r"3 attempts \(last: broke off after 100 of [0-9,]+ bytes\)"):
        fetch_flip_scl(tmp_path, address=address)
    assert server.requests == 3
    assert list((tmp_path / "flip-scl").iterdir()) == []
    server.cut = False
    assert fetch_flip_scl(tmp_path, address=address).is_dir()


def test_an_absent_server_is_named_with_what_to_do(tmp_path: Path, free_port: int, address: str) -> None:
    nobody = f"http://127.0.0.1:{free_port}/splits.zip"
    with pytest.raises(PeerUnreachable) as caught:
        fetch_flip_scl(tmp_path, address=nobody)
    assert str(caught.value).startswith(f"{nobody}: not reached within 0 s and 3 attempts (last: [Errno 111]")
    assert str(caught.value).endswith(
        f"on a machine with network, fetch it to {tmp_path}/flip-scl/splits.zip by hand, and run the same command again"
    )
    assert caught.value.exit_code == 3


def test_an_error_page_and_a_foreign_scheme_are_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(TransportError, match="the server answers 404 Not Found"):
        fetch_flip_scl(tmp_path, address=f"{address}.gone")
    with pytest.raises(DataError, match="not an http or https address"):
        fetch_flip_scl(tmp_path, address="file:///etc/passwd")


def test_a_file_put_there_by_hand_is_used_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "flip-scl").mkdir()
    (tmp_path / "flip-scl" / "splits.zip").write_bytes(archive())
    assert fetch("human_hard", tmp_path) == tmp_path / "flip-scl" / "human_hard.csv"
    assert (tmp_path / "flip-scl" / "splits.zip.sha256").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>gone</html>", r"splits\.zip: damaged zip archive \(File is not a zip file\)"),
        (archive(names=SPLITS[:2]), r"no human_soft\.csv in the archive"),
    ],
)
def test_a_wrong_archive_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "flip-scl").mkdir()
    (tmp_path / "flip-scl" / "splits.zip").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        fetch_flip_scl(tmp_path)


def test_the_multi_label_set_is_not_yet_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mixed_vs_human_2: not yet: .* one location per protein; use mixed_soft"):
        fetch("mixed_vs_human_2", tmp_path)


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mixed_sotf: no data set of this name; did you mean 'mixed_soft'"):
        fetch("mixed_sotf", tmp_path)
    with pytest.raises(DataError, match="qqq: no data set of this name; the names are demo, flip-scl, mixed_soft"):
        fetch("qqq", tmp_path)


def test_a_dataset_is_a_path_or_a_name(tmp_path: Path) -> None:
    own = tmp_path / "own.fasta"
    own.write_text(">P1\nMK\n")
    assert resolve(str(own), folder=tmp_path) == own
    with pytest.raises(DataError, match=r"absent\.fasta: no such file"):
        resolve("absent.fasta", folder=tmp_path)
    demo = resolve("demo", folder=tmp_path)
    assert sum(1 for _ in read(demo)) == 900


def test_name_and_path_are_told_apart_without_fetching(tmp_path: Path) -> None:
    own = tmp_path / "own.fasta"
    own.write_text(">P1\nMK\n")
    assert not is_named(str(own))
    assert is_named("mixed_soft")
    with pytest.raises(
        DataError, match="mixed_sofd: no such file, and no data set of this name; did you mean 'mixed_soft'"
    ):
        is_named("mixed_sofd")
    with pytest.raises(DataError, match=r"ow\.fasta: no such file; check the path"):
        is_named(str(tmp_path / "ow.fasta"))


def plugin_code() -> str:
    """Return the example of the documentation: the indented block of the module's docstring."""
    assert datasets.__doc__ is not None
    block = datasets.__doc__.split("::\n", 1)[1].split("``fedbio data list``")[0]
    code, _, project = block.partition("    # pyproject.toml")
    assert '[project.entry-points."fedbio.datasets"]' in project
    assert len([line for line in block.splitlines() if line.strip() and not line.strip().startswith("#")]) == 8
    return "\n".join(line.removeprefix("    ") for line in code.splitlines())


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install the documented plug-in, and one that cannot be imported, as a package manager would."""
    site = tmp_path / "site-packages"
    information = site / "lab_proteins-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "lab_proteins.py").write_text(plugin_code())
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-proteins\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[fedbio.datasets]\nlab-proteins = lab_proteins:fetch\nbroken = absent_module:fetch\n"
        "demo = lab_proteins:fetch\n"
    )
    monkeypatch.syspath_prepend(site)
    yield tmp_path
    sys.modules.pop("lab_proteins", None)


def test_an_installed_plugin_is_listed_and_fetched(installed: Path) -> None:
    known = known_datasets()
    assert known["lab-proteins"].summary == "Two proteins of our laboratory."
    assert known["lab-proteins"].origin == "lab-proteins"
    assert known["demo"] == DATASETS["demo"]
    path = fetch("lab-proteins", installed / "data")
    assert list(read(path)) == [Protein("P1", "MKRKRPAS", "Nucleus"), Protein("P2", "MASSTV", "Plastid", "test")]


def test_a_broken_plugin_is_named_and_harms_no_other(installed: Path) -> None:
    with pytest.raises(DataError, match=r"plug-in of 'lab-proteins' cannot be loaded .No module named 'absent_module'"):
        fetch("broken", installed / "data")


REAL = Path(__file__).parents[3] / "shared" / "data" / "deeploc"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real proteins (../shared/data/deeploc) are not on this machine")
def test_real_proteins_are_read() -> None:
    proteins = list(read(REAL / "mixed_soft.csv.gz", require_labels=True))
    assert len(proteins) == 13_651
    assert {protein.target for protein in proteins} == set(COMPARTMENTS)
    with pytest.raises(DataError, match=r"not yet: .* one location per protein"):
        list(read(REAL / "deeploc2_multilabel.csv.gz"))
