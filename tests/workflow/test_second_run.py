"""Snakemake once more, after the data set was corrected: the results of before are not lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def snakemake(folder: Path) -> tuple[int, str]:
    command = [str(Path(sys.executable).parent / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    done = subprocess.run(
        [*command, "--directory", str(folder), "--configfile", "config.yaml"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_corrected_labels_are_refused_and_taken_back_give_the_report(tmp_path: Path, small_encoder: Path) -> None:
    proteins = tmp_path / "lab.fasta"
    demo = [sys.executable, "-m", "fedbio", "data", "demo", "-o", str(proteins), "--count", "200"]
    subprocess.run(demo, check=True, timeout=60)
    settings = {
        "dataset": "lab.fasta",
        "sites": {"count": 2, "alpha": 50.0},
        "encoder": {"name": str(small_encoder)},
        "training": {"mlps": ["8"], "seeds": [0], "rounds": 2, "patience": 2},
        "report": {"map_points": 10},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    code, output = snakemake(tmp_path)
    assert code == 0, output
    run = tmp_path / "results/lab"
    parties = {path: path.read_bytes() for path in run.glob("s*/party.json")}
    model = (run / "global/model.safetensors").read_bytes()
    assert len(parties) == 3

    before = proteins.read_text()
    # one protein goes from the test to the training
    proteins.write_text(before.replace("SET=test", "SET=train", 1))
    code, output = snakemake(tmp_path)
    assert code != 0
    assert "results/lab holds the results of other proteins (site-" in output
    assert "with Snakemake: --config run=NAME" in output
    assert {path: path.read_bytes() for path in run.glob("s*/party.json")} == parties
    assert (run / "global/model.safetensors").read_bytes() == model

    proteins.write_text(before)
    code, output = snakemake(tmp_path)
    assert code == 0, output
    assert {path: path.read_bytes() for path in run.glob("s*/party.json")} == parties
    assert (run / "global/model.safetensors").read_bytes() == model
    assert (run / "report.html").exists()
