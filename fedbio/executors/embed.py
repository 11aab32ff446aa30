"""Tasks of federated inference: which files of the encoder a site lacks, and embedding its own proteins."""

from __future__ import annotations

__all__ = ["Embed", "Weights"]

import contextlib
from pathlib import Path
from typing import ClassVar

from fedbio.encoder_names import packaged_path
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.job_files import PLAIN_NAME
from fedbio.federation.model import FLModel, Task
from fedbio.federation.workflows.study import Embedded, EmbedSpec, WeightsFile, meta, read_meta
from fedbio.files import sha256_file


class Weights(Executor):
    """Says which of the encoder's files are not here."""

    name: ClassVar[str] = "weights"
    kind: ClassVar[str] = "embed"
    leaves: ClassVar[str] = "control"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return the SHA-256 of each file that has to be sent."""
        spec = read_meta(model.meta, EmbedSpec)
        folder = context.received(spec.group)
        missing = [each for each in spec.files if not _is_there(folder / each.name, each)]
        return FLModel(meta={"missing": [each.sha256 for each in missing if not _is_installed(spec, each, folder)]})


def _is_there(path: Path, file: WeightsFile) -> bool:
    return path.is_file() and sha256_file(path) == file.sha256


def _is_installed(spec: EmbedSpec, file: WeightsFile, folder: Path) -> bool:
    """Take a file from the encoder that came with this site's fedbio, if it is the very same, and not over the wire."""
    own = packaged_path(spec.name)
    if own is None or not PLAIN_NAME.fullmatch(file.name) or not _is_there(own / file.name, file):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).unlink(missing_ok=True)
    # a link takes no room; should another release put another file in its place, it is found out and sent
    (folder / file.name).symlink_to((own / file.name).resolve())
    return True


class Embed(Executor):
    """Turns the site's own proteins into its own embeddings file."""

    name: ClassVar[str] = "embed"
    kind: ClassVar[str] = "embed"
    leaves: ClassVar[str] = "counts"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Embed, or find it done, and return counts, seconds and the encoder's digest."""
        from fedbio.encoder import embed_file

        spec = read_meta(model.meta, EmbedSpec)
        report = embed_file(
            context.data,
            context.embeddings,
            encoder=encoder_path(spec, context),
            seed=spec.seed,
            expected_sha256=spec.sha256,
            dtype=spec.dtype,
            device=context.device,
            long=spec.long,
            pooling=spec.pooling,
            layer=spec.layer,
            threads=context.threads,
            reuse=context.reuse,
            labels=context.labels,
            classes=spec.classes,
        )
        context.record.encoder = report.encoder
        return FLModel(
            meta=meta(
                Embedded(
                    proteins=report.proteins,
                    residues=report.residues,
                    longer=report.cut + report.windowed,
                    reused=report.reused,
                    seconds=report.seconds,
                    encoder=report.encoder,
                )
            )
        )


def encoder_path(spec: EmbedSpec, context: SiteContext) -> str | Path:
    """Return what the encoder room knows the encoder by: a built-in name, a folder, or a checkpoint file."""
    if not spec.files:
        return spec.name
    folder = context.received(spec.group)
    if len(spec.files) == 1:
        return folder / spec.files[0].name
    # a Hugging Face folder does not say what it is called, so that it needs its name beside that of the group
    alias = folder / spec.name
    if not PLAIN_NAME.fullmatch(spec.name):
        return folder
    with contextlib.suppress(FileExistsError):
        alias.symlink_to(".", target_is_directory=True)
    return alias if alias.is_dir() else folder
