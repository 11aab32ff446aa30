"""Share the packs of one file out among processes, one for each device; the rows are the same whoever computes them."""

from __future__ import annotations

__all__ = ["choose_devices", "compute_with_workers", "share_out"]

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NoReturn

import msgspec
import numpy as np
import torch

from fedbio.embeddings import Parts
from fedbio.encoder.compute import compute
from fedbio.encoder.setup import EncoderChoice, Setup
from fedbio.encoder.shards import plan_shards
from fedbio.encoder.source import Residues
from fedbio.encoder.work import Work
from fedbio.errors import FedbioError, MachineError, SettingsError
from fedbio.files import read_at
from fedbio.processes import die_with_parent
from fedbio.results import EncoderInfo

RESIDUES_PER_DEVICE = 20_000_000
"""``auto`` takes one more GPU for each so many: below it, starting a process takes longer than computing."""
_STOP_SECONDS = 30.0


class _Order(msgspec.Struct):
    """What a worker is told: how to compute, what, from where, and by whom."""

    parent: int
    choice: dict[str, Any]
    output: str
    info: EncoderInfo
    work: str
    sequences: int
    residues_file: int
    places_file: int
    first: int
    last: int


class _Told(msgspec.Struct):
    """What a worker tells: residues that it is done with, or why it ends."""

    residues: int = 0
    error: str = ""


