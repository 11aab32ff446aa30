"""The command line: help for everybody, exit codes for scripts, no traceback for what a person can mend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedbio.cli import COMMANDS


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


def test_an_unknown_command_is_refused() -> None:
    result = fedbio("embedd", "x.fasta")
    assert result.returncode == 2
    assert "invalid choice: 'embedd'" in result.stderr


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
