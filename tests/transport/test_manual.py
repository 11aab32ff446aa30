"""docs/transport.md: its examples run, and its tables say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedbio.transport.frames import HEADER_BYTES, Kind
from fedbio.transport.limits import MAX_BODY_BYTES, Limits

MANUAL = (Path(__file__).parents[2] / "docs" / "transport.md").read_text()


def test_examples_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", MANUAL, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)  # the manual's own code


def test_frame_table_and_kinds_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+|n) \| ([^|]+?) \|", MANUAL, flags=re.MULTILINE)
    assert rows[-1][:2] == (str(HEADER_BYTES), "n")
    begins = [int(begin) for begin, *_ in rows]
    assert begins == [sum(int(size) for _, size, _ in rows[:count]) for count in range(len(rows))]
    assert {(int(number), name) for number, name in re.findall(r"(\d+) ([A-Z]{3,})\b", MANUAL.split("Kinds:")[1])} >= {
        (kind.value, kind.name) for kind in Kind
    }


def test_limits_named_in_the_manual_have_the_values_it_tells() -> None:
    limits = Limits()
    told = dict(re.findall(r"`(\w+)` \((\d+)[ )]", MANUAL))
    assert set(told) >= {"window_chunks", "memory_bytes", "resume_s"}
    for name, value in told.items():
        if name != "heartbeat_s":
            assert int(value) in (getattr(limits, name), getattr(limits, name) / (1 << 20))
    assert f"{MAX_BODY_BYTES >> 10} KiB" in MANUAL