def choose_devices(name: str, residues: int) -> list[str]:
    """Turn the name of a device, or several with commas between, into the devices that shall compute.

    Parameters
    ----------
    name : str
        See `fedbio.encoder.inference.choose_device`; ``"cpu,cpu"`` is two processes on the CPU. ``"auto"`` takes all
        GPUs if the work is large.
    residues : int
        How many residues the encoder will see.

    Raises
    ------
    SettingsError
        If a name between commas is missing, or one of several is ``"auto"``.
    """
    names = [each.strip() for each in name.split(",")]
    if len(names) > 1 and ("auto" in names or "" in names):
        raise SettingsError(f"device {name!r}: expected one device, or several like cuda:0,cuda:1")
    if names == ["auto"] and (there := torch.cuda.device_count()) > 1:
        return [f"cuda:{number}" for number in range(min(there, max(residues // RESIDUES_PER_DEVICE, 1)))]
    return names


def share_out(work: Work, parts: Parts, workers: int) -> list[tuple[int, int]]:
    """Return a range of rows for each worker: whole packs, balanced by the residues that are still to be computed."""
    rows, residues = [0], []
    for number, begin, end, _ in work.block_rows():
        if parts.holds(begin, end):
            rows.append(end)
            residues.append(0)
            continue
        for _, start, stop, seen in work.block(number).packs():
            rows.append(stop)
            residues.append(0 if parts.holds(start, stop) else seen)
    return [(rows[some.start], rows[some.stop]) for some in plan_shards(residues, workers)]


def compute_with_workers(
    setup: Setup,
    devices: Sequence[str],
    work: Work,
    name: str,
    parts: Parts,
    output: Path,
    advance: Callable[[int], None],
) -> None:
    """Compute what the parts lack, in one process per device; none of them outlives this one.

    Parameters
    ----------
    setup : Setup
    devices : sequence of str
    work : Work
        Its plan depends on neither the devices nor their number.
    name : str
        Of the work, see `Work.name`.
    parts : Parts
        Holds all rows in the end.
    output : Path
        The embeddings file to be.
    advance : callable
        Is told of residues, computed now or earlier.

    Raises
    ------
    MachineError
        If a worker ends without having done its share; what is done is kept.
    """
    threads = max((setup.choice.threads or len(os.sched_getaffinity(0))) // len(devices), 1)
    places = tempfile.TemporaryFile(dir=output.parent, prefix=".fedbio-")
    with places, contextlib.ExitStack() as stack:
        work.sequences.begins.astype(np.int64).tofile(places)
        work.sequences.lengths.astype(np.int32).tofile(places)
        places.flush()
        workers = []
        for device, (first, last) in zip(devices, share_out(work, parts, len(devices)), strict=True):
            choice = asdict(setup.choice) | {"encoder": os.fspath(setup.choice.encoder)}
            choice |= {"device": device, "threads": threads, "batch_residues": setup.budget}
            order = _Order(
                parent=os.getpid(),
                choice=choice,
                output=str(output),
                info=setup.info,
                work=name,
                sequences=len(work.sequences),
                residues_file=work.sequences.descriptor,
                places_file=places.fileno(),
                first=first,
                last=last,
            )
            if last > first:
                workers.append(stack.enter_context(_started(order, device)))
        lock = threading.Lock()

        def told(residues: int) -> None:
            with lock:
                advance(residues)

        # whichever ends first is looked at first: if it has failed, the others are stopped
        ended: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            worker.listen(told, ended)
        for _ in workers:
            ended.get().wait()
    parts.refresh()


class _Worker:
    """A process that computes its share."""

    def __init__(self, process: subprocess.Popen[bytes], device: str) -> None:
        self._process, self._device = process, device
        self._error = ""
        self._listener: threading.Thread | None = None

    def listen(self, advance: Callable[[int], None], ended: queue.SimpleQueue[_Worker]) -> None:
        """Begin to take up what the process tells; it is put into the queue when it tells no more."""
        assert self._process.stdout is not None
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout, advance, ended), daemon=True)
        self._listener.start()

    def _listen(self, lines: IO[bytes], advance: Callable[[int], None], ended: queue.SimpleQueue[_Worker]) -> None:
        try:
            for line in lines:
                told = msgspec.json.decode(line, type=_Told)
                self._error = told.error or self._error
                advance(told.residues)
        finally:
            ended.put(self)

    def wait(self) -> None:
        """Wait until the process is done.

        Raises
        ------
        MachineError
            If it is not done with its share.
        """
        assert self._listener is not None
        self._listener.join()
        if code := self._process.wait():
            raise MachineError(
                f"the process for device {self._device} {self._error or f'ended with code {code}'}; "
                "run the same command again, what is finished is kept"
            )

    def stop(self) -> None:
        """End the process if it still runs; it first writes down what it has computed."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._listener is not None:
            self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def _started(order: _Order, device: str) -> Iterator[_Worker]:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedbio.encoder.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(order.residues_file, order.places_file),
    )
    assert process.stdin is not None
    worker = _Worker(process, device)
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended: that is told by its exit code
            process.stdin.write(msgspec.json.encode(order))
            process.stdin.close()
        yield worker
    finally:
        worker.stop()


def _work_on(order: _Order) -> None:
    """Do a worker's share."""
    setup = Setup(EncoderChoice(**order.choice))
    if setup.info != order.info:
        raise MachineError(f"device {setup.device} computes with {setup.info}, but {order.info} is wanted")
    begins = np.empty(order.sequences, dtype=np.int64)
    lengths = np.empty(order.sequences, dtype=np.int32)
    # at offsets of our own: the file's position is one for all workers
    read_at(order.places_file, begins.data, 0)
    read_at(order.places_file, lengths.data, begins.nbytes)
    work = Work(Residues(order.residues_file, begins, lengths), setup.info, budget=setup.budget)
    parts = Parts(Path(order.output), info=setup.info, work=order.work, rows=work.rows, trusted=True)
    compute(setup.inference(), work, parts, lambda residues: _tell(_Told(residues)), first=order.first, last=order.last)


def _tell(told: _Told) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
    sys.stdout.buffer.flush()


def _interrupt(number: int, frame: object) -> NoReturn:
    # what is computed is written down now, and a second signal shall not break that off
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
    if os.getppid() != order.parent:
        return
    try:
        _work_on(order)
    except FedbioError as error:
        _tell(_Told(error=f"says: {error}"))
        os._exit(1)
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    _main()
