"""Writers of metrics: what a script says in the words of TensorBoard, MLflow or W&B arrives as numbers."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest

import fedbio.client as flare
from fedbio.client.link import Metric
from fedbio.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
from fedbio.federation import FLModel

from .at_hand import AtHand, here  # noqa: F401
from .conftest import LOOP, ScriptSite


def test_each_writer_says_its_numbers_with_their_steps(here: AtHand) -> None:  # noqa: F811
    flare.init()
    with SummaryWriter("runs/of/tensorboard", comment="unused") as board:
        board.add_scalar("loss", 0.5, 3)
        board.add_scalar("loss", 0.25, global_step=4, walltime=1.0)
        board.add_scalars("accuracy", {"train": 0.5, "validation": 0.25}, 5)
        board.flush()
    MLflowWriter().log_metrics({"f1": 0.75, "mcc": 0.5}, step=6)
    MLflowWriter().log_params({"rate": 0.1})
    MLflowWriter().set_tags({"kind": "small"})
    MLflowWriter().log_text("words", "notes.txt")
    WandBWriter().log({"loss": 0.125}, step=7)
    assert here.metrics == [
        Metric("loss", 0.5, 3, "SCALAR"),
        Metric("loss", 0.25, 4, "SCALAR"),
        Metric("accuracy", {"train": 0.5, "validation": 0.25}, 5, "SCALARS"),
        Metric("f1", 0.75, 6, "METRIC"),
        Metric("mcc", 0.5, 6, "METRIC"),
        Metric("rate", "0.1", None, "PARAMETER"),
        Metric("kind", "small", None, "TAG"),
        Metric("notes.txt", "words", None, "TEXT"),
        Metric("loss", 0.125, 7, "METRIC"),
    ]


class OtherLibraries(enum.Enum):
    """The enum of a script that still imports NVFlare's."""

    METRIC = "METRIC"


@pytest.mark.parametrize(
    ("data_type", "value", "sent"),
    [
        (None, 0.5, 0.5),
        (None, "words", "words"),
        (flare.AnalyticsDataType.SCALAR, np.float32(0.5), 0.5),
        (flare.AnalyticsDataType.METRICS, {"a": 1}, {"a": 1.0}),
        (OtherLibraries.METRIC, 2, 2.0),
        ("scalars", {"a": 1, "b": 2}, {"a": 1.0, "b": 2.0}),
        # a number that is no metric is no curve, and a picture is for nobody
        (flare.AnalyticsDataType.PARAMETER, 0.1, "0.1"),
        (flare.AnalyticsDataType.TAGS, {"kind": "small", "of": 3}, "kind=small, of=3"),
        (flare.AnalyticsDataType.IMAGE, np.zeros((2, 2)), "(ndarray, not kept: only numbers and words are)"),
    ],
)
def test_what_is_logged_is_sent_as_its_kind_says(here: AtHand, data_type: Any, value: Any, sent: object) -> None:  # noqa: F811
    flare.init()
    flare.log("key", value, data_type, global_step=1)
    assert [(each.value, each.step) for each in here.metrics] == [(sent, 1)]


def test_an_unknown_kind_is_refused_with_those_there_are(here: AtHand) -> None:  # noqa: F811
    flare.init()
    with pytest.raises(TypeError, match=r"no data_type 'CURVE'; it is one of SCALAR, SCALARS, METRIC"):
        flare.log("key", 1.0, "CURVE")


@pytest.mark.parametrize("launch", ["process", "in_process"])
def test_numbers_of_a_script_reach_its_site_and_texts_stay(site: ScriptSite, launch: str) -> None:
    site.deploy(
        LOOP.replace("import numpy as np", "from fedbio.client.tracking import MLflowWriter, SummaryWriter")
        + """
    writer = SummaryWriter()
    writer.add_scalar("train/loss", 0.5, global_step=model.current_round)
    writer.add_scalars("of", {"a": 1.0, "b": 2.0}, global_step=7)
    MLflowWriter().log_text("MKTAYIAK", "sequence.txt")
    flare.send(flare.FLModel(metrics={"loss": 0.5}))
""",
        launch=launch,
    )
    site.evaluate(FLModel(current_round=2))
    site.end()
    assert site.metrics == [
        ("job-1", "train/loss", 0.5, 2),
        ("job-1", "of/a", 1.0, 7),
        ("job-1", "of/b", 2.0, 7),
    ]
