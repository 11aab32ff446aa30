"""Fetching checkpoints: a real server, and what lies in the cache afterwards."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbio.cli import main
from fedbio.encoder.fetch import fetch_encoder
from fedbio.encoder_names import cached_path
from fedbio.errors import PeerUnreachable, RefusedError, SettingsError, TransportError
from fedbio.proteins import download

NAME = "facebook/esm2_t6_8M_UR50D"


class _Server(http.server.ThreadingHTTPServer):
    files: dict[str, bytes]
    requests: list[str]
    cut: bool = False


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.server.cut else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(download, "PAUSE_S", 0.01)
    with _Server(("127.0.0.1", 0), _Handler) as serving:
        serving.files = {
            "/x.pt": b"weights" * 100,
            "/hf/config.json": b'{"model_type": "esm"}',
            "/hf/vocab.txt": b"<cls>\n",
            "/hf/model.safetensors": b"tensors",
        }
        serving.requests = []
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def base(server: _Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_file_is_fetched_once_and_its_checksum_is_kept(tmp_path: Path, server: _Server, base: str) -> None:
    path = fetch_encoder("esm2_t6_8M_UR50D", tmp_path, address=f"{base}/x.pt")
    assert path == tmp_path / "esm2_t6_8M_UR50D.pt" == cached_path("esm2_t6_8M_UR50D", tmp_path)
    assert path.read_bytes() == server.files["/x.pt"]
    digest = hashlib.sha256(server.files["/x.pt"]).hexdigest()
    assert (tmp_path / "esm2_t6_8M_UR50D.pt.sha256").read_text() == f"{digest}  esm2_t6_8M_UR50D.pt\n"
    assert fetch_encoder("esm2_t6_8M_UR50D", tmp_path, address=f"{base}/x.pt") == path
    assert server.requests == ["/x.pt"]
    path.write_bytes(b"changed")
    with pytest.raises(RefusedError, match="was changed or damaged"):
        fetch_encoder("esm2_t6_8M_UR50D", tmp_path, address=f"{base}/x.pt")


def test_a_folder_is_found_only_when_all_of_it_is_there(tmp_path: Path, server: _Server, base: str) -> None:
    config = server.files.pop("/hf/config.json")
    with pytest.raises(TransportError, match=r"hf/config\.json: the server answers 404"):
        fetch_encoder(NAME, tmp_path, address=f"{base}/hf")
    assert cached_path(NAME, tmp_path) is None
    server.files["/hf/config.json"] = config
    assert fetch_encoder(NAME, tmp_path, address=f"{base}/hf/") == tmp_path / NAME == cached_path(NAME, tmp_path)
    assert server.requests.count("/hf/model.safetensors") == 1
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == b"tensors"


def test_where_there_are_no_safetensors_the_older_file_is_fetched(tmp_path: Path, server: _Server, base: str) -> None:
    del server.files["/hf/model.safetensors"]
    server.files["/hf/pytorch_model.bin"] = b"pickle"
    for _ in range(2):
        fetch_encoder(NAME, tmp_path, address=f"{base}/hf")
    assert sorted(path.name for path in (tmp_path / NAME).iterdir() if path.suffix != ".sha256") == [
        "config.json", "pytorch_model.bin", "vocab.txt",
    ]  # fmt: skip
    assert server.requests.count("/hf/pytorch_model.bin") == 1


def test_a_broken_transfer_leaves_nothing_that_is_found(tmp_path: Path, server: _Server, base: str) -> None:
    server.cut = True
    with pytest.raises(PeerUnreachable, match=r"3 attempts \(last: broke off after 350 of 700 bytes\)"):
        fetch_encoder("esm2_t6_8M_UR50D", tmp_path, address=f"{base}/x.pt")
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_bound_is_refused(
    tmp_path: Path, base: str, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 600)
    with pytest.raises(RefusedError, match="sends more than 600 bytes"):
        fetch_encoder("esm2_t6_8M_UR50D", tmp_path, address=f"{base}/x.pt")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"did you mean 'esm2_t6_8M_UR50D'\?"):
        fetch_encoder("esm2_t6_8M", tmp_path)


def test_the_command_fetches_into_the_cache_of_the_environment(
    tmp_path: Path, base: str, server: _Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDBIO_ENCODERS", str(tmp_path))
    assert main(["encoder", "fetch", NAME, "--from", f"{base}/hf", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"name": NAME, "path": str(tmp_path / NAME)}
    assert main(["encoder", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert listed["cache"] == str(tmp_path)
    here = [each["name"] for each in listed["encoders"] if (each["path"] or "").startswith(str(tmp_path))]
    assert here == [NAME]
