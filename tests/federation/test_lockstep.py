"""Averaging in lockstep over real connections: the bits of an average in memory, and what happens to sites at fault."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.errors import DataError, FederationError
from fedbio.federation import messages
from fedbio.federation.lockstep import Lockstep
from fedbio.federation.lockstep_site import LockstepSite
from fedbio.federation.messages import Exchange
from fedbio.provision import provision
from fedbio.settings import FederationFile
from fedbio.tensors import chunks, manifest, weighted_mean
from fedbio.transport import (
    BytesPayload,
    Credentials,
    Limits,
    MemorySink,
    Payload,
    Presence,
    ServerEndpoint,
    SiteEndpoint,
    TensorPayload,
)

F = np.float32
NAMES = ("site-1", "site-2", "site-3")
WEIGHTS = dict(zip(NAMES, (10.0, 20.0, 5.0), strict=True))


def model(site: str) -> dict[str, np.ndarray]:
    """About 12 MiB, more than the windows of both ends."""
    dice = np.random.default_rng(int(site[-1]))
    return {"w": dice.standard_normal((3_000, 1_001)).astype(F), "b": dice.standard_normal(7).astype(F)}


MODELS = {name: model(name) for name in NAMES}
MANIFEST = manifest(MODELS["site-1"])


def mean_of(*sites: str) -> dict[str, np.ndarray]:
    return weighted_mean([(name, MODELS[name], WEIGHTS[name]) for name in sites])


def eventually(condition: Callable[[], object], within_s: float = 10.0) -> None:
    done = threading.Event()
    for _ in range(int(within_s / 0.02)):
        if condition():
            return
        done.wait(0.02)
    raise AssertionError("the condition did not come true in time")


class Member:
    """A site with a model in memory."""

    def __init__(self, server: str, credentials: Credentials, folder: Path, part: Callable[[], Payload]) -> None:
        self.adopted: list[tuple[Exchange, dict[str, np.ndarray]]] = []
        self.calls = 0
        self.part = part
        self.lockstep = LockstepSite(
            lambda *message: self.endpoint.send(*message),
            part=self._part,
            store=lambda exchange, size: MemorySink(size),
            adopt=lambda exchange, mean: self.adopted.append((exchange, mean.tensors())),
        )
        self.endpoint = SiteEndpoint(
            server,
            credentials,
            spool=folder,
            on_message=self.lockstep.take,
            sinks={messages.MEAN: self.lockstep.sink},
            driver="memory",
        )

    def _part(self, exchange: Exchange) -> Payload:
        self.calls += 1
        return self.part()


class Federation:
    """A server and three sites over the memory driver."""

    def __init__(self, kits: Path, folder: Path, parts: dict[str, Callable[[], Payload]]) -> None:
        self.lockstep = Lockstep(lambda *message: self.server.send(*message))
        self.server = ServerEndpoint(
            "memory:0",
            Credentials.from_kit(kits / "server"),
            spool=folder,
            on_message=self.lockstep.take,
            on_peer=lambda site, presence: self.lockstep.gone(site) if presence is Presence.GONE else None,
            sinks={messages.PART: self.lockstep.sink},
            limits=Limits(resume_s=1.0),
            heartbeat_s=0.2,
            driver="memory",
        ).start()
        self.sites = {
            name: Member(self.server.address, Credentials.from_kit(kits / name), folder / name, part)
            for name, part in parts.items()
        }
        for member in self.sites.values():
            member.endpoint.start()

    def average(self, **options: Any) -> Any:
        return self.lockstep.average(WEIGHTS, MANIFEST, NAMES, timeout_s=30, **options)

    def close(self) -> None:
        for member in self.sites.values():
            member.endpoint.close()
        self.server.close()


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    settings = {"federation": "test", "server": {"address": "127.0.0.1:1"}, "sites": list(NAMES)}
    provision(FederationFile.model_validate(settings), folder)
    return folder


@pytest.fixture
def federate(kits: Path, tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(**parts: Callable[[], Payload]) -> Federation:
        every = {
            name: parts.get(name.replace("-", "_"), lambda name=name: TensorPayload(MODELS[name])) for name in NAMES
        }
        made.append(Federation(kits, tmp_path, every))
        return made[-1]

    yield make
    for each in made:
        each.close()


def assert_holds(member: Member, expected: dict[str, np.ndarray]) -> None:
    [(_, mean)] = member.adopted
    assert mean.keys() == expected.keys()
    for name, tensor in expected.items():
        assert mean[name].tobytes() == tensor.tobytes()


def test_every_site_adopts_the_bits_of_an_average_in_memory(federate: Callable[..., Federation]) -> None:
    federation = federate()
    noted: list[Any] = []
    done = federation.average(run="study", number=4, on_commit=noted.append)
    assert (done.parts, done.holders, done.faults) == (NAMES, NAMES, {})
    assert noted == [done]
    assert (done.exchange.run, done.exchange.round, done.exchange.attempt) == ("study", 4, 1)
    for member in federation.sites.values():
        eventually(lambda member=member: member.adopted)
        assert_holds(member, mean_of(*NAMES))


def spoiled() -> Payload:
    tensors = {name: tensor.copy() for name, tensor in MODELS["site-3"].items()}
    tensors["w"][2_900, 5] = np.nan
    return TensorPayload(tensors)


def silent() -> Payload:
    raise DataError("there is no model here")


FAULTS: dict[str, tuple[Callable[[], Payload], str]] = {
    "nan": (spoiled, "tensor 'w': value 2902905 is not finite"),
    "shape": (lambda: TensorPayload({**MODELS["site-3"], "b": np.zeros(8, F)}), "tensor 'b': float32 [8], expected"),
    "names": (lambda: TensorPayload({"w": MODELS["site-3"]["w"]}), "1 tensor(s) missing: 'b'"),
    "short": (
        lambda: BytesPayload(list(chunks(MODELS["site-3"]))[:5]),
        "tensor 'w': ends at element 1310684 of 3003000",
    ),
    "no model": (lambda: BytesPayload([b"x" * 100_000]), "header of"),
    "nothing": (silent, "it holds no part"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_round_is_repeated_without_a_site_at_fault(federate: Callable[..., Federation], fault: str) -> None:
    part, reason = FAULTS[fault]
    federation = federate(site_3=part)
    done = federation.average()
    assert (done.parts, done.holders) == (("site-1", "site-2"), NAMES)
    assert done.exchange.attempt == 2
    assert reason in done.faults["site-3"]
    for member in federation.sites.values():
        eventually(lambda member=member: member.adopted)
        assert_holds(member, mean_of("site-1", "site-2"))
    assert [member.calls for member in federation.sites.values()] == [2, 2, 1]


def test_site_whose_sending_breaks_off_is_left_out(federate: Callable[..., Federation]) -> None:
    def broken() -> Iterator[memoryview]:
        yield from list(chunks(MODELS["site-3"]))[:9]
        raise DataError("the disk has failed")

    federation = federate(site_3=lambda: BytesPayload(broken()))
    done = federation.average()
    assert done.parts == ("site-1", "site-2")
    assert "broken off" in done.faults["site-3"]
    eventually(lambda: federation.sites["site-1"].adopted)
    assert_holds(federation.sites["site-1"], mean_of("site-1", "site-2"))


def test_nothing_is_adopted_when_too_few_parts_are_left(federate: Callable[..., Federation]) -> None:
    federation = federate(site_3=spoiled)
    with pytest.raises(FederationError, match=r"2 of 3 sites can be averaged, 3 are needed; site-3: .* not finite"):
        federation.average(min_parts=3)
    assert not any(member.adopted for member in federation.sites.values())


def test_site_that_left_holds_nobody_up(federate: Callable[..., Federation]) -> None:
    federation = federate()
    federation.sites["site-2"].endpoint.close()
    eventually(lambda: "site-2" not in federation.server.peers())
    done = federation.average()
    assert (done.parts, done.holders) == (("site-1", "site-3"), ("site-1", "site-3"))
    eventually(lambda: federation.sites["site-1"].adopted)
    assert_holds(federation.sites["site-1"], mean_of("site-1", "site-3"))


def test_site_of_weight_zero_receives_and_is_not_called(federate: Callable[..., Federation]) -> None:
    federation = federate()
    done = federation.lockstep.average({**WEIGHTS, "site-2": 0.0}, MANIFEST, NAMES, timeout_s=30)
    assert (done.parts, done.holders) == (("site-1", "site-3"), NAMES)
    assert federation.sites["site-2"].calls == 0
    eventually(lambda: federation.sites["site-2"].adopted)
    assert_holds(federation.sites["site-2"], mean_of("site-1", "site-3"))


def test_model_of_one_site_passes_through_to_another(federate: Callable[..., Federation]) -> None:
    federation = federate()
    done = federation.lockstep.average({"site-1": 1.0}, MANIFEST, ["site-3"], timeout_s=30)
    assert done.holders == ("site-3",)
    eventually(lambda: federation.sites["site-3"].adopted)
    assert_holds(federation.sites["site-3"], MODELS["site-1"])


def test_part_that_nobody_called_for_is_refused(federate: Callable[..., Federation]) -> None:
    federation = federate()
    member = federation.sites["site-1"]
    with pytest.raises(Exception, match="attempt 1 of this exchange is over"):
        member.endpoint.send(messages.PART, messages.pack(Exchange("0")), TensorPayload(MODELS["site-1"]))
    member.lockstep.take(type("Late", (), {"topic": messages.COMMIT, "body": messages.pack(Exchange("0"))})())
    assert member.adopted == []


PROCESS = """
import os, signal, sys
import numpy as np
from pathlib import Path
from fedbio.federation import messages
from fedbio.federation.lockstep_site import LockstepSite
from fedbio.tensors import chunks
from fedbio.transport import BytesPayload, Credentials, MemorySink, SiteEndpoint
from tests.federation.test_lockstep import MODELS, mean_of

