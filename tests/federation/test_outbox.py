"""What leaves the server can be stopped: a job that is interrupted does not wait for a large file."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedbio.errors import FederationError, TransportError
from fedbio.federation import messages
from fedbio.federation.ledger import Ledger
from fedbio.federation.messages import FileHeader
from fedbio.federation.outbox import Outbox
from fedbio.results import EventLog, PartyRecord
from fedbio.transport import ServerEndpoint, Sink, SiteEndpoint
from fedbio.transport.credentials import Unencrypted

HEADER = FileHeader("0" * 64, "weights.bin", "1" * 64)


class Stuck(Sink):
    """Takes the first chunk, and no more until it may."""

    def __init__(self, begun: threading.Event, go_on: threading.Event) -> None:
        self.begun, self.go_on = begun, go_on

    def write(self, chunk: memoryview) -> None:
        self.begun.set()
        self.go_on.wait(60)

    def finish(self) -> None:
        return None

    def abort(self) -> None:
        pass


def test_interrupted_job_does_not_wait_for_its_file_and_another_jobs_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    with open(file, "wb") as sparse:
        sparse.truncate(256 << 20)
    events = EventLog(tmp_path, "server")
    address, go_on = str(tmp_path / "socket"), threading.Event()
    here, begun = threading.Event(), {name: threading.Event() for name in ("site-1", "site-2")}
    with (
        ServerEndpoint(
            address,
            Unencrypted("server"),
            spool=tmp_path / "spool",
            on_message=lambda received: None,
            on_peer=lambda name, presence: here.set(),
            driver="local",
        ) as server,
        ThreadPoolExecutor() as pool,
    ):
        sites = [
            SiteEndpoint(
                address,
                Unencrypted(name),
                spool=tmp_path / name,
                on_message=lambda received: None,
                sinks={messages.FILE: lambda opening, name=name: Stuck(begun[name], go_on)},  # type: ignore[misc]
                driver="local",
            ).start()
            for name in begun
        ]
        outbox = Outbox(server, Ledger(PartyRecord("server", "server"), events), deadline_s=60)
        try:
            sent = {
                job: pool.submit(outbox.send_file, site, file, HEADER, "encoder", job=job, check=lambda: None)
                for job, site in (("ended", "site-1"), ("other", "site-2"))
            }
            assert all(each.wait(20) for each in begun.values())
            outbox.interrupt("ended")
            with pytest.raises(TransportError):
                sent["ended"].result(10)
            assert not sent["other"].done()
            go_on.set()
            sent["other"].result(30)
        finally:
            go_on.set()
            for site in sites:
                site.close()
            outbox.close()
            events.close()


def test_file_of_a_job_that_was_interrupted_before_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    events = EventLog(tmp_path, "server")
    record = PartyRecord("server", "server")

    def check() -> None:
        raise FederationError("aborted by admin")

    outbox = Outbox(None, Ledger(record, events), deadline_s=1)  # type: ignore[arg-type]
    with pytest.raises(FederationError, match="aborted by admin"):
        outbox.send_file("site-1", tmp_path / "file", HEADER, "encoder", job="a", check=check)
    assert record.sent == {}
    outbox.close()
    events.close()
