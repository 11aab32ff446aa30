"""What a site loads, and when."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADS = """
import sys
from fedbio.executors import load_libraries, registry
registry()
load_libraries({workflows!r})
print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("workflows", "torch"), [(["fedavg", "statistics"], "False"), (["fedavg", "classify"], "True")]
)
def test_torch_is_loaded_for_jobs_that_learn_in_the_site_s_own_process_only(workflows: list[str], torch: str) -> None:
    command = [sys.executable, "-c", LOADS.format(workflows=workflows)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == torch
