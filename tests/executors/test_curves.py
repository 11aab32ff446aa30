"""What is seen of a study while it runs."""

from __future__ import annotations

import json
from typing import Any

SITES = ("site-1", "site-2", "site-3")


def test_curves_of_a_study_are_at_the_server_while_it_runs(study: Any) -> None:
    study.embed_all()
    study.run(study.jobs(embed=False, mlps=["8"], epochs=2))
    tracked = [json.loads(line) for line in (study.folder / "server/tracking.jsonl").read_text().splitlines()]
    shown: dict[tuple[str, str], list[int]] = {}
    for each in tracked:
        shown.setdefault((each["site"], each["key"]), []).append(each["step"])
    assert set(shown) == {
        (site, f"8-seed-0/{name}")
        for site in SITES
        for name in ("train_loss", "validation_accuracy", "validation_loss")
    }
    for site in SITES:
        assert shown[site, "8-seed-0/train_loss"] == [1, 2, 3, 4]
        assert shown[site, "8-seed-0/validation_loss"] == [0, 2]
