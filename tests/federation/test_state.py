from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedbio.errors import FormatError, SettingsError
from fedbio.federation.state import Progress, State
from fedbio.results import Metric


def params(value: float) -> dict[str, np.ndarray]:
    return {"layers.0.bias": np.full(2, value, np.float32)}


def test_state_is_there_again_after_a_restart(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.joined("site-1", "0.1.0")
    assert state.begin("study", b"settings") is False
    state.save("study", "8-seed-0", Progress(0), params(0))
    state.save("study", "8-seed-0", Progress(1, 0, 0.5), params(1))
    state.save("study", "8-seed-0", Progress(2, 1, 0.6), params(2))
    state.add_metrics("study", [Metric("federated", "8", "test", 0, 1, "accuracy", 0.5)] * 2)
    # not closed: as after kill -9
    again = State(tmp_path)
    assert again.known_sites() == ["site-1"]
    assert again.progress("study", "8-seed-0") == Progress(2, 1, 0.6, finished=False)
    assert again.model("study", "8-seed-0", 1)["layers.0.bias"].tolist() == [1, 1]
    assert again.metrics() == [Metric("federated", "8", "test", 0, 1, "accuracy", 0.5)]
    assert sorted(path.name for path in (tmp_path / "models/study/8-seed-0").iterdir()) == [
        "round-00001.safetensors",
        "round-00002.safetensors",
    ]
    again.save("study", "8-seed-0", Progress(2, 1, 0.6, finished=True))
    # the best and the last stay
    assert sorted(path.name for path in (tmp_path / "models/study/8-seed-0").iterdir()) == [
        "round-00001.safetensors",
        "round-00002.safetensors",
    ]
    again.finish("study")
    assert State(tmp_path).begin("study", b"settings") is True


def test_job_that_was_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.begin("study", b"one")
    with pytest.raises(SettingsError, match=r"'study' was begun .* with other settings"):
        state.begin("study", b"two")


def test_other_files_are_refused_once_something_has_come_of_the_job(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.begin("study", b"one", files={"train.py": "a", "net.py": "b"})
    state.move("study", "failed", "a script that could not be read")
    # mended before anything came of it
    assert state.begin("study", b"one", files={"train.py": "c"}) is False
    state.save("study", "model", Progress(1), params(1))
    again = State(tmp_path)
    assert again.begin("study", b"one", files={"train.py": "c", "net.py": "b"}) is False
    with pytest.raises(SettingsError, match=r"begun in .* with another train\.py; .* --config run=NAME"):
        again.begin("study", b"one", files={"train.py": "a", "net.py": "b"})
    assert again.change("study", b"one", {"net.py": "a", "train.py": "a"}) == "another net.py, train.py"
    assert again.change("study", b"two", {}) == "other settings"
    assert again.change("new", b"two", {"train.py": "a"}) == ""


def test_state_that_knew_no_files_takes_those_that_are_there(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.begin("study", b"one")
    state.finish("study")
    state._write("alter table jobs drop column files")
    state._write("pragma user_version = 2")
    state.close()
    again = State(tmp_path)
    assert again.begin("study", b"one", files={"train.py": "a"}) is True
    with pytest.raises(SettingsError, match=r"another train\.py"):
        again.begin("study", b"one", files={"train.py": "b"})


def test_foreign_and_future_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/state.sqlite").write_bytes(b"no database at all, only text" * 50)
    with pytest.raises(FormatError, match="not a server's state"):
        State(tmp_path / "a")
    state = State(tmp_path / "b")
    state._write("pragma user_version = 7")
    state.close()
    with pytest.raises(FormatError, match="state of version 7, this release reads version 3"):
        State(tmp_path / "b")


def test_metrics_that_cannot_be_written_leave_the_table_as_it_was_and_open_to_the_next(tmp_path: Path) -> None:
    state = State(tmp_path)
    kept = Metric("federated", "8", "test", 0, 1, "accuracy", 0.5)
    state.add_metrics("study", [kept])

    def broken() -> Iterator[Metric]:
        yield kept._replace(value=0.9)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        state.add_metrics("study", broken())
    assert state.metrics() == [kept]
    state.add_metrics("study", [kept._replace(round=2)])
    assert len(State(tmp_path).metrics()) == 2
    state.close()
