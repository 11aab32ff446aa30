"""Connections that break in the middle of a large task or result, over real sockets: delivered once, and told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbio.errors import FederationError, PeerUnreachable

SITES = ("site-1", "site-2", "site-3")
WIDTH = 200
HIDDEN = "65536"
MODEL_BYTES = 4 * 65536 * (WIDTH + 1 + 2)
"""53 MB."""


class Wire:
    """Passes bytes on between a site and the server, and cuts the connection once so many have gone one way."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._listening.getsockname()[1]}"
        self.cuts = {"up": 0, "down": 0}
        self.passed = {"up": 0, "down": 0}
        self._cut_at: dict[str, int] = {}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, way: str, more: int) -> None:
        """Cut when so many bytes more have gone this way."""
        with self._lock:
            self._cut_at[way] = self.passed[way] + more

    def close(self) -> None:
        # whoever waits in one of them wakes up
        for each in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                site, _ = self._listening.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except ConnectionRefusedError:
                    site.close()
                    continue
                self._open |= {site, server}
                for way, source, sink in (("up", site, server), ("down", server, site)):
                    threading.Thread(target=self._pass_on, args=(way, source, sink), daemon=True).start()

    def _pass_on(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                with self._lock:
                    self.passed[way] += len(chunk)
                    cut = self.passed[way] >= self._cut_at.get(way, 1 << 60)
                    if cut:
                        del self._cut_at[way]
                        self.cuts[way] += 1
                if cut:
                    break
                sink.sendall(chunk)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def wire(free_port: int) -> Iterator[Wire]:
    made = Wire(free_port)
    yield made
    made.close()


def events(folder: Path, *names: str, **having: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [
        each
        for each in lines
        if each["event"] in names and all(each.get(key) == value for key, value in having.items())
    ]


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["grpc", "tcp"])
def test_broken_connection_sends_neither_task_nor_result_twice(
    federation: Any, wire: Wire, free_port: int, driver: str
) -> None:
    jobs = federation.jobs(rounds=2, mlp=HIDDEN, round_deadline_s=60)
    executors = {name: federation.fakes(WIDTH) for name in SITES}
    honest = executors["site-1"]["train"].answer

    def train(model: Any, context: Any) -> Any:
        if model.current_round == 0:
            # its result, of 53 MB, is cut; and the next task behind it
            wire.cut_after("up", MODEL_BYTES // 2)
            wire.cut_after("down", MODEL_BYTES // 2)
        return honest(model, context)

    executors["site-1"]["train"].answer = train
    server = federation.start(federation.server(jobs, listen=f"127.0.0.1:{free_port}", driver=driver))
    addresses = dict.fromkeys(SITES, f"localhost:{free_port}") | {"site-1": wire.address}
    sites = [
        federation.start(federation.site(name, executors[name], server=addresses[name], driver=driver))
        for name in SITES
    ]
    for each in (server, *sites):
        each.result(120)

    assert wire.cuts == {"up": 1, "down": 1}
    there, here = federation.folder / "server", federation.folder / "site-1"
    assert [each["event"] for each in events(there, "site joined", "site lost", "site back", site="site-1")] == [
        "site joined",
        "site lost",
        "site back",
        "site lost",
        "site back",
    ]
    assert events(there, "result refused", "task not taken") == []
    assert [each["event"] for each in events(here, "server arrived", "server lost", "server back")] == [
        "server arrived",
        "server lost",
        "server back",
        "server lost",
        "server back",
    ]
    # one message for each, as at a site whose connection held; the first site also draws the initial model
    for other in SITES[1:]:
        assert len(events(there, "sent", to="site-1")) == 1 + len(events(there, "sent", to=other))
    assert [each["round"] for each in events(here, "task done", task="train")] == [0, 1]
    assert executors["site-1"]["train"].calls == executors["site-2"]["train"].calls == 2
    # what was under way is sent again, and no more
    ours = sum(each["bytes"] for each in events(here, "sent"))
    theirs = sum(each["bytes"] for each in events(there, "sent", to="site-1"))
    for way, told in (("up", ours), ("down", theirs)):
        assert wire.passed[way] < 1.02 * told + (16 << 20)


@pytest.mark.slow
def test_new_process_of_a_site_gets_the_task_that_the_old_one_had(federation: Any, wire: Wire, free_port: int) -> None:
    """The old process holds its task when it is cut off for good; the new one is given the task."""
    jobs = federation.jobs(rounds=1, mlp=HIDDEN, round_deadline_s=60)
    fakes = {name: federation.fakes(WIDTH) for name in SITES}
    stuck, over = threading.Event(), threading.Event()

    def hold(model: Any, context: Any) -> Any:
        stuck.set()
        over.wait(60)
        raise KeyboardInterrupt

    fakes["site-1"]["train"].answer = hold
    server = federation.start(federation.server(jobs, listen=f"127.0.0.1:{free_port}", driver="tcp"))
    options = {"server": f"localhost:{free_port}", "driver": "tcp"}
    others = [federation.start(federation.site(name, fakes[name], **options)) for name in SITES[1:]]
    old = federation.site("site-1", fakes["site-1"], **{**options, "server": wire.address})
    first = federation.pool.submit(old.run)
    assert stuck.wait(30)
    wire.close()
    over.set()
    with pytest.raises(KeyboardInterrupt):
        first.result(30)
    again = federation.fakes(WIDTH)
    second = federation.start(federation.site("site-1", again, **options))
    for each in (second, server, *others):
        each.result(60)
    assert again["train"].calls == 1
    # who is asked for a sign of life because its successor is at the door need not be lost first
    seen = events(federation.folder / "server", "site joined", "site gone", site="site-1")
    assert [each["event"] for each in seen] == ["site joined", "site gone", "site joined", "site gone"]


@pytest.mark.slow
def test_site_that_has_lost_its_server_for_good_stops_what_it_does(federation: Any, wire: Wire, free_port: int) -> None:
    """A script may train for hours: its site does not wait for a result that nobody takes."""
    jobs = federation.jobs(rounds=1, round_deadline_s=5, min_sites=2)
    stuck, stopped = threading.Event(), threading.Event()
    fakes = federation.fakes()

    def hold(model: Any, context: Any) -> Any:
        stuck.set()
        assert stopped.wait(30)
        raise FederationError("stopped")

    fakes["train"].answer = hold
    fakes["train"].close = stopped.set
    server = federation.start(federation.server(jobs, listen=f"127.0.0.1:{free_port}", driver="tcp"))
    others = [
        federation.start(federation.site(name, server=f"localhost:{free_port}", driver="tcp")) for name in SITES[1:]
    ]
    site = federation.start(federation.site("site-1", fakes, server=wire.address, driver="tcp", connect_deadline_s=2.0))
    assert stuck.wait(30)
    wire.close()
    with pytest.raises(PeerUnreachable, match="not reached within 2 s"):
        site.result(30)
    assert stopped.is_set()
    for each in (server, *others):
        each.result(60)
