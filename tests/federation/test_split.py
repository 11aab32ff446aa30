"""Split learning over real endpoints, against the network in one piece; what passes the server, and what may not."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from fedbio.errors import FedbioError, FederationError, ProtocolError
from fedbio.executors.script import Deploy, EndScript, Scripts
from fedbio.executors.split import AlignRows, FinishPart, Meet, SplitParts, TrainPart
from fedbio.federation import Executor, messages
from fedbio.federation.messages import Passage, pack
from fedbio.federation.policy import ANY, Policy
from fedbio.federation.split_items import MAX_ITEMS, ItemsSink
from fedbio.federation.split_relay import SplitRelay
from fedbio.federation.split_site import SplitSite
from fedbio.settings import JobsFile
from fedbio.tensors import open_file
from fedbio.transport import Opening, Received
from fedbio.transport.objects import Announcement, object_chunks
from fedbio.transport.receiver import Receiver

BOTTOM, TOP = "site-1", "site-2"
ROWS, WIDTH, CLASSES, SEED = 50, 6, 3, 7

SCRIPT = """
import time

import numpy as np
import torch
from torch import nn

WIDTH, HIDDEN, CLASSES = 6, {hidden}, 3


def drawn(shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32) / shape[-1] ** 0.5)


def linear(inputs, outputs, seed):
    layer = nn.Linear(inputs, outputs)
    layer.load_state_dict({{"weight": drawn((outputs, inputs), seed), "bias": drawn((outputs,), seed + 1)}})
    return layer


def bottom():
    return nn.Sequential(linear(WIDTH, HIDDEN, 1), nn.Tanh())


def top():
    return nn.Sequential(linear(HIDDEN, 5, 3), nn.ReLU(), linear(5, CLASSES, 5))


class Recording(torch.optim.{optimizer}):
    # what every step went by
    def step(self, closure=None):
        for group in self.param_groups:
            seen.append([parameter.grad.clone().numpy() for parameter in group["params"]])
        return super().step(closure)


seen = []


def optimizer(module):
    return Recording(module.parameters(), lr=0.05{options})


def features(here):
    found = np.load(here.data.parent / f"{{here.site}}.npz")
    return found["ids"], torch.from_numpy(found["features"])


def labels(here):
    found = np.load(here.data.parent / f"{{here.site}}.npz")
    return found["ids"], torch.from_numpy(found["labels"])


def loss(output, labels):
    time.sleep({pause})
    return nn.functional.cross_entropy(output, labels)
