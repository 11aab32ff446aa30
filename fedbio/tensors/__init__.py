"""Named tensors without torch: the safetensors layout in memory, in files and in chunks, and their weighted mean."""

from __future__ import annotations

__all__ = [
    "TensorLimits",
    "TensorSpec",
    "check_matches",
    "chunks",
    "encoded_size",
    "header",
    "manifest",
    "open_file",
    "parse",
    "weighted_mean",
    "write_file",
]

from fedbio.tensors.combine import check_matches, manifest, weighted_mean
from fedbio.tensors.file import open_file, write_file
from fedbio.tensors.layout import TensorLimits, TensorSpec, chunks, encoded_size, header, parse
