"""Federated inference: every site turns its own proteins into embeddings with the encoder that the server names."""

from __future__ import annotations

__all__ = ["Embed"]

import time
from pathlib import Path

from fedbio.errors import FederationError, ProtocolError, SettingsError, TransportError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.messages import FileHeader
from fedbio.federation.model import FLModel
from fedbio.federation.workflows.study import Embedded, EmbedSpec, WeightsFile, meta, read_meta
from fedbio.files import sha256_file
from fedbio.settings import EmbedJob


class Embed(Controller):
    """Streams the encoder's weights to sites that lack them, then has all sites embed; counts and digests return."""

    def __init__(self, runtime: Runtime, job: EmbedJob) -> None:
        super().__init__(runtime)
        self.encoder, self.classes = job.encoder, tuple(job.classes)

    def run(self) -> None:
        """Embed at every site, and hold all of them to one encoder."""
        files = encoder_files(self.encoder.name)
        spec = EmbedSpec(
            name=self.encoder.name if not files else Path(self.encoder.name).name,
            seed=self.encoder.seed,
            sha256=self.encoder.sha256,
            dtype=self.encoder.dtype,
            long=self.encoder.long,
            classes=self.classes,
            files=tuple(WeightsFile(path.name, sha256_file(path), path.stat().st_size) for path in files),
        )
        if files:
            self.supply(spec, files)
        results = self.broadcast_and_wait("embed", FLModel(meta=meta(spec)))
        embedded = {each.site: read_meta(each.model.meta, Embedded) for each in results}
        digests = {site: each.encoder.weights_sha256 for site, each in embedded.items()}
        if len(set(digests.values())) > 1:
            raise FederationError(
                f"job {self.job}: sites have used different weights: "
                + ", ".join(f"{site} {digest[:12]}" for site, digest in digests.items())
                + "; give all of them the same release and encoder"
            )
        self.runtime.record.encoder = next(iter(embedded.values())).encoder

    def supply(self, spec: EmbedSpec, files: list[Path]) -> None:
        """Ask who lacks which file of the encoder, stream it there, and ask again until nobody lacks any."""
        by_sha256 = {each.sha256: path for each, path in zip(spec.files, files, strict=True)}
        while lacking := [
            (result.site, sha256)
            for result in self.broadcast_and_wait("weights", FLModel(meta=meta(spec)))
            for sha256 in result.model.meta.get("missing", [])
        ]:
            for site, sha256 in lacking:
                if sha256 not in by_sha256:
                    raise ProtocolError(f"{site} asks for a file {sha256!r} that is no part of the encoder")
                path = by_sha256[sha256]
                self.stream(site, path, FileHeader(spec.group, path.name, sha256))

    def stream(self, site: str, path: Path, header: FileHeader) -> None:
        """Send one file, again if the connection breaks, until the round's deadline."""
        deadline = time.monotonic() + self.runtime.limits.round_deadline_s
        while True:
            try:
                self.runtime.send_file(site, path, header, "encoder")
                self.runtime.events.write("file sent", site=site, file=header.name, sha256=header.sha256)
                return
            except TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)


def encoder_files(name: str) -> list[Path]:
    """Return the files of an encoder that is given by its path, and none for a built-in one.

    Raises
    ------
    SettingsError
        If the name looks like a path and nothing is there.
    """
    path = Path(name)
    if path.is_dir():
        files = [path / part for part in ("config.json", "model.safetensors")]
        absent = [each.name for each in files if not each.is_file()]
        if absent:
            raise SettingsError(
                f"encoder.name: {path}: {' and '.join(absent)} missing; give a folder that fedbio wrote"
            )
        return files
    if path.is_file():
        return [path]
    if "/" in name or path.suffix in (".pt", ".safetensors"):
        raise SettingsError(f"encoder.name: {name}: there is no such file or folder at the server; check the path")
    return []