"""


def script(optimizer: str = "SGD", options: str = ", momentum=0.9", hidden: int = 8, pause: float = 0) -> str:
    return SCRIPT.format(optimizer=optimizer, options=options, hidden=hidden, pause=pause)


def ids_of(site: str) -> list[str]:
    """Return ids in another order at each site; ROWS of them are at both."""
    first = 0 if site == BOTTOM else 10
    ids = [f"PLANTED-PROTEIN-{number:03}" for number in range(first, first + ROWS + 10)]
    return [ids[row] for row in np.random.default_rng(first).permutation(len(ids))]


def table() -> dict[str, tuple[np.ndarray, int]]:
    """Return features and label of every protein, by id."""
    random = np.random.default_rng(11)
    features = random.normal(size=(ROWS + 20, WIDTH)).astype(np.float32)
    labels = random.integers(CLASSES, size=ROWS + 20)
    return {f"PLANTED-PROTEIN-{number:03}": (features[number], int(labels[number])) for number in range(ROWS + 20)}


def fasta(folder: Path) -> None:
    """Write what `fedbio site` wants to see; the script reads its rows elsewhere."""
    for site in (BOTTOM, TOP):
        (folder / f"{site}.fasta").write_text(">P1 TARGET=Nucleus SET=train\nMKV\n>P2 TARGET=Nucleus SET=train\nMKI\n")


def write_rows(folder: Path) -> None:
    rows = table()
    for site in (BOTTOM, TOP):
        ids = ids_of(site)
        np.savez(
            folder / f"{site}.npz",
            ids=np.array(ids),
            **({"features": np.stack([rows[each][0] for each in ids])} if site == BOTTOM else {}),
            **({"labels": np.array([rows[each][1] for each in ids])} if site == TOP else {}),
        )


def executors() -> dict[str, Executor]:
    scripts = Scripts()
    parts = SplitParts(scripts)
    found: list[Executor] = [Deploy(scripts), EndScript(scripts)]
    found += [kind(parts) for kind in (Meet, AlignRows, TrainPart, FinishPart)]
    return {each.name: each for each in found}


class Split:
    """Runs a split job with two sites in this process."""

    def __init__(self, federation: Any) -> None:
        self.federation, self.folder = federation, federation.folder
        self.executors = {site: executors() for site in (BOTTOM, TOP)}
        write_rows(self.folder)

    def jobs(self, **job: Any) -> JobsFile:
        job.setdefault("name", "split")
        settings = {"workflow": "split", "bottom": BOTTOM, "top": TOP, "client": {"script": "net.py"}, "seed": SEED}
        return JobsFile.model_validate(
            {
                "jobs": [{**settings, "epochs": 2, "batch_size": 8, **job}],
                "sites": [BOTTOM, TOP],
                "federation": {"join_deadline_s": 20, "round_deadline_s": 40, "heartbeat_s": 0.5},
            }
        )

    def site(self, name: str, **options: Any) -> Any:
        options = {
            "allow": ("code", "split"),
            "policy": Policy(code=frozenset([ANY])),
            "examples": ROWS,
            **options,
        }
        return self.federation.site(name, self.executors[name], **options)

    def start(self, text: str, **job: Any) -> tuple[Any, list[Any]]:
        (self.folder / "net.py").write_text(text)
        server = self.federation.start(self.federation.server(self.jobs(**job), code=self.folder))
        return server, [self.federation.start(self.site(name)) for name in (BOTTOM, TOP)]

    def run(self, text: str, **job: Any) -> None:
        server, sites = self.start(text, **job)
        for each in (server, *sites):
            each.result(90)

    def fail(self, text: str, **job: Any) -> str:
        """Return what a job that cannot be done ends with; every party ends."""
        server, sites = self.start(text, **job)
        with pytest.raises(FederationError) as caught:
            server.result(60)
        for each in sites:
            assert isinstance(each.exception(60), FedbioError)
        return str(caught.value)

    def part(self, site: str) -> dict[str, np.ndarray]:
        role = "bottom" if site == BOTTOM else "top"
        return {
            k: v.copy() for k, v in open_file(self.folder / site / "split" / "split" / f"{role}.safetensors").items()
        }

    def script_of(self, site: str) -> Any:
        """Return the script's module as it was loaded at a site."""
        [member] = self.executors[site]["split/train"].parts._members.values()  # type: ignore[attr-defined]
        return member.script._module

    def events(self, name: str, party: str = "server") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / party / "events.jsonl").read_text().splitlines()]
        return [each for each in lines if each["event"] == name]


@pytest.fixture
def split(federation: Any) -> Split:
    return Split(federation)


def namespace(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "reference"}
    exec(text, found)
    return found


