"""Keep protein embeddings in one HDF5 file: a matrix, the ids and digests of its rows, and how it was made.

Format ``fedbio-embeddings`` version 1. Datasets: ``/embeddings`` (n, d) float32 or float16 in chunks of 256 rows,
``/ids`` (n,) UTF-8 and unique, ``/lengths`` (n,) int64 in residues, ``/digests`` (n, 32) uint8, SHA-256 of each
sequence. Attributes of the root: ``format``, ``version``, ``fedbio_version`` and the fields of
`fedbio.results.EncoderInfo`, without those that have their default (``bins`` is there for pooling ``"ends"`` only).
A row was cut or averaged over windows, as ``long`` says, if its length is above ``max_residues``.

Where ``pooling`` is ``"residues"``, ``/embeddings`` has one row per residue, protein after protein, and ``/pointers``
(n + 1,) int64 says where: protein i has the rows from ``pointers[i]`` to ``pointers[i + 1]``.

While it grows, an embeddings file is a folder of finished shards; the file itself appears whole.
"""

from __future__ import annotations

__all__ = [
    "CHUNK_ROWS",
    "RESIDUES",
    "Embeddings",
    "Heads",
    "Parts",
    "check_same_encoder",
    "sequence_digest",
    "write_embeddings",
    "write_stream",
]

from fedbio.embeddings.form import CHUNK_ROWS, RESIDUES, Heads, check_same_encoder, sequence_digest
from fedbio.embeddings.parts import Parts
from fedbio.embeddings.reading import Embeddings
from fedbio.embeddings.writing import write_embeddings, write_stream
