"""`fedbio report` as a person types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def fedbio(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedbio", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_last_lines_say_where_the_report_is_and_what_it_found(invent: Callable[..., Path]) -> None:
    folder = invent(alone=0.4, gain=0.3)
    result = fedbio("report", folder)
    assert result.returncode == 0, result.stderr
    where, found = result.stdout.splitlines()[-2:]
    assert where == f"report: {folder}/report.html"
    number = r"-?\d+\.\d"
    assert re.fullmatch(
        rf"federated {number} % against {number} % alone "
        rf"\(gain {number} points, 95 % interval {number} to {number}; MLP 32; encoder esm1nv-44m, untrained\)",
        found,
    )
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "events.jsonl", "metrics.csv", "predictions.csv", "report.html", "summary.json",
    }  # fmt: skip


@pytest.mark.slow
def test_json_holds_the_summary(invent: Callable[..., Path], tmp_path: Path) -> None:
    folder = invent()
    result = fedbio("report", folder, "-o", tmp_path / "page.html", "--json")
    content = json.loads(result.stdout)
    assert content["report"] == str(tmp_path / "page.html")
    assert content["accuracy"] == json.loads((folder / "summary.json").read_text())["accuracy"]


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = fedbio("report", tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no party.json here" in result.stderr
