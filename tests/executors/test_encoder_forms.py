"""A federation with an encoder of each form: sites get it as it is, and all embed with the same weights and name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from fedbio.cli import main
from fedbio.embeddings import Embeddings
from fedbio.encoder.bins import BINS
from fedbio.encoder.checkpoint import read_encoder
from fedbio.encoder.checkpoint.huggingface_save import write_huggingface
from fedbio.executors.embed import Weights as WeightsTask
from fedbio.federation.model import FLModel
from fedbio.federation.workflows.study import EmbedSpec, WeightsFile, meta
from fedbio.files import sha256_file
from fedbio.results import read_party
from fedbio.settings import JobsFile
from fedbio.weights import WEIGHTS_FILE, read_weights, weights_digest, write_weights
from fedbio.weights_file import WeightForm

from .conftest import SITES


@pytest.mark.parametrize(("form", "pooling"), [("path", "mean"), ("name in the cache", "ends")])
def test_sites_embed_with_a_folder_of_hugging_face(
    study: Any, tmp_path: Path, form: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = read_weights(study.encoder)
    monkeypatch.setenv("FEDBIO_ENCODERS", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "lab" / "our-encoder"
    write_huggingface(folder, config, weights)
    # a folder that another tool has written does not say what it is called
    settings = folder / "config.json"
    settings.write_text(settings.read_text().replace('  "_name_or_path": "small",\n', ""))
    name = str(folder) if form == "path" else "lab/our-encoder"
    jobs = {
        "jobs": [{"workflow": "embed", "encoder": {"name": name, "pooling": pooling}}],
        "federation": {"join_deadline_s": 30, "round_deadline_s": 60},
    }
    study.run(JobsFile.model_validate(jobs))
    for site in SITES:
        with Embeddings.open(study.folder / site / "embeddings.h5") as embeddings:
            assert embeddings.info.weights_sha256 == weights_digest(weights)
            assert embeddings.info.name == "our-encoder"
            assert embeddings.info.pooling == pooling
            assert embeddings.info.width == config.width * (1 + BINS if pooling == "ends" else 1)


def test_federated_inference_gives_the_embeddings_of_the_command(study: Any, tmp_path: Path) -> None:
    config, weights = read_weights(study.encoder)
    write_weights(tmp_path / "encoder", config, weights, "float32")
    encoder = {"name": str(tmp_path / "encoder"), "pooling": "ends", "dtype": "float32"}
    jobs = {"jobs": [{"workflow": "embed", "encoder": encoder}], "federation": {"round_deadline_s": 60}}
    study.run(JobsFile.model_validate(jobs))
    for site in SITES:
        own = tmp_path / f"{site}.h5"
        command = ["embed", str(study.folder / f"{site}.fasta"), "-o", str(own), "--encoder", encoder["name"]]
        assert main([*command, "--pooling", "ends", "--dtype", "float32"]) == 0
        with Embeddings.open(study.folder / site / "embeddings.h5") as of_job, Embeddings.open(own) as of_command:
            assert of_job.info == of_command.info
            assert list(of_job.ids) == list(of_command.ids)
            np.testing.assert_allclose(of_job.rows(of_job.ids), of_command.rows(of_command.ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("named", "form"), [("comes with fedbio", "float16"), ("path", "int8"), ("path", "float16")])
def test_sites_embed_with_rounded_weights_of_the_server(
    study: Any, tmp_path: Path, named: str, form: WeightForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named != "path":
        monkeypatch.setattr("fedbio.encoder_names.PACKAGED", tmp_path / "encoders")
    config, weights = read_weights(study.encoder)
    folder = tmp_path / "encoders" / "mini"
    write_weights(folder, msgspec.structs.replace(config, name="mini"), weights, form)
    digest = weights_digest(read_weights(folder)[1])
    account = {
        "format": "fedbio-training", "version": 1, "encoder": "mini", "weights_sha256": digest, "parameters": 9,
        "finished": True, "tokens": 5, "curve": [{"step": 1, "tokens": 5, "perplexity": 12.5, "final": True}],
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(account))
    (folder / "README.md").write_text("stays at the server")
    jobs = {
        "jobs": [{"workflow": "embed", "encoder": {"name": "mini" if named != "path" else str(folder)}}],
        "federation": {"join_deadline_s": 30, "round_deadline_s": 60},
    }
    study.run(JobsFile.model_validate(jobs))
    known_to_server = read_party(study.folder / "server" / "party.json").encoder
    assert known_to_server is not None
    assert (known_to_server.name, known_to_server.weights_sha256) == ("mini", digest)
    assert digest != weights_digest(weights)
    # by name, a site has the same files in its own installation; by path, they come over the wire
    events = (study.folder / "server" / "events.jsonl").read_text()
    assert events.count('"file sent"') == (12 if named == "path" else 0)
    for site in SITES:
        with Embeddings.open(study.folder / site / "embeddings.h5") as embeddings:
            assert embeddings.info.weights_sha256 == digest
            assert (embeddings.info.name, embeddings.info.perplexity) == ("mini", 12.5)
        (sent,) = (study.folder / site).rglob(WEIGHTS_FILE)
        # as small as at the server: it is sent as it is kept
        assert sent.read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
        assert read_encoder(sent.parent).sha256 == digest
        assert not (sent.parent / "README.md").exists()


def test_a_server_cannot_have_a_site_replace_a_file_outside_of_the_folder_of_received_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbio.encoder_names.PACKAGED", tmp_path / "encoders")
    (tmp_path / "encoders" / "mini").mkdir(parents=True)
    (tmp_path / "encoders" / "mini" / "config.json").touch()
    (tmp_path / "twin").write_text("the same everywhere")
    (tmp_path / "site" / "twin").parent.mkdir()
    (tmp_path / "site" / "twin").write_text("mine")
    file = WeightsFile("../../twin", sha256_file(tmp_path / "twin"), 19)
    spec = EmbedSpec(name="mini", seed=0, sha256=None, dtype="auto", long="cut", files=(file,))
    context = SimpleNamespace(received=lambda group: tmp_path / "site" / "received" / group)
    answer = WeightsTask().execute(cast("Any", None), FLModel(meta=meta(spec)), cast("Any", context))
    assert answer.meta == {"missing": [file.sha256]}
    assert (tmp_path / "site" / "twin").read_text() == "mine"
    assert not (tmp_path / "site" / "received").exists()
