"""A study of light attention with real executors: what is averaged, what it is standardized by, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedbio.classifier import Moments, Residues, Standardizer, TrainData, initialize, load_model, load_site_data, train
from fedbio.errors import FederationError, ProtocolError
from fedbio.executors import registry
from fedbio.federation.executor import SiteContext
from fedbio.federation.model import FLModel, Task
from fedbio.federation.state import State
from fedbio.federation.workflows.study import Study, read_meta
from fedbio.files import sha256_file
from fedbio.networks import Attention
from fedbio.settings import COMPARTMENTS

SITES = ("site-1", "site-2", "site-3")
TRAINING = {"mlps": ["la3x4-6"], "rounds": 1, "epochs": 2, "batch_size": 8, "attention_residues": 150}


def test_a_round_is_the_mean_of_what_each_site_trained_on_its_own_residues(study: Any) -> None:
    study.embed_all(pooling="residues")
    study.run(study.jobs(points=10, embed=False, **TRAINING))
    state = State(study.folder / "server")
    found, standardizer = state.model("classify", "la3x4-6-seed-0", 1), state.stored("classify", "standardizer")
    state.close()

    data = [
        load_site_data(
            study.folder / f"{site}.fasta",
            study.folder / site / "embeddings.h5",
            COMPARTMENTS,
            attention_residues=150,
        ).train
        for site in SITES
    ]
    # over all residues that are read: of the longest proteins only 150
    rows = []
    for part in data:
        assert isinstance(part.features, Residues)
        assert part.features.lengths.max() == 150
        rows += list(part.features.each())
    together = np.concatenate(rows).astype(np.float64)
    count = len(together)
    expected = Standardizer.from_moments([Moments(count, together.sum(axis=0), (together**2).sum(axis=0))])
    np.testing.assert_allclose(standardizer["standardizer.mean"], expected.mean, atol=1e-6)
    np.testing.assert_allclose(standardizer["standardizer.scale"], expected.scale, rtol=1e-6)

    parameters = initialize(32, (6,), len(COMPARTMENTS), seed=0, attention=Attention(3, 4))
    trained = [
        train(
            parameters, TrainData(expected.apply(part.features), part.targets), epochs=2, batch_size=8, seed=0
        ).parameters
        for part in data
    ]
    weights = [len(part) for part in data]
    assert found.keys() == parameters.keys()
    for name, value in found.items():
        mean = np.average([each[name] for each in trained], axis=0, weights=weights)
        np.testing.assert_allclose(value, mean, atol=1e-5)
        assert not np.allclose(value, parameters[name], atol=1e-5)

    assert len({sha256_file(study.folder / party / "global/model.safetensors") for party in ("server", *SITES)}) == 1
    card = load_model(study.folder / "site-3/global").card
    assert (card.mlp, card.attention_residues, card.encoder.pooling) == ("la3x4-6", 150, "residues")


@pytest.mark.parametrize(
    ("pooling", "mlp", "message"),
    [
        ("mean", "la9-8", "job classify: light attention .la9-8. reads one embedding per residue.*embed with pooling"),
        ("residues", "8", "job classify: the MLP 8 reads one embedding per protein.*embed with another pooling"),
    ],
)
def test_embeddings_that_the_classifiers_cannot_read_end_the_job(
    study: Any, pooling: str, mlp: str, message: str
) -> None:
    study.embed_all(pooling=pooling)
    with pytest.raises(FederationError, match=message):
        study.run(study.jobs(embed=False, mlps=[mlp]))


@pytest.mark.parametrize("claimed", [-1e6, 1e12])
def test_a_site_that_claims_too_few_or_too_many_residues_is_not_believed(study: Any, claimed: float) -> None:
    study.embed_all(pooling="residues")
    executors = registry()
    honest = executors["moments"]

    class Liar(type(honest)):  # type: ignore[misc]
        def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
            found: FLModel = honest.execute(task, model, context)
            found.params["count"] = np.full(1, claimed)
            return found

    executors["moments"] = Liar(honest.shelf)
    refused = r"site-2: its result was refused: .*residues of \d+ proteins with at most 150 each"
    with pytest.raises(FederationError, match=refused):
        study.run(study.jobs(embed=False, **TRAINING), executors={"site-2": executors})


@pytest.mark.parametrize("most", [0, 1, -5, 10**9, "all"])
def test_a_server_that_names_no_sensible_number_of_residues_is_refused(most: object) -> None:
    with pytest.raises(ProtocolError, match=r"not a Study: .*attention_residues"):
        read_meta({"attention_residues": most}, Study)
