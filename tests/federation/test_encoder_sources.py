"""Tests of which files a server sends for an encoder, by path and by name, of every form and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedbio.errors import SettingsError
from fedbio.federation.workflows.embed import encoder_files


def names(encoder: Path | str) -> list[str]:
    return sorted(path.name for path in encoder_files(str(encoder)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDBIO_ENCODERS", str(tmp_path / "cache"))
    return tmp_path / "cache"


def huggingface(folder: Path, *parts: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "esm"}')
    (folder / "vocab.txt").touch()
    (folder / "README.md").touch()
    for part in parts:
        (folder / part).touch()
    return folder


def test_all_files_of_a_folder_are_sent_and_no_other(tmp_path: Path, small_encoder: Path) -> None:
    assert names(small_encoder) == ["config.json", "model.safetensors", "vocab.txt"]
    whole = huggingface(tmp_path / "whole", "model.safetensors", "pytorch_model.bin")
    assert names(whole) == ["config.json", "model.safetensors", "vocab.txt"]
    divided = huggingface(tmp_path / "divided", "model-1.safetensors", "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (divided / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(divided) == [
        "config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "vocab.txt",
    ]  # fmt: skip


def test_single_files_and_names_in_the_cache_are_sent(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "a.nemo").write_bytes(b"\x1f\x8b")
    assert encoder_files(str(tmp_path / "a.pt")) == [tmp_path / "a.pt"]
    assert encoder_files(str(tmp_path / "a.nemo")) == [tmp_path / "a.nemo"]
    huggingface(cache / "facebook" / "esm2_t6_8M_UR50D", "pytorch_model.bin")
    assert names("facebook/esm2_t6_8M_UR50D") == ["config.json", "pytorch_model.bin", "vocab.txt"]
    assert encoder_files("esm1nv-44m") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("esm2_t6_8M_UR50D", r"encoder\.name: .* not in the cache .*; fetch it once with: fedbio encoder fetch esm2"),
        ("no/such/folder", r"encoder\.name: no/such/folder: there is no such file or folder at the server"),
        ("gone.nemo", r"encoder\.name: gone\.nemo: there is no such file"),
        ("private.txt", r"private\.txt: neither a torch file .* nor a tar archive"),
        ("with blank.pt", r"with blank\.pt: sites keep files under names of letters, .*; rename it"),
        ("empty", r"empty/config\.json: not found; an encoder folder, ours or Hugging Face's"),
    ],
)  # fmt: skip
def test_what_cannot_be_sent_is_refused_before_any_site_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("private.txt").write_text("a secret")
    Path("with blank.pt").write_bytes(b"PK\x03\x04")
    Path("empty").mkdir()
    with pytest.raises(SettingsError, match=message):
        encoder_files(name)


def test_a_server_looks_into_an_encoder_without_torch(small_encoder: Path) -> None:
    code = (
        "import sys; from fedbio.federation.workflows.embed import encoder_files\n"
        f"encoder_files({str(small_encoder)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
