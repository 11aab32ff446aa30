"""A whole study with real executors: every party ends with the same model, and with its tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbio.classifier import Standardizer, load_model, load_site_data, moments
from fedbio.classifier.metrics import accuracy, macro_f1, mcc
from fedbio.embeddings import Embeddings
from fedbio.errors import DataError, FederationError
from fedbio.federation.state import State
from fedbio.federation.workflows.study import scores
from fedbio.files import sha256_file
from fedbio.report import collect
from fedbio.results import read_party
from fedbio.settings import COMPARTMENTS, JobsFile

SITES = ("site-1", "site-2", "site-3")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_embed_classify_and_map_end_to_end(study: Any) -> None:
    allow = {"site-1": ("embed", "statistics", "train", "evaluate", "publish", "map")}
    allow["site-2"] = allow["site-1"]
    study.run(study.jobs(points=10), allow=allow)
    folder = study.folder

    digests = {sha256_file(folder / party / "global" / "model.safetensors") for party in ("server", *SITES)}
    assert len(digests) == 1
    model = load_model(folder / "site-1" / "global")
    assert model.card.trained_by == list(SITES)
    assert model.card.encoder.name == "small"

    record = read_party(folder / "site-2" / "party.json")
    assert record.best == model.card.mlp
    assert set(record.federation) == set(SITES)
    assert record.data is not None
    assert record.data.proteins == len(study.proteins["site-2"])
    assert set(record.sent) == {"control", "coordinates", "counts", "metrics", "model", "sums"}
    assert set(read_party(folder / "site-3" / "party.json").sent) == {"control", "counts", "metrics", "model", "sums"}
    assert "site-3 did not allow" in read_party(folder / "server" / "party.json").remarks[0]

    # a site has its own rows and those of all together, as the server has them
    told = {tuple(each.values()) for each in rows(folder / "server/metrics.csv")}
    for site in SITES:
        own = [tuple(each.values()) for each in rows(folder / site / "metrics.csv")]
        assert len(own) == len(set(own))
        assert set(own) == {each for each in told if each[0] in ("federated", site)}
    found = {
        (each["party"], each["model"], each["split"], each["metric"]) for each in rows(folder / "server/metrics.csv")
    }
    for party in ("federated", *SITES):
        for mlp in ("8", "8-4"):
            assert {(party, mlp, "test", name) for name in ("accuracy", "macro_f1", "mcc", "loss")} <= found
            assert {(party, mlp, "validation", "accuracy"), (party, mlp, "train", "loss")} <= found

    predictions = rows(folder / "site-1/predictions.csv")
    assert {(each["party"], each["model"]) for each in predictions} == {
        (party, mlp) for party in ("federated", "site-1") for mlp in ("8", "8-4")
    }
    tests = {each.id for each in study.proteins["site-1"] if each.set == "test"}
    assert {each["id"] for each in predictions} == tests

    points = rows(folder / "site-1/map.csv")
    assert [each["site"] for each in points] == ["site-1"] * 10 + ["site-2"] * 10
    assert list(points[0]) == ["site", "target", "split", "x", "y"]
    assert not (folder / "site-3/map.csv").exists()


def test_the_map_of_pooled_ends_shows_the_whole_proteins(study: Any) -> None:
    study.embed_all(pooling="ends")
    allow = dict.fromkeys(SITES, ("embed", "statistics", "train", "evaluate", "publish", "map"))
    study.run(study.jobs(points=10_000, embed=False, mlps=["4"], rounds=1), allow=allow)
    features, training = [], []
    for site, proteins in study.proteins.items():
        with Embeddings.open(study.folder / site / "embeddings.h5") as store:
            assert store.info.width == 5 * store.info.whole_width
            features.append(store.rows([each.id for each in proteins])[:, : store.info.whole_width].astype(np.float64))
        training += [each.set == "train" and not each.validation for each in proteins]
    whole = np.concatenate(features)
    train = whole[np.array(training)]
    standard = (whole - train.mean(0)) / train.std(0)
    known = standard[np.array(training)]
    components = np.linalg.eigh(known.T @ known)[1][:, ::-1][:, :2]
    components *= np.sign(components[np.abs(components).argmax(0), [0, 1]])
    expected = standard @ components
    # every test protein is at all sites, and its point as well
    shown = np.array([[float(each["x"]), float(each["y"])] for each in rows(study.folder / "site-1/map.csv")])
    assert shown.shape == expected.shape
    apart = np.linalg.norm(shown[:, None] - expected[None], axis=2)
    assert max(apart.min(0).max(), apart.min(1).max()) < 0.01


def test_two_studies_at_once_have_results_and_reports_of_their_own(study: Any) -> None:
    study.embed_all()
    training = {"mlps": ["4"], "seeds": [0], "rounds": 2, "patience": 4}
    known = list(COMPARTMENTS)
    jobs = [
        {"workflow": "classify", "name": "first", "training": training},
        {"workflow": "classify", "name": "second", "training": training, "classes": known[::-1]},
    ]
    limits = {"join_deadline_s": 30, "round_deadline_s": 60, "jobs_at_once": 2}
    study.run(JobsFile.model_validate({"jobs": jobs, "federation": limits}))
    for party in ("server", *SITES):
        first, second = study.folder / party, study.folder / party / "studies/second"
        assert load_model(first / "global").card.classes == known
        assert load_model(second / "global").card.classes == known[::-1]
        assert read_party(first / "party.json").classes == known
        assert read_party(second / "party.json").classes == known[::-1]
    for site in SITES:
        # the same network and seed: only their places keep them apart
        parts = [study.folder / site / each / "predictions/federated-4-seed-0.csv" for each in ("", "studies/second")]
        assert {row["predicted"] for row in rows(parts[0])} <= set(known)
        assert parts[0].read_bytes() != parts[1].read_bytes()
    for job, classes in ((None, known), ("second", known[::-1])):
        run = collect(study.folder, job)
        assert run.classes == classes
        assert {row.party for row in run.predictions} == {"federated", *SITES}
        assert (run.folder / "events.jsonl").stat().st_size > 1000
    assert run.folder == study.folder / "studies/second"
    with pytest.raises(DataError, match="no party has results of a further study third; there are second"):
        collect(study.folder, "third")


def test_federated_standardizer_is_that_of_all_proteins_in_one_place(study: Any) -> None:
    study.embed_all()
    study.run(study.jobs(embed=False, rounds=1, mlps=["4"]))
    state = State(study.folder / "server")
    found = state.stored("classify", "standardizer")
    state.close()
    data = [
        load_site_data(study.folder / f"{site}.fasta", study.folder / site / "embeddings.h5", COMPARTMENTS)
        for site in SITES
    ]
    expected = Standardizer.from_moments([moments(each.train.features) for each in data])
    np.testing.assert_array_equal(found["standardizer.mean"], expected.mean)
    np.testing.assert_allclose(found["standardizer.scale"], expected.scale, rtol=1e-6)


def test_unknown_label_ends_the_study_and_its_text_stays_at_the_site(
    study: Any, caplog: pytest.LogCaptureFixture
) -> None:
    study.embed_all()
    path = study.folder / "site-2.fasta"
    path.write_text(path.read_text().replace("TARGET=Nucleus", "TARGET=Nuclues", 1))
    with pytest.raises(FederationError, match="site-2: failed: its own data are refused; its log says where") as caught:
        study.run(study.jobs(embed=False))
    assert "Nuclues" not in str(caught.value)
    at_the_site = [each.getMessage() for each in caplog.records if each.name.startswith("fedbio.federation.site")]
    assert any("site-2.fasta:" in text and "did you mean 'Nucleus'" in text for text in at_the_site)


def test_site_that_was_not_embedded_is_told_what_to_do(study: Any) -> None:
    with pytest.raises(FederationError, match="not embedded yet; run a job with workflow: embed"):
        study.run(study.jobs(embed=False))


def test_site_with_too_few_proteins_abstains_and_still_gets_the_model(study: Any) -> None:
    study.embed_all()
    fewest = min(study.proteins, key=lambda site: train_count(study.proteins[site]))
    least = train_count(study.proteins[fewest]) + 1
    others = [site for site in SITES if site != fewest]
    assert all(train_count(study.proteins[site]) >= least for site in others)
    study.run(study.jobs(embed=False, min_proteins=least))
    record = read_party(study.folder / fewest / "party.json")
    assert "abstains" in record.remarks[0]
    assert "sums" not in record.sent
    assert (study.folder / fewest / "global" / "model.json").exists()


def train_count(proteins: list[Any]) -> int:
    return sum(each.set == "train" and not each.validation for each in proteins)


def test_scores_of_the_server_are_those_of_the_classifier() -> None:
    confusion = np.array([[5, 1, 0, 0], [2, 7, 0, 1], [0, 0, 0, 0], [3, 0, 0, 4]], dtype=np.int64)
    found = scores(confusion)
    assert found["accuracy"] == pytest.approx(accuracy(confusion))
    assert found["macro_f1"] == pytest.approx(macro_f1(confusion))
    assert found["mcc"] == pytest.approx(mcc(confusion))


def test_same_study_twice_gives_the_same_bits(study: Any, tmp_path: Path) -> None:
    study.embed_all()
    digests = []
    for _ in range(2):
        study.run(study.jobs(embed=False))
        digests.append(sha256_file(study.folder / "server/global/model.safetensors"))
        for path in (study.folder / "server").iterdir():
            if path.name.startswith("state"):
                path.unlink()
    assert digests[0] == digests[1]
