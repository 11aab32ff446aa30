from __future__ import annotations

import json
from pathlib import Path

from fedbio.federation.party import Party
from fedbio.results import read_party


def finish(workspace: Path, *, task: bool) -> None:
    """One process of a site, with or without anything to do."""
    with Party.open(workspace, "site-1", "site") as party:
        if task:
            party.reopen()
            party.record.classes = ["Nucleus", "Membrane"]
            party.record.seconds["train"] = party.record.seconds.get("train", 0.0) + 1.0
            party.ledger.add("model", 100)
        party.save()
        party.finish(["numpy"])


def test_record_stays_as_it_is_when_there_was_nothing_to_do(tmp_path: Path) -> None:
    finish(tmp_path, task=True)
    before = (tmp_path / "party.json").read_bytes()
    finish(tmp_path, task=False)
    assert (tmp_path / "party.json").read_bytes() == before
    assert not (tmp_path / "unfinished.json").exists()
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "sent", "finished", "continued", "finished"]


def test_record_that_was_removed_is_there_again(tmp_path: Path) -> None:
    finish(tmp_path, task=True)
    before = (tmp_path / "party.json").read_bytes()
    # as Snakemake does before it runs a rule again
    (tmp_path / "party.json").unlink()
    finish(tmp_path, task=False)
    assert (tmp_path / "party.json").read_bytes() == before


def test_further_task_goes_on_with_the_finished_record(tmp_path: Path) -> None:
    finish(tmp_path, task=True)
    first = read_party(tmp_path / "party.json")
    finish(tmp_path, task=True)
    second = read_party(tmp_path / "party.json")
    assert second.classes == first.classes
    assert second.started == first.started
    assert second.seconds == {"train": 2.0}
    assert second.sent["model"].bytes == 200


def test_record_of_someone_else_is_not_taken_up(tmp_path: Path) -> None:
    finish(tmp_path, task=True)
    with Party.open(tmp_path, "site-2", "site") as party:
        assert party.record.classes == []
