"""Run the encoder on packs of pieces, on the device and in the arithmetic that suit."""

from __future__ import annotations

__all__ = ["Inference", "choose_device", "choose_dtype"]

import itertools
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.cpu import CpuEncoder, filled_up
from fedbio.encoder.memory import part_tokens
from fedbio.encoder.network import Encoder, Runs, send
from fedbio.encoder.packs import ENDS, Plan
from fedbio.encoder.pooling import Pooling, Span, pool
from fedbio.errors import MachineError, SettingsError
from fedbio.weights import EncoderConfig, Weights

log = logging.getLogger(__name__)

# parts that wait or are computed, for each thread
_PARTS_AHEAD = 2


def choose_device(name: str) -> torch.device:
    """Turn ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"`` into a device that exists.

    Raises
    ------
    MachineError
        If a CUDA device is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device {name!r}: expected auto, cpu, cuda or cuda:NUMBER") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device {name!r}: expected auto, cpu, cuda or cuda:NUMBER")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"int8"`` into the arithmetic of the encoder.

    Notes
    -----
    ``"auto"`` takes bfloat16 only where the hardware multiplies it; elsewhere it is emulated, ten times slower.
    ``torch.int8`` means that linear maps multiply bytes, and all else is computed as ``"auto"`` would have it.

    Raises
    ------
    SettingsError
        If there is no such arithmetic, or not on this device.
    """
    if name == "float32":
        return torch.float32
    if name == "bfloat16":
        return torch.bfloat16
    if name == "int8":
        if device.type != "cpu":
            raise SettingsError(f"dtype 'int8': only a CPU computes it, not {device}; use bfloat16")
        return torch.int8
    if name != "auto":
        raise SettingsError(f"dtype {name!r}: expected auto, float32, bfloat16 or int8")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # an older PyTorch does not tell; then float32 is right everywhere
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


