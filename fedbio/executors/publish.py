"""The end of a study: every party keeps the best global model, and the tables of the whole federation."""

from __future__ import annotations

__all__ = ["Publish", "save_global"]

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbio.executors.own_metrics import own_metrics
from fedbio.executors.predictions import gather_predictions
from fedbio.executors.study_record import study_record
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.model import FLModel, Task
from fedbio.federation.workflows.study import MEAN, SCALE, Publication, read_meta, study_folder
from fedbio.results import METRICS_COLUMNS, METRICS_FILE, write_table
from fedbio.settings import parse_network

GLOBAL = "global"
"""The folder of the model that the sites trained together."""


class Publish(Executor):
    """Keeps what the server publishes."""

    name: ClassVar[str] = "publish"
    kind: ClassVar[str] = "publish"
    leaves: ClassVar[str] = "control"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Write the global model, ``metrics.csv`` and ``predictions.csv``; nothing but an empty answer leaves."""
        publication = read_meta(model.meta, Publication)
        place = publication.study.place
        folder = study_folder(context.workspace, place)
        save_global(context.workspace, model.params, publication)
        write_table(folder / METRICS_FILE, METRICS_COLUMNS, itertools.chain(publication.metrics, own_metrics(folder)))
        gather_predictions(folder)
        with study_record(context, place) as record:
            record.best, record.rounds = publication.best, publication.rounds
            record.federation, record.settings = publication.federation, publication.settings
        return FLModel()


def save_global(workspace: Path, params: Mapping[str, NDArray[Any]], publication: Publication) -> None:
    """Write a published model as a model folder in a party's workspace; the same bytes at every party."""
    from fedbio.classifier import Standardizer, choose_threshold
    from fedbio.classifier.model_files import ModelCard, save_model
    from fedbio.executors.shelf import layers

    hidden, attention = parse_network(publication.best)
    card = ModelCard(
        classes=list(publication.study.classes),
        hidden=list(hidden),
        attention=attention,
        attention_residues=publication.study.attention_residues if attention else None,
        encoder=publication.encoder,
        unsure_below=choose_threshold(np.array(publication.confidence)) if publication.confidence else 1.0,
        seed=publication.seed,
        round=publication.best_round,
        metrics=publication.scores,
        trained_by=sorted(publication.federation),
    )
    folder = study_folder(workspace, publication.study.place) / GLOBAL
    save_model(folder, layers(params), Standardizer(params[MEAN], params[SCALE]), card)
