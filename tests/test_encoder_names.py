"""Tests of the cache of encoders: where it is, what is found there, and what is said of what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbio.encoder_names import (
    KNOWN,
    cache_folder,
    cached_path,
    find_encoder,
    packaged_encoders,
    packaged_path,
)
from fedbio.errors import SettingsError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDBIO_ENCODERS", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("fedbio.encoder_names.PACKAGED", tmp_path / "encoders")
    return tmp_path / "encoders"


def test_an_option_comes_before_the_environment_and_that_before_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("FEDBIO_ENCODERS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/fedbio/encoders")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert cache_folder() == Path("/scratch/cache/fedbio/encoders")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/someone/.cache/fedbio/encoders")
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path("/home/someone/Library/Caches/fedbio/encoders")
    monkeypatch.setenv("FEDBIO_ENCODERS", "~/encoders")
    assert cache_folder() == Path("/home/someone/encoders")
    assert cache_folder(tmp_path) == tmp_path


def test_files_and_folders_are_found_by_name(cache: Path) -> None:
    (cache / "facebook" / "esm2_t6_8M_UR50D").mkdir(parents=True)
    assert cached_path("facebook/esm2_t6_8M_UR50D") is None  # the configuration is fetched last
    (cache / "facebook" / "esm2_t6_8M_UR50D" / "config.json").touch()
    (cache / "esm2_t6_8M_UR50D.pt").touch()
    (cache / "esm1nv.nemo").touch()
    assert cached_path("facebook/esm2_t6_8M_UR50D") == cache / "facebook" / "esm2_t6_8M_UR50D"
    assert find_encoder("esm2_t6_8M_UR50D") == cache / "esm2_t6_8M_UR50D.pt"
    assert find_encoder("esm2_t6_8M_UR50D.pt") == cache / "esm2_t6_8M_UR50D.pt"
    assert find_encoder("esm1nv") == cache / "esm1nv.nemo"


def test_a_path_comes_first_then_what_comes_with_fedbio_then_the_cache_then_what_is_untrained(
    cache: Path, packaged: Path
) -> None:
    assert find_encoder("mine", built_in=["mine"]) is None
    cache.mkdir()
    (cache / "mine.pt").touch()
    assert find_encoder("mine", built_in=["mine"]) == cache / "mine.pt"
    (packaged / "mine").mkdir(parents=True)
    assert find_encoder("mine") == cache / "mine.pt"  # an empty folder is no encoder
    (packaged / "mine" / "config.json").touch()
    assert find_encoder("mine", built_in=["mine"]) == packaged / "mine"
    Path("mine").mkdir()
    assert find_encoder("mine", built_in=["mine"]) == Path("mine")


def test_what_comes_with_fedbio_is_listed_and_named_to_who_misspells_it(cache: Path, packaged: Path) -> None:
    assert packaged_encoders() == []
    for name in ("second", "first"):
        (packaged / name).mkdir(parents=True)
        (packaged / name / "config.json").touch()
    (packaged / "README.md").touch()
    assert packaged_encoders() == ["first", "second"]
    with pytest.raises(
        SettingsError, match=r"neither a built-in name \(first, second, arch\), .*; did you mean 'second'"
    ):
        find_encoder("secund", built_in=["arch"])
    assert packaged_path("../encoders/first") is None


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd.pt", "..", "a/b/c", ".hidden"])
def test_a_name_cannot_lead_out_of_the_cache(cache: Path, name: str) -> None:
    cache.mkdir()
    (cache.parent / "secret.pt").touch()
    assert cached_path(name) is None


def test_a_known_checkpoint_that_is_not_here_comes_with_the_command_that_fetches_it(cache: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        find_encoder("facebook/esm2_t6_8M_UR50D")
    assert str(caught.value) == (
        f"encoder 'facebook/esm2_t6_8M_UR50D': a known checkpoint, but not in the cache {cache}; "
        "fetch it once with: fedbio encoder fetch facebook/esm2_t6_8M_UR50D"
    )
    with pytest.raises(SettingsError, match=r"fedbio encoder fetch esm1b_t33_650M_UR50S --cache other$"):
        find_encoder("esm1b_t33_650M_UR50S", "other")


def test_a_misspelt_name_gets_the_nearest(cache: Path, packaged: Path) -> None:
    with pytest.raises(SettingsError, match=r"did you mean 'esm2_t12_35M_UR50D'\?"):
        find_encoder("esm2_t12_35M_UR50")
    with pytest.raises(SettingsError, match=r"neither a built-in name \(esm1nv-44m\), .*; check the path, or see"):
        find_encoder("protbert", built_in=["esm1nv-44m"])


def test_the_public_checkpoints_are_known_by_their_file_names() -> None:
    assert {name for name in KNOWN if "/" not in name} == {
        "esm2_t6_8M_UR50D",
        "esm2_t12_35M_UR50D",
        "esm2_t30_150M_UR50D",
        "esm2_t33_650M_UR50D",
        "esm1b_t33_650M_UR50S",
        *(f"esm1v_t33_650M_UR90S_{n}" for n in (1, 2, 3, 4, 5)),
    }
    assert KNOWN["esm2_t6_8M_UR50D"].address == "https://dl.fbaipublicfiles.com/fair-esm/models/esm2_t6_8M_UR50D.pt"
    assert KNOWN["facebook/esm2_t6_8M_UR50D"].address == (
        "https://huggingface.co/facebook/esm2_t6_8M_UR50D/resolve/main"
    )
