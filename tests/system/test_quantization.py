"""Real processes, real training: every scheme saves its bytes and costs no accuracy that could be told from chance."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbio.settings import SCHEMES

SITES = ("site-1", "site-2", "site-3")
SHARE = {"float16": 0.54, "bfloat16": 0.54, "int8": 0.32, "fp4": 0.21, "nf4": 0.21}
"""At most so much of float32's bytes: biases stay exact, and the model is small."""


def job(name: str, quantization: Any) -> dict[str, Any]:
    training = {"mlps": ["512"], "seeds": [0, 1], "rounds": 10, "patience": 10}
    return {"workflow": "classify", "name": name, "training": training, "quantization": quantization}


def accuracies(folder: Path) -> dict[str, float]:
    """Test accuracy of the common model by job, the mean over seeds."""
    state = sqlite3.connect(folder / "server" / "state.sqlite")
    rows = state.execute(
        "select job, avg(value) from metrics where party = 'federated' and split = 'test' and metric = 'accuracy' "
        "group by job"
    ).fetchall()
    state.close()
    return dict(rows)


@pytest.mark.slow
def test_every_scheme_is_as_accurate_as_float32_and_sends_less(many_proteins: Any) -> None:
    parties = many_proteins
    jobs = [job("exact", None), *(job(scheme, scheme) for scheme in SCHEMES)]
    jobs.append(job("feedback", {"to_sites": "fp4", "to_server": "fp4", "error_feedback": True}))
    (parties.folder / "jobs.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    running = [parties.server(), *map(parties.site, SITES)]
    for process in running:
        assert process.wait(200) == 0, "\n".join(parties.log(name) for name in ("server", *SITES))

    found = accuracies(parties.folder)
    assert set(found) == {"exact", *SCHEMES, "feedback"}
    assert found["exact"] > 0.6
    # 300 predictions: their standard error is 0.03
    assert {name: value for name, value in found.items() if abs(value - found["exact"]) > 0.05} == {}

    lines = (parties.folder / "site-2" / "events.jsonl").read_text().splitlines()
    models = [each for each in map(json.loads, lines) if each["event"] == "sent" and each["kind"] == "model"]
    exact = max(each["bytes"] for each in models if "scheme" not in each)
    for scheme, share in SHARE.items():
        largest = max(each["bytes"] for each in models if each.get("scheme") == scheme)
        assert largest < share * exact, scheme
    # the account of the run counts what travelled
    record = json.loads((parties.folder / "site-2" / "party.json").read_text())
    assert record["sent"]["model"]["bytes"] == sum(each["bytes"] for each in models)
