from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fedbio.classifier import (
    ModelCard,
    Parameters,
    Residues,
    SiteData,
    Standardizer,
    TrainData,
    check_parameters,
    evaluate,
    initialize,
    load_model,
    load_site_data,
    predict,
    save_model,
    train,
    train_alone,
)
from fedbio.classifier.architecture import convolution_shape
from fedbio.classifier.network import Network
from fedbio.cli import main
from fedbio.errors import DataError, FormatError
from fedbio.networks import Attention
from fedbio.proteins import Protein
from fedbio.results import EncoderInfo

WriteResidues = Callable[..., tuple[Path, Path]]
Rows = NDArray[np.float32]


def _parameters(kernel: int = 3, filters: int | None = 5, seed: int = 0) -> Parameters:
    return initialize(6, (8,), 3, seed=seed, attention=Attention(kernel, filters))


def _reference(parameters: Parameters, protein: Rows) -> NDArray[np.float64]:
    """Logits of one protein, shape (C,), filter by filter and residue by residue, as the paper defines them."""
    wide = {name: array.astype(np.float64) for name, array in parameters.items()}
    kernel = wide["attention.values.weight"].shape[2]
    around = np.pad(protein.astype(np.float64), ((kernel // 2, kernel // 2), (0, 0)))

    def convolve(filters: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array(
            [[(around[place : place + kernel].T * one).sum() for one in filters] for place in range(length)]
        )

    length = len(protein)
    values = convolve(wide["attention.values.weight"]) + wide["attention.values.bias"]
    scores = np.exp(convolve(wide["attention.scores.weight"]))
    x = np.concatenate([(values * scores / scores.sum(axis=0)).sum(axis=0), values.max(axis=0)])
    x = np.maximum(wide["layers.0.weight"] @ x + wide["layers.0.bias"], 0)
    logits: NDArray[np.float64] = wide["layers.1.weight"] @ x + wide["layers.1.bias"]
    return logits


def _packed(proteins: list[Rows], kernel: int) -> tuple[torch.Tensor, list[int]]:
    gap = np.zeros((kernel // 2, 6), dtype=np.float32)
    pieces = [gap, *(piece for protein in proteins for piece in (protein, gap))]
    return torch.from_numpy(np.concatenate(pieces)), [len(protein) for protein in proteins]


@pytest.fixture
def data(write_residues: WriteResidues, varied: list[Protein], classes: tuple[str, ...]) -> SiteData:
    return load_site_data(*write_residues("site-1", varied), classes)


@pytest.fixture
def standardized(data: SiteData) -> Callable[[TrainData], TrainData]:
    standardizer = Standardizer.fit(data.train.features)
    return lambda part: TrainData(standardizer.apply(part.features), part.targets, part.ids)


@pytest.mark.parametrize(("kernel", "filters"), [(1, 5), (3, 5), (9, None), (31, 2)])
def test_a_batch_of_unlike_lengths_is_what_the_paper_defines_for_each_protein(kernel: int, filters: int | None) -> None:
    random = np.random.default_rng(0)
    proteins = [random.normal(size=(length, 6)).astype(np.float32) for length in (1, 40, 2, 9, 17)]
    parameters = _parameters(kernel, filters)
    with torch.inference_mode():
        found = Network(parameters).eval()(*_packed(proteins, kernel)).numpy()
    np.testing.assert_allclose(found, [_reference(parameters, protein) for protein in proteins], atol=1e-5)


def test_gradients_are_those_of_the_loss() -> None:
    random = np.random.default_rng(1)
    proteins = [random.normal(size=(length, 6)).astype(np.float32) for length in (4, 11)]
    network = Network(_parameters()).double()
    rows, lengths = _packed(proteins, 3)
    targets = torch.tensor([2, 0])

    def loss() -> torch.Tensor:
        return F.cross_entropy(network(rows.double(), lengths), targets)

    names, tensors = zip(*network.named_parameters(), strict=True)
    assert len(names) == 7
    for name, tensor, gradient in zip(names, tensors, torch.autograd.grad(loss(), tensors), strict=True):
        for place in random.choice(tensor.numel(), min(tensor.numel(), 12), replace=False).tolist():
            flat, around = tensor.data.view(-1), []
            before = flat[place].item()
            for step in (1e-5, -1e-5):
                flat[place] = before + step
                around.append(loss().item())
            flat[place] = before
            expected = (around[0] - around[1]) / 2e-5
            assert gradient.reshape(-1)[place].item() == pytest.approx(expected, abs=1e-8), name


def test_first_parameters_are_these_bits_on_every_machine() -> None:
    parameters = initialize(256, (32,), 10, seed=0, attention=Attention(9, 64))
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(parameters[name].tobytes())
    assert digest.hexdigest() == "1102cc58c6348d45aa1b2dcceb0629fab6a4e9ee02bf2a62af9d765085caf752"
    bound = (256 * 9) ** -0.5
    for part in ("values", "scores"):
        weight = parameters[f"attention.{part}.weight"]
        assert 0.999 * bound < np.abs(weight).max() < bound
    # the layers after it are those of an MLP of as many inputs
    assert np.array_equal(parameters["layers.1.weight"], initialize(128, (32,), 10, seed=0)["layers.1.weight"])


def test_predictions_do_not_depend_on_order_or_batches(
    data: SiteData, standardized: Callable[[TrainData], TrainData], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, part = _parameters(9), standardized(data.train)
    assert isinstance(part.features, Residues)
    whole = predict(parameters, part.features)
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-6)
    order = np.random.default_rng(0).permutation(len(part))
    np.testing.assert_allclose(predict(parameters, part.features[order]), whole[order], atol=1e-6)
    monkeypatch.setattr("fedbio.classifier.inference.BLOCK_RESIDUES", 100)
    np.testing.assert_allclose(predict(parameters, part.features), whole, atol=1e-6)
    assert predict(parameters, part.features[[]]).shape == (0, 3)
    assert evaluate(parameters, part).count == 65


def test_training_finds_a_signal_at_the_ends_of_proteins(
    data: SiteData, standardized: Callable[[TrainData], TrainData]
) -> None:
    outcome = train_alone(
        standardized(data.train), standardized(data.validation), hidden=(8,), classes=3, attention=Attention(3, 8),
        rounds=12, patience=12, batch_size=8, learning_rate=0.01, dropout=0.0, seed=0,
    )  # fmt: skip
    assert evaluate(outcome.parameters, standardized(data.test)).accuracy > 0.8


def test_same_seed_gives_the_same_bits_and_other_rounds_others(
    data: SiteData, standardized: Callable[[TrainData], TrainData]
) -> None:
    part, parameters = standardized(data.train), _parameters(9)
    first, again, other = (train(parameters, part, seed=5, round_number=number) for number in (3, 3, 4))
    for name, array in first.parameters.items():
        assert array.tobytes() == again.parameters[name].tobytes()
        assert array.tobytes() != other.parameters[name].tobytes()
    assert first.loss == again.loss


def test_dropout_is_of_the_features_in_training_only() -> None:
    packed = _packed([np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)] * 200, 3)
    network = Network(_parameters(), dropout=0.5, generator=torch.Generator().manual_seed(0))
    assert network.attention is not None
    features = network.attention(*packed).detach()
    seen: list[torch.Tensor] = []
    network.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    network.eval()(*packed)
    network.train()(*packed)
    evaluated, trained = seen
    torch.testing.assert_close(evaluated, features)
    kept = trained != 0
    torch.testing.assert_close(trained[kept], 2 * features[kept])
    # 2,000 features, each kept in half of the cases: four standard errors
    assert kept.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention.scores.weight": None}, "expected values.weight, values.bias and scores.weight of attention"),
        ({"attention.extra": np.zeros(1, np.float32)}, "expected values.weight, values.bias and scores.weight"),
        ({"attention.scores.weight": np.zeros((5, 6, 5), np.float32)}, r"attention: shapes \(5, 6, 3\), \(5,\) and"),
        ({"attention.values.bias": np.zeros(6, np.float32)}, r"attention: shapes \(5, 6, 3\), \(6,\) and"),
        ({"attention.values.weight": np.zeros((5, 6), np.float32)}, r"attention: shapes \(5, 6\)"),
        ({"attention.values.bias": np.zeros(5, np.float64)}, "attention: expected float32, found float32, float64"),
        ({"layers.0.weight": np.zeros((8, 9), np.float32)}, "5 filters make 10 features, but layers.0 takes 9"),
        ({"layers.1.bias": None}, "a weight and a bias for each layer"),
    ],
)
def test_tensors_that_are_no_light_attention_are_refused(
    data: SiteData, change: dict[str, NDArray[np.float32] | None], message: str
) -> None:
    changed = {name: array for name, array in (_parameters() | change).items() if array is not None}
    with pytest.raises(DataError, match=message):
        train(changed, data.train)


def test_an_even_kernel_is_refused() -> None:
    changed = _parameters()
    for part in ("values", "scores"):
        changed[f"attention.{part}.weight"] = np.zeros((5, 6, 4), np.float32)
    with pytest.raises(DataError, match="with an odd kernel"):
        convolution_shape(changed)


def test_parameters_of_another_network_are_refused() -> None:
    shape = {"width": 6, "hidden": (8,), "classes": 3}
    check_parameters(_parameters(), **shape, attention=Attention(3, 5))
    with pytest.raises(DataError, match=r"kernel \(5, 6, 3\) instead of \(6, 6, 3\)"):
        check_parameters(_parameters(), **shape, attention=Attention(3))
    with pytest.raises(DataError, match=r"kernel \(5, 6, 3\) instead of None"):
        check_parameters(_parameters(), **shape)
    with pytest.raises(DataError, match=r"kernel None instead of \(5, 6, 3\)"):
        check_parameters(initialize(6, (8,), 3, seed=0), **shape, attention=Attention(3, 5))


def test_residues_for_an_mlp_and_pooled_rows_for_light_attention_are_refused(
    data: SiteData, blobs: Callable[..., TrainData]
) -> None:
    pooled = TrainData(blobs(9).features[:, :6], blobs(9).targets)
    with pytest.raises(DataError, match=r"embeddings of residues for an MLP.*embed again, for example with `--pooling"):
        train(initialize(6, (8,), 3, seed=0), data.train)
    with pytest.raises(DataError, match=r"one embedding per protein for light attention.*`--pooling residues`"):
        evaluate(_parameters(), pooled)
    with pytest.raises(DataError, match="embeddings of width 6 for a classifier that takes 7"):
        predict(initialize(7, (8,), 3, seed=0, attention=Attention(3)), data.train.features)


def test_a_model_comes_back_as_it_was_saved(tmp_path: Path, data: SiteData, residue_info: EncoderInfo) -> None:
    card = ModelCard(
        classes=list(data.classes), hidden=[8], attention=Attention(3, 5), attention_residues=20, encoder=residue_info
    )
    standardizer = Standardizer.fit(data.train.features)
    save_model(tmp_path / "model", _parameters(), standardizer, card)
    model = load_model(tmp_path / "model")
    assert model.card.mlp == "la3x5-8"
    again = model.predict(data.test.features)
    assert np.array_equal(again, predict(_parameters(), standardizer.apply(data.test.features)))

    written = json.loads((tmp_path / "model/model.json").read_text())
    assert written["attention"] == {"kernel": 3, "filters": 5}
    written["encoder"]["pooling"] = "mean"
    (tmp_path / "model/model.json").write_text(json.dumps(written))
    with pytest.raises(FormatError, match=r"does not fit model\.json: light attention \(la3x5-8\) reads one embedding"):
        load_model(tmp_path / "model")


def test_train_and_predict_commands_take_light_attention(
    write_residues: WriteResidues, varied: list[Protein], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta, store = write_residues("site-1", varied)
    (tmp_path / "settings.yaml").write_text("training: {attention_residues: 24, rounds: 2, batch_size: 8}\n")
    arguments = [
        "--embeddings",
        str(store),
        "-o",
        str(tmp_path / "alone"),
        "--settings",
        str(tmp_path / "settings.yaml"),
    ]
    assert main(["train", str(fasta), *arguments, "--mlp", "la3x8-8", "--seeds", "0"]) == 0
    assert "model of la3x8-8 in" in capsys.readouterr().out
    model = load_model(tmp_path / "alone/model")
    assert (model.card.attention, model.card.attention_residues) == (Attention(3, 8), 24)
    table = tmp_path / "new.csv"
    folder = str(tmp_path / "alone/model")
    assert main(["predict", str(fasta), "--model", folder, "--embeddings", str(store), "-o", str(table)]) == 0
    # the study's predictions of the test proteins are those of the command
    said = {line.split(",")[0]: line.split(",")[1] for line in table.read_text().splitlines()[1:]}
    studied = [line.split(",") for line in (tmp_path / "alone/predictions.csv").read_text().splitlines()[1:]]
    assert len(studied) == 18
    assert {row[0]: row[5] for row in studied} == {row[0]: said[row[0]] for row in studied}


def test_commands_refuse_embeddings_of_the_other_kind(
    write_residues: WriteResidues,
    write_site: WriteResidues,
    varied: list[Protein],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["-o", str(tmp_path / "out"), "--seeds", "0", "--rounds", "1"]
    fasta, store = write_residues("residues", varied)
    assert main(["train", str(fasta), "--embeddings", str(store), *out, "--mlp", "8"]) == 2
    assert "residues.fasta: the MLP 8 reads one embedding per protein" in capsys.readouterr().err
    fasta, store = write_site("pooled", varied)
    assert main(["train", str(fasta), "--embeddings", str(store), *out, "--mlp", "la9-8"]) == 2
    assert "pooled.fasta: light attention (la9-8) reads one embedding per residue" in capsys.readouterr().err
    assert main(["train", str(fasta), "--embeddings", str(store), *out, "--mlp", "la9-8", "--mlp", "8"]) == 2
    assert "train them in two runs" in capsys.readouterr().err
