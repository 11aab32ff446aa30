"""Join embeddings files, and carry them to and from files with one dataset per protein.

UniProt publishes such files (the key is the accession, the value a vector); bio_embeddings and biotrainer write them
with another key and the id in the attribute ``original_id``; values may be per residue.
"""

from __future__ import annotations

__all__ = ["from_flat", "is_flat", "merge", "to_flat"]

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import CHUNK_ROWS, Embeddings, check_same_encoder, sequence_digest, write_embeddings
from fedbio.errors import DataError, FormatError
from fedbio.files import whole_file
from fedbio.results import EncoderInfo

_StrPath = str | os.PathLike[str]

FLAT_FORMAT = "fedbio-embeddings-flat"


def merge(sources: Sequence[_StrPath], output: _StrPath) -> int:
    """Join embeddings files of one encoder, in the order given; returns how many proteins the result holds.

    Raises
    ------
    DataError
        If the encoders differ, or an id stands for two sequences. An id that stands for the same sequence twice is
        taken from the first file.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(Embeddings.open(path)) for path in sources]
        places: list[NDArray[np.int64]] = []
        seen: dict[str, tuple[bytes, Path]] = {}
        for file in files:
            check_same_encoder(file.info, files[0].info, where=str(file.path), remedy="merge files of one encoder only")
            chosen = []
            for place, (name, row) in enumerate(zip(file.ids, file.digests, strict=True)):
                digest = row.tobytes()
                known, first = seen.setdefault(name, (digest, file.path))
                if first is file.path:
                    chosen.append(place)
                elif known != digest:
                    raise DataError(f"{file.path}: id {name!r} has another sequence there than in {first}; rename one")
            places.append(np.array(chosen, dtype=np.int64))
        together = list(zip(files, places, strict=True))
        write_embeddings(
            output,
            info=files[0].info,
            ids=[file.ids[place] for file, chosen in together for place in chosen.tolist()],
            lengths=np.concatenate([file.lengths[chosen] for file, chosen in together]),
            digests=[file.digests[place].tobytes() for file, chosen in together for place in chosen.tolist()],
            blocks=(
                file.take(chosen[first : first + CHUNK_ROWS])
                for file, chosen in together
                for first in range(0, len(chosen), CHUNK_ROWS)
            ),
        )
        return len(seen)


def is_flat(path: _StrPath) -> bool:
    """Whether an HDF5 file has one dataset per protein rather than our matrix.

    Raises
    ------
    DataError, FormatError
        If there is no such file, or it is not HDF5.
    """
    with _open(path) as file:
        return "embeddings" not in file or isinstance(file["embeddings"], h5py.Group)


def to_flat(source: _StrPath, output: _StrPath) -> int:
    """Write one dataset per protein; returns their number.

    Notes
    -----
    The key is the id, or the sequence's SHA-256 where the id has a slash, which HDF5 would take for a folder. The
    attributes ``original_id``, ``length`` and ``sha256`` let `from_flat` restore the file that this one came from.
    """
    with Embeddings.open(source) as embeddings, whole_file(output) as beside, h5py.File(beside, "w") as file:
        file.attrs.update({"format": FLAT_FORMAT, "version": 1, **msgspec.structs.asdict(embeddings.info)})
        place = 0
        for block in embeddings.blocks():
            for vector in block:
                name, digest = embeddings.ids[place], embeddings.digests[place].tobytes().hex()
                # `.` is a folder too
                key = name if "/" not in name and name.strip(".") else f"{digest}-{place}"
                row = file.create_dataset(key, data=vector, track_times=False)
                row.attrs.update({"original_id": name, "length": embeddings.lengths[place], "sha256": digest})
                place += 1
        return place


def from_flat(
    source: _StrPath,
    output: _StrPath,
    *,
    info: EncoderInfo | None = None,
    sequences: Mapping[str, str] | None = None,
) -> int:
    """Read a file with one dataset per protein into our form; returns the number of proteins.

    Parameters
    ----------
    source, output : path-like
    info : EncoderInfo, optional
        How the vectors were made; files that `to_flat` wrote know it. Its width is taken from the file.
    sequences : mapping of str to str, optional
        Sequence of each id; files that `to_flat` wrote know what is needed of them.

    Raises
    ------
    DataError
        If something that the file does not say was not given, or a protein has no sequence.
    FormatError
        If a dataset is not a vector, or a matrix with a row per residue, of the same width as the others.

    Notes
    -----
    Values per residue are averaged.
    """
    with _open(source) as file:
        info = info or _own_info(source, file)
        datasets: list[h5py.Dataset] = []
        file.visititems(lambda name, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        if not datasets:
            raise DataError(f"{source}: no embedding in the file; was it written or copied completely?")
        info = msgspec.structs.replace(info, width=int(datasets[0].shape[-1] if datasets[0].shape else 0))
        ids = [str(item.attrs.get("original_id", item.name.removeprefix("/"))) for item in datasets]
        known = [_sequence_of(name, item, sequences, source) for name, item in zip(ids, datasets, strict=True)]
        write_embeddings(
            output,
            info=info,
            ids=ids,
            lengths=[length for length, _ in known],
            digests=[digest for _, digest in known],
            blocks=_vectors(datasets, info.width, source),
        )
        return len(ids)


def _open(path: _StrPath) -> h5py.File:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise FormatError(f"{path}: not a readable HDF5 file ({error}); copy it again") from error


def _own_info(source: _StrPath, file: h5py.File) -> EncoderInfo:
    if file.attrs.get("format") != FLAT_FORMAT:
        raise DataError(f"{source}: the file does not say which encoder made it; name it with --encoder-name")
    fields = {field.name: file.attrs[field.name] for field in msgspec.structs.fields(EncoderInfo)}
    return msgspec.convert(
        {name: value.item() if isinstance(value, np.generic) else value for name, value in fields.items()}, EncoderInfo
    )


def _sequence_of(
    name: str, item: h5py.Dataset, sequences: Mapping[str, str] | None, source: _StrPath
) -> tuple[int, bytes]:
    if "sha256" in item.attrs and "length" in item.attrs:
        return int(item.attrs["length"]), bytes.fromhex(item.attrs["sha256"])
    if sequences is None:
        raise DataError(f"{source}: the file does not hold the sequences' digests; give the proteins with --proteins")
    if name not in sequences:
        raise DataError(f"{source}: protein {name!r} is not in the file given with --proteins; add it there")
    return len(sequences[name]), sequence_digest(sequences[name])


def _vectors(datasets: Sequence[h5py.Dataset], width: int, source: _StrPath) -> Iterator[NDArray[np.float32]]:
    for first in range(0, len(datasets), CHUNK_ROWS):
        rows = []
        for item in datasets[first : first + CHUNK_ROWS]:
            if item.dtype.kind != "f" or item.ndim not in (1, 2) or item.shape[-1] != width or not item.shape[0]:
                raise FormatError(
                    f"{source}: dataset {item.name!r}: expected a vector of width {width}, or one per residue, "
                    f"found {item.dtype} of shape {item.shape}"
                )
            rows.append(item[:] if item.ndim == 1 else item[:].mean(axis=0, dtype=np.float64))
        yield np.asarray(rows, dtype=np.float32)
