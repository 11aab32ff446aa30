"""A federation with an encoder of each form: sites get it as it is, and all embed with the same weights and name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedbio.embeddings import Embeddings
from fedbio.encoder.bins import BINS
from fedbio.encoder.checkpoint.huggingface_save import write_huggingface
from fedbio.settings import JobsFile
from fedbio.weights import read_weights, weights_digest

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