kits, folder, server, name, ending = sys.argv[1:]

def part(exchange):
    def made():
        for number, chunk in enumerate(chunks(MODELS[name])):
            if ending == "dies" and number == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            yield chunk
    return BytesPayload(made())

def adopt(exchange, mean):
    expected = mean_of("site-1", "site-2")
    same = all(mean.tensors()[key].tobytes() == expected[key].tobytes() for key in expected)
    print("same" if same else "other", flush=True)

site = LockstepSite(
    lambda *message: endpoint.send(*message), part=part, store=lambda exchange, size: MemorySink(size), adopt=adopt
)
endpoint = SiteEndpoint(server, Credentials.from_kit(Path(kits) / name), spool=folder, on_message=site.take,
                        sinks={messages.MEAN: site.sink})
endpoint.start()
endpoint.wait()
"""


@pytest.mark.slow
def test_others_end_with_the_mean_without_a_process_that_is_killed_in_mid_stream(kits: Path, tmp_path: Path) -> None:
    """Three processes over TLS; the third is killed while it sends."""
    lockstep = Lockstep(lambda *message: server.send(*message))
    arrived = threading.Semaphore(0)

    def on_peer(site: str, presence: Presence) -> None:
        if presence is Presence.ARRIVED:
            arrived.release()
        elif presence is Presence.GONE:
            lockstep.gone(site)

    server = ServerEndpoint(
        "127.0.0.1:0",
        Credentials.from_kit(kits / "server"),
        spool=tmp_path,
        on_message=lockstep.take,
        on_peer=on_peer,
        sinks={messages.PART: lockstep.sink},
        limits=Limits(resume_s=1.0),
        heartbeat_s=0.5,
    )
    with server:
        processes = {
            name: subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(kits), str(tmp_path / name), server.address, name, ending],
                cwd=Path(__file__).parents[2],
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, ending in zip(NAMES, ("lives", "lives", "dies"), strict=True)
        }
        try:
            for _ in NAMES:
                assert arrived.acquire(timeout=30)
            done = lockstep.average(WEIGHTS, MANIFEST, NAMES, timeout_s=60)
            assert (done.parts, done.holders) == (("site-1", "site-2"), ("site-1", "site-2"))
            assert list(done.faults) == ["site-3"]
            for name in done.holders:
                assert processes[name].stdout.readline() == "same\n"
            assert processes["site-3"].wait(10) == -9
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
