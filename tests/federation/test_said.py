"""What a site says is shown on one line, does nothing to a terminal, and is not endless."""

from __future__ import annotations

import logging

import msgspec
import pytest

from fedbio.cli.terminal import LogFormatter
from fedbio.federation import Result
from fedbio.federation.admin import LINES, LINES_BYTES, _batches
from fedbio.federation.model import Status
from fedbio.federation.said import plain, plain_result


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("too few proteins", "too few proteins"),
        ("Zürich 細胞", "Zürich 細胞"),
        ("first\nsecond\r\nthird", "first | second | third"),
        ("\x1b[2J\x07gone", r"\x1b[2J\x07gone"),
        ("\u202efdp.exe", r"\u202efdp.exe"),
        ("a\udcffb", r"a\udcffb"),
        ("", ""),
    ],
)
def test_text_is_on_one_line_and_only_prints(said: str, shown: str) -> None:
    assert plain(said) == shown


def test_long_text_is_cut_and_says_so() -> None:
    assert plain("x" * 50, 40) == "x" * 40 + " ... (10 characters more)"


def test_result_keeps_few_short_lines_under_the_name_of_its_certificate() -> None:
    said = Result(
        task="1",
        status=Status.FAILED,
        reason="\x1b]0;r\x07" * 10_000,
        last_lines=("\x1b[1m" + "y" * 9_000,) * 90,
        site="site-9",
    )
    kept = plain_result(said, "site-1")
    assert kept.site == "site-1"
    assert len(msgspec.msgpack.encode(kept)) < 40_000
    assert len(kept.last_lines) == 20
    assert "\x1b" not in kept.reason + "".join(kept.last_lines)


def test_log_shows_lines_and_no_control_characters() -> None:
    record = logging.LogRecord("fedbio", logging.INFO, "", 0, "site=%s", ("a\x1b[2J\r\n  b\tc\x9b",), None)
    assert LogFormatter("%(levelname)s %(message)s").format(record) == "INFO site=a\\x1b[2J\\r\n  b\tc\\x9b"


def test_events_are_shared_out_to_answers_that_can_be_sent() -> None:
    short, long = (
        '{"event": "e"}',
        '{"time": "t", "event": "task closed", "job": "j", "missing": "%s"}' % ("m" * LINES_BYTES),
    )
    batches = list(_batches([short] * (LINES + 1) + [long] + [short.ljust(100_000)] * 5))
    assert [len(batch) for batch in batches] == [LINES, 4, 2, 1]
    assert all(sum(map(len, batch)) <= LINES_BYTES for batch in batches)
    assert msgspec.json.decode(batches[1][1]) == {
        "time": "t", "party": None, "event": "task closed", "job": "j", "bytes": len(long),
    }  # fmt: skip
