"""The command line: help for everybody, exit codes for scripts, no traceback for what a person can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedbio.cli import COMMANDS
from fedbio.job_templates import TEMPLATES
from fedbio.provision import provision
from fedbio.settings import FederationFile


def fedbio(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fedbio", *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_every_command() -> None:
    result = fedbio("--help")
    assert result.returncode == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = fedbio(command, "--help")
    assert result.returncode == 0
    assert COMMANDS[command] in result.stdout
    assert f"example:\n  fedbio {command}" in result.stdout


def test_help_of_job_new_lists_every_template() -> None:
    assert ", ".join(TEMPLATES) in " ".join(fedbio("job", "new", "--help").stdout.split())


def test_an_unknown_command_is_refused() -> None:
    result = fedbio("embedd", "x.fasta")
    assert result.returncode == 2
    assert "invalid choice: 'embedd'" in result.stderr
    assert "did you mean embed?" in result.stderr


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (
            ["embed", "x.fasta", "-o", "x.h5", "--poling", "max"],
            "unrecognized arguments: --poling max; did you mean --pooling?",
        ),
        (["embed", "x.fasta", "-o", "x.h5", "--poling=max"], "did you mean --pooling?"),
        (["embed", "x.fasta", "-o", "x.h5", "--long", "windows"], "did you mean window?"),
        (["job", "lst"], "did you mean list?"),
        (["job", "submit", "job.yaml", "--kit", "kit", "--jsno"], "did you mean --json?"),
        # short for nothing: what it means would change with the next option
        (["embed", "x.fasta", "--outp", "x.h5"], "the following arguments are required: -o/--output"),
    ],
)
def test_misspelt_words_are_answered_with_the_nearest(words: list[str], near: str) -> None:
    result = fedbio(*words)
    assert result.returncode == 2
    assert near in result.stderr
    assert f"fedbio {words[0]}" in result.stderr
    assert "--help shows what there is" in result.stderr


def test_no_command_at_all_shows_the_help() -> None:
    result = fedbio()
    assert result.returncode == 2
    assert "commands:" in result.stdout


def test_bad_settings_are_exit_code_2_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("datset: demo\n")
    result = fedbio("settings", "check", str(path))
    assert result.returncode == 2
    assert result.stderr == f"fedbio: {path}: datset: unknown key; did you mean 'dataset'?\n"


def test_json_is_the_last_line_of_standard_output() -> None:
    result = fedbio("settings", "check", "--json", str(Path(__file__).parent.parent / "config" / "config.yaml"))
    assert json.loads(result.stdout.splitlines()[-1])["settings"]["dataset"] == "demo"


def test_json_says_what_went_wrong_too(tmp_path: Path) -> None:
    result = fedbio("settings", "check", "--json", str(tmp_path / "nothing.yaml"))
    assert result.returncode == 2
    last = json.loads(result.stdout.splitlines()[-1])
    assert last == {"error": f"{tmp_path}/nothing.yaml: there is no such settings file; check the path", "exit_code": 2}


@pytest.mark.parametrize("file", ["config.yaml", "site.yaml", "server.yaml", "federation.yaml", "jobs/classify.yaml"])
def test_a_settings_file_is_known_by_its_keys(file: str) -> None:
    result = fedbio("settings", "check", str(Path(__file__).parent.parent / "config" / file))
    assert (result.returncode, result.stderr) == (0, "")


def test_a_site_looks_at_its_proteins_before_it_dials(tmp_path: Path) -> None:
    kit = {"address": "127.0.0.1:1"}
    provision(FederationFile(federation="demo", server=kit, sites=["site-1"]), tmp_path)
    proteins = tmp_path / "mine.fasta"
    proteins.write_text(">a TARGET=Anywhere\nMKR\n>b\nMK7R\n")
    result = fedbio("site", "--kit", str(tmp_path / "site-1"), "--data", str(proteins), "-o", str(tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.startswith(f"fedbio: {proteins}:3: record 'b': letter '7' at residue 3 is not an amino acid")
    missing = ["--labels", str(tmp_path / "labels.csv")]
    result = fedbio(
        "site", "--kit", str(tmp_path / "site-1"), "--data", str(proteins), "-o", str(tmp_path / "out"), *missing
    )
    assert result.stderr == f"fedbio: {missing[1]}: there is no such file of labels; check the path\n"


def test_the_server_imports_no_torch() -> None:
    code = (
        "import sys, fedbio.cli.server, fedbio.federation.server\n"
        "sys.exit(bool({'torch', 'pandas', 'h5py'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_predictions_never_replace_their_own_proteins(tmp_path: Path) -> None:
    proteins = tmp_path / "new.fasta"
    proteins.write_text(">a\nMKR\n")
    result = fedbio("predict", str(proteins), "--model", str(tmp_path), "-o", str(proteins))
    assert (result.returncode, proteins.read_text()) == (2, ">a\nMKR\n")
    assert "this is the file of proteins" in result.stderr


def test_a_server_address_without_a_port_is_refused(tmp_path: Path) -> None:
    result = fedbio("site", "--kit", "kit", "--data", "a.fasta", "-o", str(tmp_path), "--server", "fed.example.org")
    assert result.returncode == 2
    assert "expected HOST:PORT" in result.stderr


@pytest.mark.parametrize("arguments", [["data", "demo", "--help"], ["settings", "schema", "jobs"]])
def test_reader_who_has_enough_ends_a_command_quietly(arguments: list[str]) -> None:
    # the reader has gone before the first line
    receiving, sending = os.pipe()
    os.close(receiving)
    done = subprocess.run(
        [sys.executable, "-m", "fedbio", *arguments], stdout=sending, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(sending)
    assert (done.returncode, done.stderr) == (0, "")
