"""The parties' files become one account; what is missing or damaged is named with its remedy."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fedbio.errors import DataError, FormatError
from fedbio.report import Run, collect
from fedbio.results import MAP_FILE, Prediction, read_party, write_party, write_table


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_parties_come_in_order(whole_run: Run) -> None:
    assert [party.party for party in whole_run.parties] == ["server", "site-1", "site-2", "site-3", "central"]


def test_predictions_of_the_common_test_set_appear_once(whole_run: Run) -> None:
    # 180 proteins x 4 MLPs x 3 seeds x (3 sites + federated + central)
    assert len(rows_of(whole_run.folder / "predictions.csv")) == 180 * 4 * 3 * 5


def test_metrics_of_the_federated_model_appear_once(whole_run: Run) -> None:
    rows = rows_of(whole_run.folder / "metrics.csv")
    assert len({tuple(list(row.values())[:-1]) for row in rows}) == len(rows)
    assert {row["party"] for row in rows} == {"site-1", "site-2", "site-3", "federated", "central"}


def test_events_are_sorted_by_time(whole_run: Run) -> None:
    lines = (whole_run.folder / "events.jsonl").read_bytes().splitlines()
    times = [msgspec.json.decode(line)["time"] for line in lines]
    assert times == sorted(times)
    assert len(times) == 3 + 4 * 2


def test_site_2_comes_before_site_10(invent: Callable[..., Path]) -> None:
    run = collect(invent(sites=10, proteins=300, central=False))
    assert [site.party for site in run.sites][:3] == ["site-1", "site-2", "site-3"]
    assert run.sites[-1].party == "site-10"


def test_a_sites_own_folder_is_left_as_it_is(invent: Callable[..., Path]) -> None:
    folder = invent() / "site-2"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run = collect(folder)
    assert run.own
    assert {row.party for row in run.predictions} == {"site-2", "federated"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_collecting_twice_changes_nothing(invent: Callable[..., Path]) -> None:
    folder = invent()
    collect(folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    collect(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == first


def test_map_of_a_site_is_taken_once(invent: Callable[..., Path]) -> None:
    folder = invent()
    own = collect(folder).points
    shutil.copy(folder / "site-1" / MAP_FILE, folder / "server" / MAP_FILE)
    assert sorted(collect(folder).points) == sorted(own)


def test_a_torn_last_event_is_passed_over(invent: Callable[..., Path]) -> None:
    folder = invent()
    with open(folder / "site-1" / "events.jsonl", "ab") as file:
        file.write(b'{"time": "2026-01-0')
    collect(folder)
    assert len((folder / "events.jsonl").read_bytes().splitlines()) == 3 + 4 * 2


def test_a_party_that_abstained_may_lack_tables(invent: Callable[..., Path]) -> None:
    folder = invent()
    for name in ("metrics.csv", "predictions.csv"):
        (folder / "site-3" / name).unlink()
    record = read_party(folder / "site-3" / "party.json")
    record.remarks = ["site-3 has fewer than 10 training proteins and did not take part"]
    write_party(folder / "site-3", record)
    assert {row.party for row in collect(folder).predictions} == {"site-1", "site-2", "federated", "central"}


def damaged(folder: Path, name: str, old: bytes, new: bytes) -> None:
    path = folder / name
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no party\.json here or in a folder below; give the folder of a finished run"):
        collect(tmp_path)


@pytest.mark.parametrize("name", ["metrics.csv", "predictions.csv"])
def test_a_missing_table(invent: Callable[..., Path], name: str) -> None:
    folder = invent()
    (folder / "site-2" / name).unlink()
    with pytest.raises(DataError, match=rf"site-2/{name}: missing; site-2 has not finished, run the job again"):
        collect(folder)


def test_a_damaged_party_record(invent: Callable[..., Path]) -> None:
    folder = invent()
    damaged(folder, "site-1/party.json", b'"party"', b'"part')
    with pytest.raises(FormatError, match=r"site-1/party\.json: not a record that this release can read"):
        collect(folder)


def test_a_number_that_is_none(invent: Callable[..., Path]) -> None:
    folder = invent()
    damaged(folder, "site-1/metrics.csv", b"site-1,32,train,0,0,", b"site-1,32,train,zero,0,")
    with pytest.raises(
        FormatError, match=r"site-1/metrics\.csv:2: seed: expected a whole number, found 'zero'; run the"
    ):
        collect(folder)


def test_a_row_cut_short(invent: Callable[..., Path]) -> None:
    folder = invent()
    path = folder / "site-1" / "predictions.csv"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match=r"predictions\.csv:361: (expected 7 values, found|confidence: expected)"):
        collect(folder)


def test_wrong_columns(invent: Callable[..., Path]) -> None:
    folder = invent()
    damaged(folder, "site-1/predictions.csv", b"id,target", b"name,target")
    with pytest.raises(FormatError, match=r"predictions\.csv:1: expected the columns id,target,.* found name,target"):
        collect(folder)


def test_bytes_that_are_no_text(invent: Callable[..., Path]) -> None:
    folder = invent()
    (folder / "site-1" / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"metrics\.csv:1: not a CSV table in UTF-8"):
        collect(folder)


def test_a_class_that_the_run_does_not_have(invent: Callable[..., Path]) -> None:
    folder = invent()
    damaged(folder, "site-1/predictions.csv", b"Nucleus", b"Nucelus")
    with pytest.raises(DataError, match=r"predictions\.csv:\d+: class 'Nucelus' is not one of the run's"):
        collect(folder)


def test_a_damaged_event_in_the_middle(invent: Callable[..., Path]) -> None:
    folder = invent()
    damaged(folder, "server/events.jsonl", b"{", b"")
    with pytest.raises(FormatError, match=r"server/events\.jsonl:1: not an event"):
        collect(folder)


def test_one_name_for_two_proteins(invent: Callable[..., Path]) -> None:
    folder = invent()
    path = folder / "site-2" / "predictions.csv"
    write_table(path, Prediction._fields, [Prediction("P00000", "Plastid", "federated", "32", 0, "Plastid", 1.0)] * 2)
    with pytest.raises(
        DataError, match="the sites tested on different proteins; report on each site's own folder instead"
    ):
        collect(folder)


def test_a_servers_own_folder(invent: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="no party here has predictions of the federated model"):
        collect(invent() / "server")
