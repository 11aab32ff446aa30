"""What a server holds while models pass through it: a process of its own, and sites over TLS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SITES = ["site-1", "site-2"]

SERVER = """
import re, sys
from pathlib import Path
from fedbio.federation import Server
from fedbio.settings import JobsFile, KitFile, load
from fedbio.transport import Credentials

def memory(what):
    found = re.search(rf"{what}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10

kit, workspace, address, jobs = sys.argv[1:]
server = Server(
    kit=load(Path(kit) / "kit.yaml", KitFile),
    credentials=Credentials.from_kit(Path(kit)),
    jobs=JobsFile.model_validate_json(jobs),
    workspace=Path(workspace),
    listen=address,
)
before = memory("VmRSS")
server.run()
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["file", "lockstep"])
def test_server_grows_by_less_than_128_mib_with_a_model_of_any_size(
    federation: Any, free_port: int, aggregation: str
) -> None:
    what = federation.jobs(mlp="9000", rounds=1, round_deadline_s=200)
    job = what.jobs[0].model_copy(update={"aggregation": aggregation})
    what = what.model_copy(update={"jobs": [job], "sites": SITES})
    kit = federation.folder / "kits" / "server"
    address = f"localhost:{free_port}"
    arguments = [kit, federation.folder / "server", address, json.dumps(what.model_dump(mode="json"))]
    server = subprocess.Popen([sys.executable, "-c", SERVER, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    try:
        sites = [
            federation.start(federation.site(name, federation.fakes(9000), server=address, driver="grpc"))
            for name in SITES
        ]
        for each in sites:
            each.result(250)
        growth = int(server.communicate(timeout=30)[0])
    finally:
        server.kill()
        server.communicate()
    assert growth < 128 << 20
    kept = [path.stat().st_size for path in Path(federation.folder, "server", "models").rglob("round-*")]
    assert [size > 300 << 20 for size in kept] == ([True] if aggregation == "file" else [])
