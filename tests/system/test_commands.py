"""The commands as a person runs them: what they end with, and what their last line says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbio.provision import provision
from fedbio.settings import FederationFile

FEDBIO = [sys.executable, "-m", "fedbio"]
SITES = ("site-1", "site-2", "site-3")


def write_config(folder: Path, encoder: Path, **training: Any) -> Path:
    settings = {
        "dataset": "demo",
        "demo": {"proteins": 240},
        "sites": {"alpha": 5.0},
        "encoder": {"name": str(encoder)},
        "training": {"mlps": ["8"], "seeds": [0], "rounds": 3, "patience": 3, **training},
        "report": {"map_points": 10},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FEDBIO, *map(str, arguments)], capture_output=True, text=True, timeout=200, check=False)


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line and "fedbio" in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


@pytest.mark.slow
def test_simulate_from_settings_to_the_global_model(tmp_path: Path, small_encoder: Path) -> None:
    config = write_config(tmp_path, small_encoder)
    done = run("simulate", config, "-o", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["model"] == str(tmp_path / "run/global")
    assert "server | " in done.stderr
    for party in ("server", *SITES):
        assert (tmp_path / "run" / party / "party.json").exists()
    assert (tmp_path / "run/global/model.json").read_bytes() == (tmp_path / "run/site-1/global/model.json").read_bytes()
    # once more: everything is done already, and nothing is trained again
    again = run("simulate", config, "-o", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_light_attention_is_trained_together_alone_and_in_one_place(tmp_path: Path, small_encoder: Path) -> None:
    config = write_config(tmp_path, small_encoder, mlps=["la3x8-8"], rounds=2, attention_residues=200)
    settings = yaml.safe_load(config.read_text())
    settings["encoder"]["pooling"] = "residues"
    config.write_text(yaml.safe_dump(settings))
    results = tmp_path / "run"
    done = run("simulate", config, "-o", results)
    assert done.returncode == 0, done.stderr
    files = [results / f"data/{site}.fasta" for site in SITES]
    embeddings = [results / site / "embeddings.h5" for site in SITES]
    central = run("train", *files, "--embeddings", *embeddings, "--settings", config, "-o", results / "central")
    assert central.returncode == 0, central.stderr
    for party in ("server", *SITES, "central"):
        assert json.loads((results / party / "party.json").read_text())["best"] == "la3x8-8"
    models = [results / folder / "model.safetensors" for folder in ("global", "site-2/global")]
    assert models[0].read_bytes() == models[1].read_bytes()
    measured = [(results / party / "metrics.csv").read_text() for party in ("server", "site-1", "central")]
    for party, rows in zip(("federated", "site-1", "central"), measured, strict=True):
        for split in ("test,0", "validation,0,0", "train,0,1"):
            assert f"\n{party},la3x8-8,{split}," in rows

    new, given = ["predict", files[0], "--model", results / "global"], tmp_path / "given.csv"
    made = run(*new, "--embeddings", embeddings[0], "-o", given)
    assert made.returncode == 0, made.stderr
    # without a file of embeddings the proteins are embedded as the model's card says
    made = run(*new, "--encoder", small_encoder, "-o", tmp_path / "new.csv")
    assert made.returncode == 0, made.stderr
    rows = [[line.split(",")[:2] for line in path.read_text().splitlines()] for path in (given, tmp_path / "new.csv")]
    assert rows[0] == rows[1]
    reported = run("report", results, "-o", tmp_path / "report.html")
    assert reported.returncode == 0, reported.stderr
    assert "la3x8-8" in (tmp_path / "report.html").read_text()


def test_settings_whose_embeddings_a_classifier_cannot_read_are_refused(tmp_path: Path, small_encoder: Path) -> None:
    done = run("simulate", write_config(tmp_path, small_encoder, mlps=["la9-8"]), "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "encoder.pooling and training.mlps: light attention (la9-8) reads one embedding per residue" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_simulate_names_the_culprit_and_ends_with_its_exit_code(tmp_path: Path, small_encoder: Path) -> None:
    config = write_config(tmp_path, small_encoder)
    assert run("simulate", config, "-o", tmp_path / "run").returncode == 0
    spoiled = tmp_path / "run/data/site-2.fasta"
    spoiled.write_text(spoiled.read_text().replace("TARGET=Nucleus", "TARGET=Nuclues", 1))
    failed = run("simulate", config, "-o", tmp_path / "second", "--data", tmp_path / "run/data")
    assert failed.returncode == 2
    assert "fedbio: site-2 ended with exit code 2, all others were ended" in failed.stderr
    assert "did you mean 'Nucleus'?" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_interrupted_simulation_ends_in_ten_seconds_without_orphans(tmp_path: Path, small_encoder: Path) -> None:
    config = write_config(tmp_path, small_encoder, rounds=5000, patience=5000)
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [*FEDBIO, "simulate", str(config), "-o", str(tmp_path / "run")], stderr=log, stdout=log
        )
        deadline = time.monotonic() + 120
        events = tmp_path / "run/server/events.jsonl"
        while not events.exists() or '"round":5,' not in events.read_text():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert processes_of(tmp_path) == []


def test_server_that_is_not_there_is_named_after_the_deadline(parties: Any) -> None:
    site = parties.site("site-1", "--connect-deadline", "1")
    assert site.wait(60) == 3
    last = parties.log("site-1").splitlines()[-1]
    assert f"server 127.0.0.1:{parties.port} not reached within 1 s (last: " in last
    assert "is the server up, and is the port open?" in last


@pytest.mark.slow
def test_site_of_another_federation_is_refused(parties: Any, tmp_path: Path) -> None:
    parties.write_jobs(rounds=1)
    server = parties.server()
    parties.wait_for("server", "server listening")
    other = {"federation": "other", "server": {"address": f"127.0.0.1:{parties.port}"}, "sites": ["site-1"]}
    provision(FederationFile.model_validate(other), tmp_path / "other")
    site = parties.site("site-1", "--kit", str(tmp_path / "other/site-1"))
    assert site.wait(60) == 4
    assert "Traceback" not in parties.log("site-1")
    assert "site-1" not in [line for line in parties.log("server").splitlines() if "joined" in line]
    server.send_signal(signal.SIGINT)
    assert server.wait(10) == 130


def test_port_in_use_is_the_machines_matter(parties: Any) -> None:
    parties.write_jobs(rounds=1)
    parties.server()
    parties.wait_for("server", "server listening")
    kit, jobs = parties.folder / "kits/server", parties.folder / "jobs.yaml"
    second = run("server", "--kit", kit, "--jobs", jobs, "-o", parties.folder / "second")
    assert second.returncode == 2
    assert str(parties.port) in second.stderr.splitlines()[-1]


def test_kit_of_the_other_role_is_named(parties: Any) -> None:
    parties.write_jobs(rounds=1)
    wrong = run(
        "server",
        "--kit",
        parties.folder / "kits/site-1",
        "--jobs",
        parties.folder / "jobs.yaml",
        "-o",
        parties.folder / "x",
    )
    assert wrong.returncode == 2
    assert "the kit of site-1 is for a site, not for a server" in wrong.stderr


def test_site_without_its_file_is_told_so(parties: Any) -> None:
    missing = run(
        "site", "--kit", parties.folder / "kits/site-1", "--data", "nowhere.fasta", "-o", parties.folder / "x"
    )
    assert missing.returncode == 2
    assert missing.stderr.strip() == "fedbio: nowhere.fasta: there is no such file of proteins; check the path"
