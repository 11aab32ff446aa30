"""Whole runs through Snakemake: all parties on one machine, and four parties each with a Snakemake of its own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedbio.files import sha256_file

ROOT = Path(__file__).parents[2]
TRAINING = {"mlps": ["16", "32-16"], "seeds": [0, 1], "rounds": 4, "patience": 4}


def snakemake(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).parent / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    # one thread each: four parties share the machine
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--directory", str(folder), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_to_end(folder: Path, *arguments: str) -> str:
    process = snakemake(folder, *arguments)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0, output
    return output


def write_yaml(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_all_parties_on_one_machine_from_proteins_to_report(tmp_path: Path, small_encoder: Path) -> None:
    settings = {
        "dataset": "demo",
        "demo": {"proteins": 300},
        "encoder": {"name": str(small_encoder)},
        "training": TRAINING,
        "report": {"map_points": 20},
    }
    write_yaml(tmp_path / "config.yaml", settings)
    output = run_to_end(tmp_path, "--configfile", "config.yaml")
    assert "results/demo/report.html" in output

    run = tmp_path / "results" / "demo"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"16", "32-16"}
    for numbers in summary["accuracy"].values():
        assert set(numbers) == {"local_mean", "federated", "central", "majority", "gain"}
        assert all(set(number) == {"value", "low", "high"} for number in numbers.values())
    assert set(summary["bytes_left"]) >= {"site-1", "site-2", "site-3"}
    assert summary["encoder"]["name"] == "small"

    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["party"] for row in rows} == {"federated", "central", "site-1", "site-2", "site-3"}
    assert "<html" in (run / "report.html").read_text()

    # the global model predicts, with the encoder it was trained with
    (tmp_path / "new.fasta").write_text(">one\nMKLLVVSAAWKDEL\n")
    command = [sys.executable, "-m", "fedbio", "predict", "new.fasta", "--model", str(run / "global"), "-o", "new.csv"]
    subprocess.run([*command, "--encoder", str(small_encoder)], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "new.csv").read_text().startswith("id,location,probability,unsure,")

    again = run_to_end(tmp_path, "--configfile", "config.yaml")
    assert "Nothing to be done" in again


def test_data_set_that_is_misspelt_is_refused_before_any_rule(tmp_path: Path) -> None:
    write_yaml(tmp_path / "config.yaml", {"dataset": "data/mine.fasta"})
    process = snakemake(tmp_path, "--configfile", "config.yaml", "--dry-run")
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "config.yaml: dataset: data/mine.fasta: no such file; check the path" in output


def test_command_that_fails_fails_its_rule_at_once(tmp_path: Path) -> None:
    (tmp_path / "wrong.fasta").write_text(">P1 TARGET=Nucleus SET=train\nMK7LA\n")
    write_yaml(tmp_path / "config.yaml", {"dataset": "wrong.fasta"})
    process = snakemake(tmp_path, "--configfile", "config.yaml")
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert "wrong.fasta:2" in output or "wrong.fasta:1" in output
    assert "non-zero exit status 2" in output
    assert "filesystem latency" not in output


@pytest.mark.slow
def test_four_parties_each_with_its_own_snakemake_sites_first(
    tmp_path: Path, small_encoder: Path, free_port: int
) -> None:
    fedbio = [sys.executable, "-m", "fedbio"]
    federation = {
        "federation": "study",
        "server": {"address": f"localhost:{free_port}", "also": ["127.0.0.1"]},
        "sites": ["site-1", "site-2", "site-3"],
    }
    write_yaml(tmp_path / "federation.yaml", federation)
    subprocess.run([*fedbio, "provision", "federation.yaml", "-o", "kits"], cwd=tmp_path, check=True, timeout=60)
    subprocess.run([*fedbio, "data", "demo", "-o", "all.fasta", "--count", "300"], cwd=tmp_path, check=True, timeout=60)
    split = ["data", "split", "all.fasta", "--sites", "3", "--alpha", "1", "-o", "split"]
    subprocess.run([*fedbio, *split], cwd=tmp_path, check=True, timeout=60)

    parties = {}
    for site in federation["sites"]:
        folder = tmp_path / site
        content = {
            "party": "site",
            "kit": str(tmp_path / "kits" / site),
            "proteins": str(tmp_path / "split" / f"{site}.fasta"),
        }
        write_yaml(folder / "site.yaml", content)
        parties[site] = snakemake(folder, "--configfile", "site.yaml")
    jobs = [
        {"workflow": "embed", "encoder": {"name": str(small_encoder)}},
        {"workflow": "classify", "training": TRAINING},
    ]
    folder = tmp_path / "server"
    write_yaml(folder / "jobs.yaml", {"jobs": jobs})
    write_yaml(
        folder / "server.yaml", {"party": "server", "kit": str(tmp_path / "kits" / "server"), "jobs": "jobs.yaml"}
    )
    parties["server"] = snakemake(folder, "--configfile", "server.yaml")

    for party, process in parties.items():
        output = process.communicate(timeout=280)[0]
        assert process.returncode == 0, f"{party}:\n{output}"
    models = [tmp_path / site / "results" / "site" / "global" / "model.safetensors" for site in federation["sites"]]
    models.append(tmp_path / "server" / "results" / "server" / "global" / "model.safetensors")
    assert len({sha256_file(model) for model in models}) == 1
    for site in federation["sites"]:
        results = tmp_path / site / "results" / "site"
        numbers = json.loads((results / "summary.json").read_text())["accuracy"]["16"]
        assert numbers["central"] is None
        assert 0 <= numbers["federated"]["value"] <= 1
        assert "<html" in (results / "report.html").read_text()


def test_every_problem_of_the_settings_is_shown_before_anything_starts(tmp_path: Path) -> None:
    write_yaml(tmp_path / "config.yaml", {"datset": "demo", "training": {"rounds": 0}})
    process = snakemake(tmp_path, "--configfile", "config.yaml")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "config.yaml: training.rounds: expected a number >= 1, found 0" in output
    assert "config.yaml: datset: unknown key; did you mean 'dataset'?" in output
    assert not (tmp_path / "results").exists()
