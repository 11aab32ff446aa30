"""Named tensors without torch: the safetensors layout in memory, in files and in chunks, and their weighted mean."""

from __future__ import annotations

__all__ = [
    "SCHEMES",
    "ErrorFeedback",
    "LayoutReader",
    "Piece",
    "SiteFault",
    "TensorFile",
    "TensorLimits",
    "TensorSpec",
    "average_files",
    "check_file",
    "check_matches",
    "chunks",
    "encoded_size",
    "header",
    "manifest",
    "mean_chunks",
    "mean_size",
    "open_file",
    "parse",
    "quantized_chunks",
    "quantized_size",
    "weighted_mean",
    "write_file",
]

from fedbio.tensors.average import average_files
from fedbio.tensors.check import check_matches, manifest
from fedbio.tensors.combine import weighted_mean
from fedbio.tensors.feedback import ErrorFeedback
from fedbio.tensors.file import open_file, write_file
from fedbio.tensors.layout import TensorLimits, TensorSpec, chunks, encoded_size, header, parse
from fedbio.tensors.lockstep import SiteFault, mean_chunks, mean_size
from fedbio.tensors.quantize import SCHEMES
from fedbio.tensors.quantized import quantized_chunks, quantized_size
from fedbio.tensors.reader import LayoutReader, Piece
from fedbio.tensors.source import TensorFile, check_file
