"""Keep what a run that was broken off has computed, when the next one is on other proteins or packs them otherwise.

The rows that are whole go into an embeddings file beside the output, from which the next run takes them like those of
any earlier file. It is deleted once the output is finished.
"""

from __future__ import annotations

__all__ = ["check_kept", "forget", "forget_within", "keep_rows", "kept_file", "record"]

import contextlib
import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import blake3
import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import RESIDUES, Embeddings, Heads, Parts, check_same_encoder, write_stream
from fedbio.embeddings.form import HEADS
from fedbio.encoder.rows import Assembly, KnownRows
from fedbio.encoder.source import DIGEST_BYTES, Residues
from fedbio.encoder.work import Work, count_residues
from fedbio.errors import FormatError, MachineError
from fedbio.files import whole_file, write_whole
from fedbio.proteins.keys import KEY_BYTES, KeyTable
from fedbio.results import EncoderInfo

log = logging.getLogger(__name__)

_DIGESTS, _LENGTHS, _BUDGET = "digests", "lengths", "budget"


def kept_file(target: Path) -> Path:
    """Where rows are kept that unfinished work on an output has computed."""
    return target.with_name(f"{target.name}.kept.h5")


def record(folder: Path, work: Work, digests: Iterable[NDArray[np.uint8]]) -> None:
    """Write down in a folder of parts what they are of; nothing if that stands there.

    Parameters
    ----------
    folder : Path
    work : Work
    digests : iterable of ndarray, shape (m, 32), uint8
        SHA-256 of its sequences in order, in any division.
    """
    lengths = work.sequences.lengths.astype("<i4")
    sizes = {_DIGESTS: DIGEST_BYTES * len(lengths), _LENGTHS: lengths.nbytes}
    paths = [folder / name for name in sizes]
    if (folder / _BUDGET).is_file() and all(
        path.is_file() and path.stat().st_size == sizes[path.name] for path in paths
    ):
        return
    with whole_file(folder / _DIGESTS) as beside, open(beside, "wb") as file:
        for some in digests:
            file.write(some.tobytes())
    with whole_file(folder / _LENGTHS) as beside, open(beside, "wb") as file:
        file.write(lengths.tobytes())
    write_whole(folder / _BUDGET, f"{work.budget} {_checksum(lengths)}\n")


def _checksum(lengths: NDArray[np.int32]) -> str:
    return blake3.blake3(lengths.tobytes()).hexdigest()


def forget(target: Path) -> None:
    """Delete what is kept of unfinished work, once the output is finished."""
    shutil.rmtree(Parts.folder_of(target), ignore_errors=True)
    kept_file(target).unlink(missing_ok=True)


def forget_within(target: Path, finished: Embeddings) -> None:
    """Delete what is kept of unfinished work if the finished output has all of it, or none of it can be used."""
    if _unfinished(target, finished):
        log.info("unfinished work on other proteins is left folder=%s", Parts.folder_of(target))
    else:
        forget(target)


def _unfinished(target: Path, finished: Embeddings) -> bool:
    """Whether something is kept that the output does not have."""
    kept = kept_file(target)
    table: KeyTable | None = None
    try:
        recorded = _recorded(Parts.folder_of(target)) if Parts.begun(target) else None
        with contextlib.ExitStack() as stack:
            heads = stack.enter_context(Embeddings.open(kept)).heads() if kept.is_file() else iter(())
            for digests in itertools.chain(
                () if recorded is None else _slices(recorded), (some.digests for some in heads)
            ):
                table = _table(finished) if table is None else table
                if not _held(table, digests).all():
                    return True
    except FormatError:
        return False
    return False


def check_kept(target: Path, info: EncoderInfo) -> None:
    """Refuse a kept file of another encoder, and delete a damaged one.

    Raises
    ------
    DataError
        Saying what to do.
    """
    path = kept_file(target)
    if not path.exists():
        return
    try:
        with Embeddings.open(path) as kept:
            found = kept.info
    except FormatError as error:
        log.warning("rows of unfinished work are damaged, and computed again: %s", error)
        path.unlink()
        return
    remedy = f"give the settings as before, or delete {path} and {Parts.folder_of(target)}"
    check_same_encoder(found, info, where=str(path), remedy=remedy)


