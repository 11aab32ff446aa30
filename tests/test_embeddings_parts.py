"""Tests of the shards in which rows are safe until the embeddings file is there."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from fedbio.embeddings import Parts
from fedbio.errors import FormatError
from fedbio.results import EncoderInfo

INFO = EncoderInfo("tiny", "ab" * 32, True, 4, "mean", 2, "float32", 510, "window")
N = 600
VECTORS = np.arange(N * 4, dtype=np.float32).reshape(N, 4)


def open_parts(folder: Path, work: str = "w", *, trusted: bool = False) -> Parts:
    return Parts(folder / "a.h5", info=INFO, work=work, rows=N, trusted=trusted)


def test_shards_survive_and_rows_come_back_in_any_order(tmp_path: Path) -> None:
    first = open_parts(tmp_path)
    first.append(0, VECTORS[:100])
    first.flush()
    first.append(100, VECTORS[100:250])
    first.append(250, VECTORS[250:300])
    first.flush()
    first.append(300, VECTORS[300:400])  # never flushed
    second = open_parts(tmp_path)
    assert second.done == 300
    assert second.holds(0, 300)
    assert not second.holds(299, 301)
    second.append(300, VECTORS[300:])
    second.flush()
    places = np.array([599, 0, 299, 300, 99, 100])
    np.testing.assert_array_equal(second.take(places), VECTORS[places])


def test_rows_may_come_with_gaps_and_be_read_in_runs(tmp_path: Path) -> None:
    parts = open_parts(tmp_path)
    parts.append(400, VECTORS[400:500])
    parts.append(100, VECTORS[100:200])  # does not follow: a shard of its own
    parts.append(200, VECTORS[200:250])
    parts.flush()
    assert (parts.done, parts.holds(100, 250), parts.holds(400, 500), parts.holds(250, 400)) == (250, True, True, False)
    runs = parts.runs(np.array([420, 100, 230]), np.array([3, 2, 20]))
    np.testing.assert_array_equal(runs, VECTORS[[420, 421, 422, 100, 101, *range(230, 250)]])
    again = open_parts(tmp_path)
    assert (again.done, again.holds(100, 250), again.holds(0, 1)) == (250, True, False)
    for place in (50, 300, 599):
        with pytest.raises(ValueError, match="250 of 600 rows are there, and not all that are asked for"):
            again.take(np.array([place]))


def append_all(folder: Path, start: int) -> None:
    parts = open_parts(folder, trusted=True)
    for first in range(start, start + 300, 50):
        parts.append(first, VECTORS[first : first + 50])
        parts.flush()


def test_processes_fill_one_folder_together(tmp_path: Path) -> None:
    parts = open_parts(tmp_path)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_all, args=(tmp_path, start)) for start in (300, 0)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    parts.refresh()
    assert parts.holds(0, N)
    np.testing.assert_array_equal(parts.take(np.arange(N)), VECTORS)


def test_shards_without_their_manifest_are_not_trusted(tmp_path: Path) -> None:
    for work in ("old", "new"):
        parts = open_parts(tmp_path, work)
        assert parts.done == 0
        parts.append(0, VECTORS[:100])
        parts.flush()
        (tmp_path / "a.h5.parts" / "manifest.json").unlink()
    assert open_parts(tmp_path, "new").done == 0
    assert open_parts(tmp_path, "new").done == 0


def test_shards_that_hold_much_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parts, "SHARD_BYTES", 100 * 16)
    parts = open_parts(tmp_path)
    for first in range(0, 300, 60):
        parts.append(first, VECTORS[first : first + 60])
    assert parts.done == 240


@pytest.mark.parametrize("name", ["x.f32", "00000000000000-00000000000601." + "0" * 32 + ".f32"])
def test_what_is_no_shard_is_cleared_away(tmp_path: Path, name: str) -> None:
    folder = open_parts(tmp_path).folder
    (folder / name).write_bytes(b"")
    (folder / ".beside.part").write_bytes(b"")
    assert open_parts(tmp_path).done == 0
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_a_manifest_of_unknown_form_is_named(tmp_path: Path) -> None:
    open_parts(tmp_path)
    path = tmp_path / "a.h5.parts" / "manifest.json"
    for content in ("", "[]", json.dumps({"format": "x"})):
        path.write_text(content)
        with pytest.raises(FormatError, match=r"manifest\.json: damaged; delete the folder a\.h5\.parts"):
            open_parts(tmp_path)
