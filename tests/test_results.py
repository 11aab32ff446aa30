"""What parties write for the report comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from fedbio.errors import FormatError
from fedbio.results import (
    METRICS_COLUMNS,
    ClassCounts,
    DataRecord,
    EncoderInfo,
    EventLog,
    Metric,
    PartyRecord,
    Traffic,
    read_party,
    write_party,
    write_table,
)

ENCODER = EncoderInfo("esm1nv-44m", "ab" * 32, False, 768, "mean", 6, "float32", 510, "cut")


def test_a_party_record_comes_back_equal(tmp_path: Path) -> None:
    record = PartyRecord(
        party="site-1",
        role="site",
        seconds={"embed": 1.5},
        encoder=ENCODER,
        data=DataRecord("a.fasta", True, 3, 120, 0, ClassCounts(train={"Nucleus": 2}, test={"Plastid": 1})),
        sent={"model": Traffic(3, 1000)},
    )
    assert read_party(write_party(tmp_path, record)) == record


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"party": 3}', b'{"party": "a", "role": "site", "version": 2}', b"\xff"]
)
def test_a_damaged_party_record_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "party.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"party\.json: not a record that this release can read"):
        read_party(tmp_path / "party.json")


def test_a_table_has_a_header_and_plain_line_ends(tmp_path: Path) -> None:
    rows = [Metric("federated", "32", "test", 0, 4, "accuracy", 0.75)]
    path = write_table(tmp_path / "metrics.csv", METRICS_COLUMNS, rows)
    assert path.read_bytes() == b"party,model,split,seed,round,metric,value\nfederated,32,test,0,4,accuracy,0.75\n"


def test_an_event_is_one_line_and_a_log_goes_on(tmp_path: Path) -> None:
    for number in (1, 2):
        log = EventLog(tmp_path, "site-1")
        log.write("sent", kind="model", bytes=number)
        log.close()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["party"], event["event"], event["bytes"]) for event in events] == [
        ("site-1", "sent", 1),
        ("site-1", "sent", 2),
    ]


def test_encoders_differ_in_what_is_the_reason_and_not_in_what_follows() -> None:
    ends = msgspec.structs.replace(ENCODER, pooling="ends", width=3840, bins="start 20 40, end 10 30")
    other_bins = msgspec.structs.replace(ends, width=2304, bins="start 50, end 50")
    assert ENCODER.differing(ENCODER) == []
    assert ENCODER.differing(msgspec.structs.replace(ends, layer=5)) == ["pooling", "layer"]
    assert ends.differing(other_bins) == ["width", "bins"]


def test_a_name_tells_encoders_apart_only_where_the_weights_are_not_known() -> None:
    known, unknown = (msgspec.structs.replace(ENCODER, weights_sha256=digest) for digest in ("0" * 64, "unknown"))
    assert known.differing(msgspec.structs.replace(known, name="other")) == []
    assert unknown.differing(msgspec.structs.replace(unknown, name="other")) == ["name"]
    assert known.differing(msgspec.structs.replace(known, name="other", weights_sha256="1" * 64)) == [
        "name", "weights_sha256",
    ]  # fmt: skip


def test_an_encoder_is_told_as_before_the_bins_were_known() -> None:
    told = msgspec.json.decode(msgspec.json.encode(ENCODER))
    assert "bins" not in told
    assert msgspec.convert(told, EncoderInfo) == ENCODER
