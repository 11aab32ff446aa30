"""The classifier over protein embeddings: an MLP or light attention, its training, its measures, its files."""

from __future__ import annotations

__all__ = [
    "AloneOutcome",
    "CurvePoint",
    "Evaluation",
    "FedbioClassifier",
    "Model",
    "ModelCard",
    "Moments",
    "Parameters",
    "Residues",
    "SiteData",
    "Standardizer",
    "TrainData",
    "TrainOutcome",
    "accuracy",
    "check_parameters",
    "choose_threshold",
    "confidence_counts",
    "confusion_matrix",
    "evaluate",
    "f1_per_class",
    "format_hidden",
    "initialize",
    "load_model",
    "load_site_data",
    "macro_f1",
    "mcc",
    "merge_sites",
    "moments",
    "predict",
    "save_model",
    "train",
    "train_alone",
]

from typing import TYPE_CHECKING, Any

from fedbio.classifier.architecture import Parameters, check_parameters, format_hidden, initialize
from fedbio.classifier.examples import TrainData
from fedbio.classifier.metrics import accuracy, confusion_matrix, f1_per_class, macro_f1, mcc
from fedbio.classifier.residues import Residues
from fedbio.classifier.standardize import Moments, Standardizer, moments
from fedbio.classifier.unsure import choose_threshold, confidence_counts

if TYPE_CHECKING:
    from fedbio.classifier.alone import AloneOutcome, CurvePoint, train_alone
    from fedbio.classifier.data import SiteData, load_site_data, merge_sites
    from fedbio.classifier.estimator import FedbioClassifier
    from fedbio.classifier.inference import Evaluation, evaluate, predict
    from fedbio.classifier.model_files import Model, ModelCard, load_model, save_model
    from fedbio.classifier.training import TrainOutcome, train

_HOMES = {
    "alone": ("AloneOutcome", "CurvePoint", "train_alone"),
    "data": ("SiteData", "load_site_data", "merge_sites"),
    "estimator": ("FedbioClassifier",),
    "inference": ("Evaluation", "evaluate", "predict"),
    "model_files": ("Model", "ModelCard", "load_model", "save_model"),
    "training": ("TrainOutcome", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # torch, h5py and scikit-learn are imported when they are first needed
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
