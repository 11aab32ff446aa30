"""The server's process loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "pandas", "sklearn", "scipy", "h5py", "Bio", "matplotlib", "snakemake")


def test_server_loads_nothing_heavy_also_to_save_a_model() -> None:
    code = (
        "import sys, fedbio.cli.server, fedbio.federation.server\n"
        "import fedbio.executors.publish, fedbio.classifier.model_files\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
