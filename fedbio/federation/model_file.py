"""Models that stay in files at the server: one is sent without being loaded, and updates are checked as they arrive."""

from __future__ import annotations

__all__ = ["FileModel", "ModelFile", "ModelFilePayload", "UpdateSink", "in_file"]

import os
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedbio.errors import DataError, ProtocolError
from fedbio.federation.model import PARAMS, FLModel, Parameters
from fedbio.tensors import SCHEMES, TensorFile
from fedbio.tensors.check import CheckedReader, Manifest
from fedbio.tensors.layout import CHUNK_BYTES, manifest_header, tensor_bytes
from fedbio.transport import Payload, Sink


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model's parameters in a safetensors file.

    Parameters
    ----------
    path : path-like
    manifest : mapping of str to (shape, dtype)
        What they are, in the order of their data.
    """

    path: str | os.PathLike[str]
    manifest: Manifest
    _holder: Any = field(default=None, compare=False, repr=False)
    """Keeps a nameless file alive."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Return the model in a file; raise `FormatError` if it is malformed."""
        with TensorFile(path) as file:
            return cls(path, file.manifest)


class FileModel(FLModel, kw_only=True):
    """A model whose parameters are in a file, but for those that travel beside them; never read from the wire."""

    file: ModelFile


def in_file(model: FLModel, file: ModelFile) -> FileModel:
    """Return a model with its parameters in a file."""
    return FileModel(**{name: getattr(model, name) for name in FLModel.__struct_fields__}, file=file)


class ModelFilePayload(Payload):
    """The parameters of a message: some in memory, then those of a model file, which are read chunk by chunk.

    Parameters
    ----------
    tensors : dict of str to ndarray
        By their names on the wire.
    model : ModelFile
    """

    kind = "tensors"

    def __init__(self, tensors: Parameters, model: ModelFile) -> None:
        self._path = model.path
        names = {PARAMS + name: spec for name, spec in model.manifest.items()}
        if twins := names.keys() & tensors.keys():
            raise ValueError(f"in memory and in the file: {', '.join(sorted(twins))}")
        in_memory = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        head = manifest_header({**in_memory, **names}) + b"".join(map(tensor_bytes, tensors.values()))
        self._head = memoryview(head)
        with TensorFile(model.path) as file:
            self._begin = file.data_begin
            super().__init__(len(head) + file.data_bytes)

    def chunks(self, start: int = 0) -> Iterator[memoryview]:
        assert self.size is not None
        with open(self._path, "rb", buffering=0) as file:
            for begin in range(start * CHUNK_BYTES, self.size, CHUNK_BYTES):
                # memory of its own: a chunk may be kept
                chunk = np.empty(min(CHUNK_BYTES, self.size - begin), np.uint8).data
                head = self._head[begin : begin + len(chunk)]
                chunk[: len(head)] = head
                file.seek(self._begin + max(0, begin + len(head) - len(self._head)))
                if not _fill(file, chunk[len(head) :]):
                    raise DataError(f"{self._path}: shorter than when sending began")
                yield chunk


def _fill(file: IO[bytes], chunk: memoryview) -> bool:
    while len(chunk):
        count = os.readv(file.fileno(), [chunk])
        if not count:
            return False
        chunk = chunk[count:]
    return True


class UpdateSink(Sink):
    """Takes the parameters of a result into a nameless file, in whatever scheme they travel; `ModelFile` at the end.

    Names, shapes, dtypes and finiteness are checked on the way: an update that may not count ends its stream.

    Parameters
    ----------
    folder : Path
        Where the file is; it is gone with the last reference to the model, or with the process.
    expected : mapping of str to (shape, dtype)
        What the parameters must be.
    refused : callable
        Told the reason if the update may not count.
    schemes : collection of str
        Quantization schemes that are taken.
    """

    def __init__(
        self,
        folder: Path,
        expected: Manifest,
        refused: Callable[[str], None],
        *,
        schemes: Collection[str] = tuple(SCHEMES),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._refused = refused
        self._reader = CheckedReader({PARAMS + name: spec for name, spec in expected.items()}, schemes=schemes)
        self._file = _NamelessFile(folder)
        self._manifest: Manifest | None = None

    def write(self, chunk: memoryview) -> None:
        try:
            for piece in self._reader.feed(chunk):
                if self._manifest is None:
                    self._begin()
                self._file.write(piece.values.view(np.uint8).data)
        except ProtocolError as error:
            self._refused(str(error))
            raise
        except OSError as error:
            self._refused(f"the server cannot store it: {error.strerror}")
            raise

    def finish(self) -> ModelFile:
        try:
            self._reader.finish()
        except ProtocolError as error:
            self._refused(str(error))
            raise
        if self._manifest is None:
            self._begin()
        assert self._manifest is not None
        return ModelFile(self._file.path, self._manifest, self._file)

    def _begin(self) -> None:
        assert self._reader.specs is not None
        self._manifest = {name.removeprefix(PARAMS): spec for name, spec in self._reader.specs.items()}
        self._file.write(memoryview(manifest_header(self._manifest)))


class _NamelessFile:
    """A file that is gone with this object, or with the process, whatever ends it."""

    def __init__(self, folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.path = f"/proc/self/fd/{self._descriptor}"

    def write(self, content: memoryview) -> None:
        while len(content):
            content = content[os.write(self._descriptor, content) :]
