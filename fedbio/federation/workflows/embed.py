"""Federated inference: every site turns its own proteins into embeddings with the encoder that the server names.

Roth et al. 2024, "Empowering Federated Learning for Massive Models with NVIDIA FLARE", arXiv:2402.07792.
"""

from __future__ import annotations

__all__ = ["Embed"]

from collections import Counter
from pathlib import Path

from fedbio.encoder_files import file_form, look_into
from fedbio.encoder_names import KNOWN, find_encoder, named_path
from fedbio.errors import FederationError, InputError, SettingsError
from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.job_files import PLAIN_NAME
from fedbio.federation.messages import FileHeader
from fedbio.federation.model import FLModel
from fedbio.federation.workflows.streaming import stream_files
from fedbio.federation.workflows.study import Embedded, EmbedSpec, WeightsFile, meta, read_meta
from fedbio.federation.workflows.study_checks import embedded_answer, weights_answer
from fedbio.files import sha256_file
from fedbio.settings import EmbedJob

QUESTIONS = 4
"""How often a site is asked what it lacks: a file may be lost once, a site that never keeps one is left out."""


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
            pooling=self.encoder.pooling,
            layer=self.encoder.layer,
            classes=self.classes,
            files=tuple(WeightsFile(path.name, sha256_file(path), path.stat().st_size) for path in files),
        )
        sites = list(self.sites())
        least = self.runtime.desk.needed(len(sites))
        if files:
            sites = self.supply(spec, files, sites, least)
        results = self.broadcast_and_wait(
            "embed", FLModel(meta=meta(spec)), sites, min_responses=least, check=embedded_answer
        )
        embedded = {each.site: read_meta(each.model.meta, Embedded) for each in results}
        digests = {site: each.encoder.weights_sha256 for site, each in embedded.items()}
        [(common, count)] = Counter(digests.values()).most_common(1)
        different = [site for site, digest in digests.items() if digest != common]
        if different and (2 * count <= len(digests) or count < least):
            raise FederationError(
                f"job {self.job}: sites have used different weights: "
                + ", ".join(f"{site} {digest[:12]}" for site, digest in digests.items())
                + "; give all of them the same release and encoder"
            )
        for site in different:
            reason = f"it has used other weights ({digests[site][:12]}) than most sites ({common[:12]})"
            self.runtime.refused(site, "embed", reason)
        self.runtime.record.encoder = next(each.encoder for site, each in embedded.items() if site not in different)

    def supply(self, spec: EmbedSpec, files: list[Path], sites: list[str], least: int) -> list[str]:
        """Ask who lacks which file of the encoder, stream it there, and ask again; return the sites that lack none.

        Raises
        ------
        FederationError
            If there are fewer than `least` of them; names the others, and why.
        """
        by_sha256 = {each.sha256: path for each, path in zip(spec.files, files, strict=True)}
        asked, complete, without = sites, list[str](), dict[str, str]()
        for _ in range(QUESTIONS):
            results = self.broadcast_and_wait(
                "weights",
                FLModel(meta=meta(spec)),
                asked,
                min_responses=max(0, least - len(complete)),
                check=weights_answer(by_sha256.keys()),
                missing=without,
            )
            lacking = {each.site: each.model.meta.get("missing", []) for each in results}
            complete += [site for site, missing in lacking.items() if not missing]
            wanted = {
                site: [(by_sha256[each], FileHeader(spec.group, by_sha256[each].name, each)) for each in missing]
                for site, missing in lacking.items()
                if missing
            }
            if not wanted:
                break
            away = stream_files(self, wanted, "encoder")
            without |= away
            asked = [site for site in wanted if site not in away]
        else:
            for site in asked:
                without[site] = "it lacks files that were sent to it, again and again"
                self.runtime.refused(site, "weights", without[site])
        if len(complete) < least:
            raise FederationError(
                f"job {self.job}: {len(complete)} sites have the encoder, {least} are needed; "
                + "; ".join(f"{site}: {reason}" for site, reason in sorted(without.items()))
            )
        return sorted(complete)


def encoder_files(name: str) -> list[Path]:
    """Return the files of an encoder, given by its path or by a name (`fedbio.encoder_names.named_path`).

    They are sent as they are, of whatever form, and each site reads them; so the server needs no torch.

    Returns
    -------
    list of Path
        None for a built-in architecture.

    Raises
    ------
    SettingsError
        If the name looks like a path and nothing is there, if it is that of a checkpoint which is not in the cache, or
        if sites could not keep a file under its name.
    """
    if not Path(name).exists() and name not in KNOWN and named_path(name) is None:
        if "/" in name or Path(name).suffix in (".pt", ".nemo", ".safetensors"):
            raise SettingsError(f"encoder.name: {name}: there is no such file or folder at the server; check the path")
        return []  # the built-in architecture, or one of another release: the sites will say
    try:
        path = find_encoder(name)
        assert path is not None
        if path.is_dir():
            folder = look_into(path)
            files = [*folder.weights, *folder.beside]
        else:
            file_form(path)
            files = [path]
    except InputError as error:
        raise SettingsError(f"encoder.name: {error}") from error
    for file in files:
        if not PLAIN_NAME.fullmatch(file.name):
            raise SettingsError(
                f"encoder.name: {file}: sites keep files under names of letters, digits, '.', '_' and '-'; rename it"
            )
    return files