class Inference:
    """An encoder on its device, ready to turn pieces of proteins into vectors.

    Parameters
    ----------
    config, weights
        As `fedbio.weights.read_weights` gives them; a language-model head is left out.
    device, dtype
        See `choose_device` and `choose_dtype`.
    threads : int, optional
        CPU threads; by default as many as this process may use.
    pooling : {"mean", "ends", "max", "start", "residues"}
        What becomes of the vectors of a piece's residues, see `fedbio.encoder.pooling.pool`.
    layer : int, optional
        After how many layers to stop, 0 for the embedding alone; by default after all of them and the final norm.

    Raises
    ------
    SettingsError
        If the encoder does not have so many layers.
    """

    def __init__(
        self,
        config: EncoderConfig,
        weights: Weights,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int | None = None,
        pooling: Pooling = "mean",
        layer: int | None = None,
    ) -> None:
        if layer is not None and not 0 <= layer <= config.layers:
            raise SettingsError(f"layer {layer}: {config.name} has layers 0 to {config.layers}")
        threads = threads or len(os.sched_getaffinity(0))
        self.config, self.device, self.dtype = config, device, dtype
        self.pooling, self.layer = pooling, layer
        self._alphabet = ALPHABETS[config.alphabet]
        with torch.device("meta"):
            network = Encoder(config)
        network.load_state_dict(
            {name: torch.from_numpy(tensor) for name, tensor in weights.items() if not name.startswith("lm_head.")},
            assign=True,
        )
        network.requires_grad_(False).eval()
        self._network: Callable[[Tensor, Runs, int | None], Tensor]
        if device.type == "cpu":
            able = choose_dtype("auto", device) if dtype == torch.int8 else dtype
            self._network = CpuEncoder(network, able, int8=dtype == torch.int8)
            self._lanes = _lanes(threads)
        else:
            for module in network.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)  # norms, tables and the residual stream stay float32
            self._network = network.to(device)
            # while one waits for its vectors, the other makes the next pack ready
            self._lanes = _lanes(2)
        torch.set_num_threads(threads)
        # of an accelerator's memory, as far as it has been found out
        self._most_tokens = part_tokens(config.width) if device.type == "cpu" else sys.maxsize

    def pack(self, sequences: Sequence[bytes], plan: Plan, number: int) -> NDArray[np.float32]:
        """Embed the pieces of one pack.

        Parameters
        ----------
        sequences : sequence of bytes
            Residues of each protein that `plan` speaks of.
        plan : Plan
        number : int
            Which pack.

        Returns
        -------
        ndarray, shape (rows, width of a row), float32
            See `fedbio.encoder.pooling.pool`.
        """
        return next(self.packs(sequences, plan, [number]))

    def packs(self, sequences: Sequence[bytes], plan: Plan, numbers: Iterable[int]) -> Iterator[NDArray[np.float32]]:
        """Embed one pack after the other, the next ones while the caller has the last in hand; see `pack`."""
        begun: deque[list[Future[NDArray[np.float32]]]] = deque()
        try:
            for number in numbers:
                parts = self._parts(plan, int(plan.packs[number]), int(plan.packs[number + 1]))
                begun.append([self._lanes.submit(self._span, sequences, plan, *part) for part in parts])
                while len(begun) > 1 and sum(map(len, begun)) > _PARTS_AHEAD * self._lanes._max_workers:
                    yield _join(begun.popleft())
            while begun:
                yield _join(begun.popleft())
        finally:
            for future in itertools.chain.from_iterable(begun):
                future.cancel()

    def _parts(self, plan: Plan, first: int, last: int) -> list[tuple[int, int]]:
        """Cut a pack into what one thread computes at a time, whatever the number of threads."""
        parts, tokens, most = [first], 0, self._most_tokens
        for piece, length in enumerate((plan.end[first:last] - plan.begin[first:last] + ENDS).tolist(), start=first):
            here = filled_up(length)
            if tokens and tokens + here > most:
                parts.append(piece)
                tokens = 0
            tokens += here
        return list(itertools.pairwise([*parts, last]))

    def _span(self, sequences: Sequence[bytes], plan: Plan, first: int, last: int) -> NDArray[np.float32]:
        try:
            return self._compute(sequences, plan, first, last)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
                raise
            if last - first == 1:
                raise MachineError(
                    f"{self.device}: not enough memory for one protein of {plan.end[first] - plan.begin[first]} "
                    "residues; stop other programs there or use device cpu"
                ) from error
        # outside of the handler, whose exception holds on to what it was made with
        torch.cuda.empty_cache()
        middle = (first + last) // 2
        tokens = int((plan.end[first:last] - plan.begin[first:last] + ENDS).sum())
        # later packs are cut from the start
        self._most_tokens = min(self._most_tokens, max(tokens // 2, 1))
        log.warning("out of memory on %s, packs halved tokens=%d", self.device, self._most_tokens)
        halves = [self._span(sequences, plan, first, middle), self._span(sequences, plan, middle, last)]
        return np.concatenate(halves)

    @torch.inference_mode()
    def _compute(self, sequences: Sequence[bytes], plan: Plan, first: int, last: int) -> NDArray[np.float32]:
        begin, end = plan.begin[first:last], plan.end[first:last]
        lengths = end - begin + ENDS
        ends = np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]), dtype=np.int64)
        for piece, stop in enumerate(ends.tolist()):
            start = stop - int(lengths[piece])
            residues = sequences[plan.protein[first + piece]][begin[piece] : end[piece]]
            tokens[start], tokens[stop - 1] = self._alphabet.start, self._alphabet.end
            tokens[start + 1 : stop - 1] = self._alphabet.encode(residues)
        changes = np.flatnonzero(np.diff(lengths, prepend=0))
        counts = np.diff(changes, append=len(lengths))
        runs = list(zip(counts.tolist(), lengths[changes].tolist(), strict=True))
        hidden = self._network(send(torch.from_numpy(tokens), self.device), runs, self.layer)  # (T, D)
        vectors = pool(hidden, Span(plan, first, last), self.pooling)
        if self.device.type == "cpu":
            return vectors.numpy()
        received = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        received.copy_(vectors, non_blocking=True)
        # an event, not the stream: the next pack may be in the queue already
        torch.cuda.current_stream(self.device).record_event().synchronize()
        return received.numpy()


def _lanes(threads: int) -> ThreadPoolExecutor:
    """Start threads whose products keep to one core each.

    Notes
    -----
    torch keeps the number of cores by thread, and when a thread first asks for it, gives it the number last set
    by any. So each asks before it sets its own, and the caller sets that of threads that come later.
    """
    lanes = ThreadPoolExecutor(threads, "encoder")
    all_there = threading.Barrier(threads)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_there.wait()

    for future in [lanes.submit(begin) for _ in range(threads)]:
        future.result()
    return lanes


def _join(futures: list[Future[NDArray[np.float32]]]) -> NDArray[np.float32]:
    arrays = [future.result() for future in futures]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
