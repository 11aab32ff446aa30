"""What a user installs holds the encoders that come with fedbio."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedbio.encoder_names import PACKAGED

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "config.json", "model.safetensors", "training.json", "vocab.txt")


def test_a_wheel_holds_all_files_of_an_encoder(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling makes the wheel; pip install 'fedbio[dev]'")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / PACKAGED.relative_to(ROOT) / "one"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).touch()
    shutil.copy(ROOT / "fedbio" / "__init__.py", tmp_path / "fedbio")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"],
        cwd=tmp_path, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [f"fedbio/encoders/one/{name}" in names for name in FILES] == [True] * len(FILES)


def test_git_takes_the_files_of_an_encoder() -> None:
    """What git ignores is left out of the wheel too."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = [str((PACKAGED / "one" / name).relative_to(ROOT)) for name in FILES]
    ignored = subprocess.run(
        ["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ignored.returncode, ignored.stdout) == (1, "")