def keep_rows(target: Path, info: EncoderInfo, work: str) -> bool:
    """Put the rows of unfinished work of another name than `work` into the kept file, and begin no more with its parts.

    Returns
    -------
    bool
        Whether there were such parts. Those of another encoder stay: whoever opens them refuses them.

    Raises
    ------
    MachineError
        If they cannot be deleted.
    """
    folder = Parts.folder_of(target)
    begun = Parts.begun(target)
    if begun is None or begun[0] == work or begun[1].differing(info):
        return False
    old = _old_work(folder, info)
    if old is not None and old[0].name(_slices(old[1])) == begun[0]:
        _keep(target, info, *old, begun[0])
    else:
        log.warning("unfinished work on other proteins thrown away, it does not say on which folder=%s", folder)
    shutil.rmtree(folder, ignore_errors=True)
    if Parts.begun(target):
        raise MachineError(f"{folder}: cannot be deleted; delete it, and run the same command again")
    return True


def _old_work(folder: Path, info: EncoderInfo) -> tuple[Work, NDArray[np.uint8]] | None:
    digests = _recorded(folder)
    try:
        budget, checksum = (folder / _BUDGET).read_text().split()
        lengths = np.fromfile(folder / _LENGTHS, dtype="<i4").astype(np.int32)
        if digests is None or len(lengths) != len(digests) or checksum != _checksum(lengths.astype("<i4")):
            return None
        # nothing is computed: no residues are needed
        sequences = Residues(-1, np.zeros(len(lengths), dtype=np.int64), lengths)
        return Work(sequences, info, budget=int(budget)), digests
    except (OSError, ValueError):
        return None


def _recorded(folder: Path) -> NDArray[np.uint8] | None:
    """The digests of what parts are of, shape (n, 32), as they lie on the disk."""
    try:
        return np.memmap(folder / _DIGESTS, dtype=np.uint8, mode="r").reshape(-1, DIGEST_BYTES)
    except (OSError, ValueError):
        return None


def _slices(digests: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for first in range(0, len(digests), HEADS):
        yield digests[first : first + HEADS]


def _keep(target: Path, info: EncoderInfo, work: Work, digests: NDArray[np.uint8], name: str) -> None:
    path = kept_file(target)
    parts = Parts(target, info=info, work=name, rows=work.rows)
    everything = np.arange(len(digests), dtype=np.int32)
    with contextlib.ExitStack() as stack:
        none = stack.enter_context(KnownRows([], info, sequences=len(digests), digests=[]))
        earlier = stack.enter_context(Embeddings.open(path)) if path.is_file() else None
        whole = Assembly(everything, none, work, parts).whole()
        if earlier is not None:  # a kill may have come between the file and the deletion of the parts
            whole &= ~_held(_table(earlier), digests)
        numbers = everything[whole]
        log.info("rows of unfinished work on other proteins kept sequences=%d file=%s", len(numbers), path)
        if not len(numbers):
            return
        lengths = work.sequences.lengths[numbers]
        pointers = None
        if info.pooling == RESIDUES:
            first = np.zeros(1, dtype=np.int64) if earlier is None or earlier.pointers is None else earlier.pointers
            pointers = np.concatenate([first, first[-1] + np.cumsum(count_residues(lengths, info))])
        write_stream(
            path,
            info=info,
            proteins=(0 if earlier is None else len(earlier)) + len(numbers),
            heads=itertools.chain([] if earlier is None else earlier.heads(), _heads(digests, numbers, lengths)),
            blocks=itertools.chain(
                [] if earlier is None else earlier.blocks(), Assembly(numbers, none, work, parts).blocks()
            ),
            pointers=pointers,
        )


def _table(embeddings: Embeddings) -> KeyTable:
    table = KeyTable()
    for heads in embeddings.heads():
        for digest in heads.digests:
            table.add(digest[:KEY_BYTES].tobytes())
    return table


def _held(table: KeyTable, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.fromiter((table.find(digest[:KEY_BYTES].tobytes()) >= 0 for digest in digests), np.bool_, len(digests))


def _heads(digests: NDArray[np.uint8], numbers: NDArray[np.int32], lengths: NDArray[np.int32]) -> Iterator[Heads]:
    for first in range(0, len(numbers), HEADS):
        here = slice(first, first + HEADS)
        some = np.array(digests[numbers[here]])
        yield Heads([digest.tobytes().hex() for digest in some], lengths[here].astype(np.int64), some)