def whole_network(text: str, *, epochs: int = 2, batch_size: int = 8) -> tuple[Any, Any, list[list[np.ndarray]]]:
    """Train the network in one piece, in a plain loop; return its two parts and the gradients of every step."""
    script = namespace(text)
    bottom, top = script["bottom"](), script["top"]()
    network = torch.nn.Sequential(bottom, top)
    kind = type(script["optimizer"](network)).__mro__[1]
    optimizer = script["optimizer"](network)
    assert isinstance(optimizer, kind)
    shared = sorted(set(ids_of(BOTTOM)) & set(ids_of(TOP)))
    assert len(shared) == ROWS
    rows = table()
    x = torch.from_numpy(np.stack([rows[each][0] for each in shared]))
    y = torch.tensor([rows[each][1] for each in shared])
    for epoch in range(epochs):
        order = np.random.default_rng([SEED, epoch]).permutation(ROWS)
        for batch in np.array_split(order, -(-ROWS // batch_size)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return bottom, top, script["seen"]


def assert_same(found: dict[str, np.ndarray], expected: torch.nn.Module) -> None:
    wanted = expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("optimizer", "options"), [("SGD", ", momentum=0.9"), ("Adam", "")])
def test_both_parts_are_those_of_the_network_in_one_piece(split: Split, optimizer: str, options: str) -> None:
    text = script(optimizer, options)
    gradients: dict[str, list[list[np.ndarray]]] = {}
    for site in (BOTTOM, TOP):
        finish = split.executors[site]["split/finish"]
        original = finish.execute

        def keep(task: Any, model: Any, context: Any, original: Any = original, site: str = site) -> Any:
            gradients[site] = split.script_of(site).seen
            return original(task, model, context)

        finish.execute = keep  # type: ignore[method-assign]
    split.run(text)
    bottom, top, seen = whole_network(text)
    assert len(seen) == len(gradients[BOTTOM]) == len(gradients[TOP]) == 14
    for whole, below, above in zip(seen, gradients[BOTTOM], gradients[TOP], strict=True):
        for expected, found in zip(whole, [*below, *above], strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert_same(split.part(BOTTOM), bottom)
    assert_same(split.part(TOP), top)
    # it has learnt something, and the server knows the losses
    losses = [each["loss"] for each in split.events("epoch")]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_activations_of_many_chunks_pass_whole(split: Split) -> None:
    # 50 rows of 40,000 floats are 8 MB, eight chunks
    text = script(hidden=40_000)
    split.run(text, batch_size=50, epochs=1)
    bottom, top, _ = whole_network(text, batch_size=50, epochs=1)
    assert_same(split.part(BOTTOM), bottom)
    assert_same(split.part(TOP), top)
    sent = [each for each in split.events("sent", BOTTOM) if each["kind"] == "activations"]
    assert max(each["bytes"] for each in sent) > 50 * 40_000 * 4


def test_activations_beyond_the_limit_end_the_job_and_are_not_passed_on(split: Split) -> None:
    reason = split.fail(script(hidden=40_000), batch_size=50, epochs=1, max_message_mb=1)
    assert "8000000 bytes, at most 1048576 are allowed" in reason
    passed = [each["bytes"] for each in split.events("sent") if each["kind"] == "activations"]
    # the digests of ids both ways, and nothing else
    assert len(passed) == 2
    assert max(passed) < 4096


def test_script_that_fails_ends_the_job_and_its_words_stay_at_the_site(split: Split) -> None:
    text = script().replace("    time.sleep(0)\n", '    raise ValueError("label of PLANTED-PROTEIN-007")\n')
    reason = split.fail(text)
    assert "site-2: failed: net.py: loss failed with ValueError; the log of site-2 says more" in reason
    assert "PLANTED" not in reason
    assert "PLANTED" not in (split.folder / "server" / "events.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"allow": ("code",)}, "does not allow 'split'"),
        ({"policy": Policy()}, "does not let net.py"),
        ({"policy": Policy(code=frozenset([ANY]), workflows=("fedavg",))}, "takes no part in workflow 'split'"),
        ({"policy": Policy(code=frozenset([ANY]), max_rounds=1)}, "at most 1 rounds, this job has 2"),
    ],
)
def test_site_whose_operator_does_not_want_it_takes_no_part(split: Split, options: Any, reason: str) -> None:
    usual = split.site
    split.site = lambda name: usual(name, **(options if name == TOP else {}))  # type: ignore[method-assign]
    assert reason in split.fail(script())
    assert not (split.folder / TOP / "split").exists()


def test_features_labels_and_ids_never_pass_the_server(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = bytearray()
    take = Receiver.take

    def record(self: Receiver, frame: Any) -> None:
        # the server's ends are named for the sites that they hear
        if self.peer in (BOTTOM, TOP):
            heard.extend(frame.payload)
        take(self, frame)

    monkeypatch.setattr(Receiver, "take", record)
    told: dict[str, list[np.ndarray]] = {BOTTOM: [], TOP: []}
    send = SplitSite._pass

    def note(self: SplitSite, session: str, number: int, items: dict[str, np.ndarray]) -> None:
        told[BOTTOM if number % 2 == 0 else TOP].extend(items.values())
        send(self, session, number, items)

    monkeypatch.setattr(SplitSite, "_pass", note)
    split.run(script())
    # what was recorded is what the server heard: every activation and gradient is in it
    assert len(told[BOTTOM]) == 2 + 14
    for array in (*told[BOTTOM], *told[TOP]):
        assert array.tobytes() in heard
    for identifier, (features, _) in table().items():
        assert identifier.encode() not in heard
        # not even two neighbouring values of one protein
        assert features[:2].tobytes() not in heard
    labels = np.array([label for _, label in table().values()])
    for kind in (np.int64, np.int32, np.int16, np.uint8, np.float32):
        for batch in np.array_split(np.random.default_rng([SEED, 0]).permutation(ROWS), 7):
            shared = sorted(set(ids_of(BOTTOM)) & set(ids_of(TOP)))
            rows = [int(shared[row][-3:]) for row in batch]
            assert labels[rows].astype(kind).tobytes() not in heard


# the relay, from sites that do not mean well


def stream(**items: np.ndarray) -> bytes:
    return b"".join(bytes(chunk) for chunk in object_chunks(items.items()))


class Passed:
    """A relay with one session of six messages, and what it sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, Any]] = []
        self.changed = threading.Condition()
        self.relay = SplitRelay(self.send)
        self.relay.open("s", BOTTOM, TOP, messages=6, max_bytes=1 << 16)

    def send(self, site: str, topic: str, body: bytes, items: Any) -> None:
        with self.changed:
            self.sent.append((site, topic, items))
            self.changed.notify_all()

    def pass_on(self, site: str, number: int, content: bytes, session: str = "s") -> None:
        body = pack(Passage(session, number))
        sink = self.relay.sink(Opening(site, messages.SPLIT, body, "object", None))
        try:
            for begin in range(0, len(content), 4096):
                sink.write(memoryview(content)[begin : begin + 4096])
            payload = sink.finish()
        except Exception:
            sink.abort()
            raise
        self.relay.take(Received(site, messages.SPLIT, body, payload))

    def told_of_the_end(self) -> set[str]:
        with self.changed:
            assert self.changed.wait_for(lambda: sum(topic == messages.SPLIT_END for _, topic, _ in self.sent) == 2, 10)
        return {site for site, topic, _ in self.sent if topic == messages.SPLIT_END}


ONES = stream(activations=np.ones((2, 3), np.float32))


def test_relay_passes_on_what_is_due() -> None:
    passed = Passed()
    passed.pass_on(BOTTOM, 0, ONES)
    passed.pass_on(TOP, 1, stream(a=np.zeros(2), b=np.zeros((), np.int64)))
    assert [(site, topic) for site, topic, _ in passed.sent] == [(TOP, messages.SPLIT), (BOTTOM, messages.SPLIT)]
    np.testing.assert_array_equal(passed.sent[0][2]["activations"], np.ones((2, 3), np.float32))
    assert passed.sent[1][2]["b"].shape == ()


@pytest.mark.parametrize(
    ("site", "number", "session", "reason"),
    [
        ("site-3", 0, "s", "takes part in no such split session"),
        (BOTTOM, 0, "other", "takes part in no such split session"),
        (BOTTOM, 2, "s", "message 0 of site-1 is due"),
        (TOP, 0, "s", "message 0 of site-1 is due"),
        (TOP, 1, "s", "message 0 of site-1 is due"),
        (BOTTOM, 6, "s", "message 6 of a session of 6 messages"),
    ],
)
def test_relay_refuses_what_is_not_due_before_a_byte_of_it(site: str, number: int, session: str, reason: str) -> None:
    passed = Passed()
    with pytest.raises(ProtocolError, match=reason):
        passed.relay.sink(Opening(site, messages.SPLIT, pack(Passage(session, number)), "object", None))
    assert passed.sent == []
    passed.pass_on(BOTTOM, 0, ONES)
    assert len(passed.sent) == 1


def test_relay_takes_one_message_at_a_time() -> None:
    passed = Passed()
    opening = Opening(BOTTOM, messages.SPLIT, pack(Passage("s", 0)), "object", None)
    passed.relay.sink(opening)
    with pytest.raises(ProtocolError, match="on its way already"):
        passed.relay.sink(opening)


def test_relay_refuses_a_message_without_tensors() -> None:
    passed = Passed()
    passed.relay.take(Received(BOTTOM, messages.SPLIT, pack(Passage("s", 0)), None))
    passed.relay.take(Received(BOTTOM, messages.SPLIT, b"nonsense", {}))
    assert passed.sent == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (stream(activations=np.zeros(1 << 15, np.float32)), "131072 bytes, at most 65536 are allowed"),
        (stream(**{str(n): np.zeros(1, np.uint8) for n in range(MAX_ITEMS + 1)}), f"or after {MAX_ITEMS} others"),
        (stream(**{str(n): np.zeros(1 << 14, np.uint8) for n in range(12)}), "more than 65536 bytes in one message"),
        (ONES[:-4] + ONES, "comes twice"),
        (b"\xff\xff\xff\xff", "announcement"),
        (ONES[:-9], "cut short"),
    ],
)
def test_relay_refuses_hostile_sizes_and_ends_the_session(content: bytes, reason: str) -> None:
    passed = Passed()
    with pytest.raises(FedbioError, match=reason):
        passed.pass_on(BOTTOM, 0, content)
    assert passed.told_of_the_end() == {BOTTOM, TOP}
    assert all(topic == messages.SPLIT_END for _, topic, _ in passed.sent)
    with pytest.raises(ProtocolError, match="session is over"):
        passed.pass_on(BOTTOM, 0, ONES)
    # it was no connection's fault: the epoch is not tried again
    assert passed.relay.lost("s") == ""


def test_half_a_message_of_a_process_that_was_killed_lets_the_epoch_be_tried_again() -> None:
    passed = Passed()
    sink = passed.relay.sink(Opening(BOTTOM, messages.SPLIT, pack(Passage("s", 0)), "object", None))
    sink.write(memoryview(ONES[:-9]))
    sink.suspend()
    assert passed.told_of_the_end() == {BOTTOM, TOP}
    assert passed.relay.lost("s") == f"{BOTTOM} is gone"


def test_announced_terabytes_take_no_memory() -> None:
    announcement = msgspec.msgpack.encode(Announcement("activations", "F32", (1 << 40,)))
    with pytest.raises(FedbioError, match="4398046511104 bytes, at most 65536 are allowed"):
        ItemsSink(1 << 16).write(memoryview(struct.pack("<I", len(announcement)) + announcement))


def test_relay_ends_the_sessions_of_a_site_that_is_gone() -> None:
    passed = Passed()
    passed.relay.gone("site-3")
    passed.relay.gone(TOP)
    assert passed.told_of_the_end() == {BOTTOM, TOP}
    assert passed.relay.lost("s") == "site-2 is gone"


def test_relay_tells_sites_that_still_wait_when_a_controller_closes() -> None:
    passed = Passed()
    passed.relay.close("s")
    assert passed.told_of_the_end() == {BOTTOM, TOP}


# a site's end


def test_message_that_comes_before_its_task_is_kept() -> None:
    site = SplitSite(lambda body, items: None, lambda: None)
    items = {"a": np.ones(2)}
    site.take(Received("server", messages.SPLIT, pack(Passage("s", 0)), items))
    with site.channel("s") as channel:
        assert channel.receive(0) is items


def test_many_sessions_that_nobody_opens_keep_little() -> None:
    site = SplitSite(lambda body, items: None, lambda: None)
    channel = site.channel("open")
    for number in range(100):
        site.take(Received("server", messages.SPLIT, pack(Passage(f"s{number}", 0)), {}))
    site.take(Received("server", messages.SPLIT, pack(Passage("open", 0)), {"a": np.ones(1)}))
    assert channel.receive(0).keys() == {"a"}
    assert len(site._boxes) <= 6


def test_who_waits_hears_of_the_end() -> None:
    for end in (
        lambda site: site.broken("no server"),
        lambda site: site.take(Received("server", messages.SPLIT_END, pack(messages.Ended("s", "no server")), None)),
    ):
        site = SplitSite(lambda body, items: None, lambda: None)
        with site.channel("s") as channel:
            threading.Timer(0.05, end, [site]).start()
            with pytest.raises(FederationError, match="is over: no server"):
                channel.receive(0)
            with pytest.raises(FederationError, match="is over: no server"):
                channel.send(1, {})


# kills


class Processes:
    """The parties of a job as processes of their own, with four epochs of half a second."""

    def __init__(self, split: Split, port: int, **limits: Any) -> None:
        self.split, self.folder, self.address = split, split.folder, f"localhost:{port}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.text = script("Adam", "", pause=0.06)
        (self.folder / "net.py").write_text(self.text)
        fasta(self.folder)
        what = split.jobs(epochs=4).model_dump(mode="json")
        what["transport"]["resume_s"] = 3
        what["federation"] |= limits
        (self.folder / "jobs.yaml").write_text(json.dumps(what))

    def start(self, name: str) -> None:
        kit, output = str(self.folder / "kits" / name), str(self.folder / name)
        if name == "server":
            arguments = ["--kit", kit, "--jobs", str(self.folder / "jobs.yaml"), "-o", output, "--listen", self.address]
            command = ["server", *arguments]
        else:
            arguments = ["--kit", kit, "--data", str(self.folder / f"{name}.fasta"), "-o", output]
            arguments += ["--server", self.address, "--connect-deadline", "60"]
            command = ["site", *arguments, "--code", str(self.folder / "net.py"), "--allow", "split"]
        with open(self.folder / f"{name}.log", "ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "fedbio", *command], stdout=log, stderr=log, env=environment
            )

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def epochs(self) -> list[int]:
        path = self.folder / "server" / "events.jsonl"
        return [each["epoch"] for each in self.split.events("epoch")] if path.exists() else []

    def wait_for_the_middle_of_the_third_epoch(self) -> None:
        self._wait_for(lambda: len(self.epochs()) == 2)
        before = self._gradients()
        self._wait_for(lambda: self._gradients() >= before + 2)
        assert self.epochs() == [1, 2]

    def _gradients(self) -> int:
        return sum(each["kind"] == "activations" for each in self.split.events("sent", TOP))

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            assert not ended, [self.log(name) for name in ended]
            assert time.monotonic() < deadline, {name: self.log(name)[-3000:] for name in self.running}
            time.sleep(0.01)

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def processes(split: Split, free_port: int, request: pytest.FixtureRequest) -> Iterator[Processes]:
    made = Processes(split, free_port, **getattr(request, "param", {}))
    for name in ("server", BOTTOM, TOP):
        made.start(name)
    yield made
    made.end()


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("victim", [BOTTOM, TOP, "server"])
def test_party_killed_in_the_middle_of_an_epoch_and_the_parts_are_the_same(victim: str, processes: Processes) -> None:
    processes.wait_for_the_middle_of_the_third_epoch()
    processes.kill(victim)
    processes.start(victim)
    for name, process in processes.running.items():
        assert process.wait(90) == 0, processes.log(name)
    bottom, top, _ = whole_network(script("Adam", ""), epochs=4)
    assert_same(processes.split.part(BOTTOM), bottom)
    assert_same(processes.split.part(TOP), top)
    assert processes.epochs() == [1, 2, 3, 4]
    if victim != "server":
        [broken] = processes.split.events("epoch broken off")
        assert (broken["epoch"], broken["reason"]) == (2, f"{victim} is gone")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("processes", [{"round_deadline_s": 8}], indirect=True)
def test_site_that_does_not_come_back_ends_the_job_with_its_name(processes: Processes) -> None:
    processes.wait_for_the_middle_of_the_third_epoch()
    processes.kill(BOTTOM)
    assert processes.running["server"].wait(60) == 3
    assert processes.running[TOP].wait(60) == 3
    assert "1 of 2 sites are here after 8 s, 2 are needed; missing: site-1" in processes.log("server")
    assert "site-1 is gone" in processes.log(TOP)
