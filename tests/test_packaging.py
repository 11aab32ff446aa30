"""What a user installs holds the encoders that come with fedbio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedbio.encoder_names import DEFAULT_ENCODER, PACKAGED

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "config.json", "model.safetensors", "training.json", "vocab.txt")


def test_an_installed_wheel_finds_and_loads_its_encoder_by_name(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling makes the wheel; pip install 'fedbio[dev]'")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "out")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    program = (
        "import fedbio, json, sys\n"
        "from fedbio.encoder import load_encoder_weights\n"
        "config, weights = load_encoder_weights(sys.argv[1])\n"
        "print(json.dumps([fedbio.__file__, config.name, config.trained, len(weights)]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", program, DEFAULT_ENCODER],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    file, name, trained, tensors = json.loads(done.stdout)
    assert Path(file).is_relative_to(tmp_path / "installed")
    assert (name, trained) == (DEFAULT_ENCODER, True)
    assert tensors > 50
    for each in FILES:
        assert (tmp_path / "installed" / "fedbio" / "encoders" / DEFAULT_ENCODER / each).is_file()


def test_git_takes_the_files_of_an_encoder() -> None:
    """What git ignores is left out of the wheel too."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = [str((PACKAGED / "one" / name).relative_to(ROOT)) for name in FILES]
    ignored = subprocess.run(
        ["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ignored.returncode, ignored.stdout) == (1, "")
