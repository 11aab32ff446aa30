"""Write embeddings as a plain NumPy array or as a Parquet table, for tools that read no HDF5."""

from __future__ import annotations

__all__ = ["to_npy", "to_parquet"]

import importlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedbio.embeddings import Embeddings
from fedbio.errors import DataError, MachineError
from fedbio.files import whole_file

_StrPath = str | os.PathLike[str]


def to_npy(source: _StrPath, output: _StrPath) -> tuple[int, Path]:
    """Write the matrix as ``.npy`` (float32, in the file's order) and the ids beside it, a line each.

    Returns
    -------
    int
        How many proteins were written.
    Path
        The file of the ids: ``NAME.ids.txt`` beside ``NAME.npy``.

    Raises
    ------
    DataError
        If the file has a row per residue.
    """
    beside_ids = Path(output).with_suffix(".ids.txt")
    with _pooled(source) as embeddings:
        with whole_file(beside_ids) as beside, open(beside, "w", encoding="utf-8", newline="\n") as lines:
            for head in embeddings.heads():
                lines.writelines(f"{name}\n" for name in head.ids)
        with whole_file(output) as beside:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(embeddings), embeddings.info.width)}
            with open(beside, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for block in embeddings.blocks():
                    file.write(np.ascontiguousarray(block, dtype="<f4").data)
        return len(embeddings), beside_ids


def to_parquet(source: _StrPath, output: _StrPath) -> int:
    """Write a table with the columns ``id``, ``length``, ``sha256`` and ``embedding``; returns the number of rows.

    An embedding is a list of float32 of fixed size; a row group has 16,384 rows. The schema's metadata has the
    encoder as JSON, under ``fedbio``.

    Raises
    ------
    MachineError
        If the package pyarrow is not installed.
    DataError
        If the file has a row per residue.
    """
    try:
        # not among our dependencies: 50 MB that few need
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MachineError(
            f"{output}: writing Parquet needs the package pyarrow, which is not installed; "
            "install it with: pip install pyarrow"
        ) from error
    with _pooled(source) as embeddings, whole_file(output) as beside:
        vector = arrow.list_(arrow.float32(), embeddings.info.width)
        columns = {"id": arrow.string(), "length": arrow.int64(), "sha256": arrow.string(), "embedding": vector}
        about = json.dumps(msgspec.to_builtins(embeddings.info))
        schema = arrow.schema(list(columns.items()), metadata={"fedbio": about})
        place = 0
        with parquet.ParquetWriter(beside, schema) as writer:
            for head in embeddings.heads():
                rows = embeddings.span(place, place + len(head.ids))
                table = {
                    "id": head.ids,
                    "length": head.lengths,
                    "sha256": [digest.tobytes().hex() for digest in head.digests],
                    "embedding": arrow.FixedSizeListArray.from_arrays(rows.reshape(-1), embeddings.info.width),
                }
                writer.write_table(arrow.table(table, schema=schema))
                place += len(head.ids)
        return place


def _pooled(source: _StrPath) -> Embeddings:
    embeddings = Embeddings.open(source)
    if embeddings.pointers is not None:
        embeddings.close()
        raise DataError(
            f"{source}: has one row per residue, and one per protein is needed; "
            "embed again, for example with `--pooling mean`"
        )
    return embeddings
