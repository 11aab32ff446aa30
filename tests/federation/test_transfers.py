"""Bars for large payloads: a line now and then, nothing for what is soon over."""

from __future__ import annotations

import io

import pytest

from fedbio import progress
from fedbio.federation.transfers import Transfers
from fedbio.transport import Progress

MB = 10**6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def report(transfers: Transfers, done: int, total: int | None = 200 * MB, *, outgoing: bool = True) -> None:
    transfers(Progress("site-1", "task", outgoing, done, total, 1.0))


def test_long_transfer_has_a_line_every_ten_seconds_and_one_at_its_end(clock: list[float]) -> None:
    stream = io.StringIO()
    with Transfers(stream) as transfers:
        for seconds in range(21):
            clock[0] = 100.0 + seconds
            report(transfers, 10 * MB * seconds)
    assert stream.getvalue().splitlines() == [
        "task to site-1: 100.0 MB of 200.0 MB (50%) in 10 s at 10.0 MB/s, about 10 s left",
        "task to site-1: 200.0 MB of 200.0 MB (100%) in 20 s at 10.0 MB/s",
    ]


def test_short_and_small_transfers_leave_no_line(clock: list[float]) -> None:
    stream = io.StringIO()
    with Transfers(stream) as transfers:
        report(transfers, 100 * MB)
        clock[0] += 5
        report(transfers, 200 * MB)
        for _ in range(30):
            clock[0] += 10
            report(transfers, MB, 2 * MB)
    assert stream.getvalue() == ""


def test_transfer_that_was_broken_off_makes_way_for_the_next(clock: list[float]) -> None:
    stream = io.StringIO()
    with Transfers(stream) as transfers:
        report(transfers, 50 * MB)
        clock[0] += 60
        report(transfers, 10 * MB)
        clock[0] += 10
        report(transfers, 60 * MB)
    assert stream.getvalue() == "task to site-1: 60.0 MB of 200.0 MB (30%) in 10 s at 6.0 MB/s, about 23 s left\n"


def test_size_that_nobody_knows_is_shown_without_an_end(clock: list[float]) -> None:
    stream = io.StringIO()
    with Transfers(stream) as transfers:
        report(transfers, 10 * MB, None, outgoing=False)
        clock[0] += 10
        report(transfers, 40 * MB, None, outgoing=False)
    assert stream.getvalue() == "task from site-1: 40.0 MB in 10 s at 4.0 MB/s\n"


def test_bar_on_a_terminal_vanishes_when_the_transfer_is_over() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Transfers(stream) as transfers:
        report(transfers, 100 * MB)
        report(transfers, 200 * MB)
    assert "task to site-1: " in stream.getvalue()
    assert stream.getvalue().endswith("\r")
