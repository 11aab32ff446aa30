"""Keep a trained classifier in a folder: ``model.safetensors``, and ``model.json``, which says how to use it.

Format ``fedbio-classifier`` version 1. ``model.safetensors`` holds ``layers.I.weight`` (out, in) and ``layers.I.bias``
(out,) for each layer, and ``standardizer.mean`` and ``standardizer.scale`` (D,), all float32; of light attention also
the tensors that `fedbio.classifier.architecture.Parameters` names. ``model.json`` is a `ModelCard`. To predict: embed
with the card's encoder, subtract the mean and divide by the scale, apply light attention if there is any
(`fedbio.classifier.attention`), apply the layers with ReLU between them, and take the softmax; output I is class I of
the card.
"""

from __future__ import annotations

__all__ = ["CARD_FILE", "PARAMETERS_FILE", "Model", "ModelCard", "load_model", "save_model"]

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio import __version__
from fedbio.classifier.architecture import Parameters, check_parameters
from fedbio.classifier.residues import Features
from fedbio.classifier.standardize import Standardizer
from fedbio.classifier.unsure import is_unsure
from fedbio.errors import DataError, FormatError
from fedbio.files import sha256_file, write_whole
from fedbio.networks import Attention, NetworkShape, input_problem
from fedbio.results import EncoderInfo
from fedbio.tensors import open_file, write_file

CARD_FILE = "model.json"
PARAMETERS_FILE = "model.safetensors"
FORMAT, VERSION = "fedbio-classifier", 1


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """How to use a classifier, and what is known of it.

    Parameters
    ----------
    classes : list of str
        In the order of the outputs.
    hidden : list of int
        Widths of the hidden layers.
    attention : Attention or None
        Light attention before them.
    attention_residues : int or None
        The most residues of a protein that light attention reads: of a longer one, its first and its last half of them.
        None for all.
    encoder : EncoderInfo
        What made the embeddings that it was trained on; it takes no others.
    unsure_below : float
        Predictions whose top probability is below are flagged; 1 flags all.
    seed, round : int
        Of the training run.
    metrics : dict of str to float
        For example ``{"validation_accuracy": 0.71}``.
    trained_by : list of str
        The parties whose proteins it was trained on.
    parameters_sha256 : str
        SHA-256 of ``model.safetensors``; filled in by `save_model`.
    """

    format: Literal["fedbio-classifier"] = "fedbio-classifier"
    version: Literal[1] = 1
    classes: list[str]
    hidden: list[int]
    attention: Attention | None = None
    attention_residues: Annotated[int, msgspec.Meta(ge=2)] | None = None
    encoder: EncoderInfo
    unsure_below: float = 0.5
    seed: int = 0
    round: int = 0
    metrics: dict[str, float] = {}
    trained_by: list[str] = []
    parameters_sha256: str = ""
    fedbio_version: str = __version__

    @property
    def mlp(self) -> str:
        """The classifier's name, for example ``"256-128-64"``."""
        return NetworkShape(tuple(self.hidden), self.attention).name


@dataclass(frozen=True)
class Model:
    """A classifier that is ready to use.

    Examples
    --------
    >>> model = load_model("results/demo/global")  # doctest: +SKIP
    >>> model.predict(embeddings).argmax(axis=1)  # doctest: +SKIP
    """

    parameters: Parameters
    standardizer: Standardizer
    card: ModelCard

    def predict(self, embeddings: Features) -> NDArray[np.float32]:
        """Return the probability of each class, shape (n, C), for embeddings as the encoder made them, shape (n, D).

        Light attention takes `fedbio.classifier.residues.Residues`.
        """
        # imported here: who only keeps model files, such as a federation's server, needs no torch
        from fedbio.classifier.inference import predict

        return predict(self.parameters, self.standardizer.apply(embeddings))

    def is_unsure(self, probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Flag predictions, shape (n, C), whose top probability is below the card's threshold."""
        return is_unsure(probabilities, self.card.unsure_below)


def save_model(
    folder: str | os.PathLike[str], parameters: Parameters, standardizer: Standardizer, card: ModelCard
) -> None:
    """Write a model folder; each of its two files appears whole, the card last.

    Raises
    ------
    DataError
        If the parameters do not fit the card.
    """
    target = Path(folder)
    _check(parameters, card)
    tensors = {**parameters, "standardizer.mean": standardizer.mean, "standardizer.scale": standardizer.scale}
    write_file(target / PARAMETERS_FILE, tensors)
    complete = msgspec.structs.replace(card, parameters_sha256=sha256_file(target / PARAMETERS_FILE))
    write_whole(target / CARD_FILE, msgspec.json.format(msgspec.json.encode(complete), indent=2) + b"\n")


def load_model(folder: str | os.PathLike[str]) -> Model:
    """Read a model folder.

    Raises
    ------
    FormatError
        If a file is missing or damaged, the two do not belong together, or the version is unknown.
    """
    card_path, tensors_path = Path(folder) / CARD_FILE, Path(folder) / PARAMETERS_FILE
    for path in (card_path, tensors_path):
        if not path.is_file():
            raise FormatError(f"{path}: not found; a model folder holds {CARD_FILE} and {PARAMETERS_FILE}")
    card = _read_card(card_path)
    if sha256_file(tensors_path) != card.parameters_sha256:
        raise FormatError(
            f"{tensors_path}: its SHA-256 is not the one in {CARD_FILE}, so the file is damaged or of another model; "
            "copy both files again"
        )
    # copied: the file may be replaced while the model is in use
    tensors = {name: np.array(tensor) for name, tensor in open_file(tensors_path).items()}
    try:
        standardizer = Standardizer(tensors.pop("standardizer.mean"), tensors.pop("standardizer.scale"))
        _check(tensors, card)
    except (KeyError, DataError) as error:
        raise FormatError(f"{tensors_path}: does not fit {CARD_FILE}: {error}; copy both files again") from error
    return Model(tensors, standardizer, card)


def _check(parameters: Parameters, card: ModelCard) -> None:
    check_parameters(
        parameters,
        width=card.encoder.width,
        hidden=card.hidden,
        classes=len(card.classes),
        attention=card.attention,
    )
    if problem := input_problem([card.mlp], card.encoder.pooling):
        raise DataError(problem)


def _read_card(path: Path) -> ModelCard:
    try:
        head = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
        if head.get("format") == FORMAT and head.get("version") != VERSION:
            raise FormatError(
                f"{path}: {FORMAT} version {head.get('version')}; this release reads version {VERSION}, update fedbio"
            )
        return msgspec.convert(head, ModelCard)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not a model card that this release can read: {error}") from error
