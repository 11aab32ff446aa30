"""What a job is told: one section for each workflow, checked whole before anything runs."""

from __future__ import annotations

__all__ = [
    "Aggregation",
    "ClassifyJob",
    "ClientSettings",
    "CustomJob",
    "CyclicJob",
    "EmbedJob",
    "EncoderSettings",
    "EvaluationJob",
    "FedAvgJob",
    "Job",
    "ModelSelection",
    "ProjectionJob",
    "ScriptJob",
    "ServerOptimizer",
    "SplitJob",
    "StatisticsJob",
    "SwarmJob",
    "TrainingSettings",
    "check_aggregation",
]

import itertools
from pathlib import PurePath
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field

from fedbio.compartments import COMPARTMENTS
from fedbio.encoder_names import DEFAULT_ENCODER
from fedbio.networks import input_problem
from fedbio.settings_parts import (
    PLAIN_FILE,
    PLAIN_FILE_WORDS,
    NetworkName,
    PartyName,
    Quantization,
    QuantizationSetting,
    Seconds,
    Section,
    no_twins,
    text_form,
)


class EncoderSettings(Section):
    name: str = DEFAULT_ENCODER
    """Trained weights: the path of a folder or file, or a name (`fedbio encoder list`) of an encoder that comes with
    fedbio or of one in the cache; or a built-in architecture without trained weights."""
    sha256: Annotated[str, text_form(r"^[0-9a-f]{64}$", "64 digits from 0 to 9 and a to f")] | None = None
    """SHA-256 that the weights must have; null takes them as they are and records it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random weights of a built-in architecture."""
    pooling: Literal["mean", "ends", "max", "start", "residues"] = "mean"
    """How the vectors of residues become one: their average, the same beside averages at both ends, their maximum, or
    that of the start token; residues keeps one for each, which light attention needs, at a hundred times the room."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """The layer whose output is taken, 0 for the input of the first; null takes the last."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Arithmetic of inference; auto takes bfloat16 where the hardware has it, int8 is for CPUs and less exact."""
    long: Literal["cut", "window"] = "window"
    """What to do with proteins longer than the encoder takes: pool over overlapping windows, or cut the end off."""


class TrainingSettings(Section):
    mlps: Annotated[list[NetworkName], Field(min_length=1), AfterValidator(no_twins)] = [
        "32",
        "128-64",
        "256-128-64",
        "512-256-128-64",
    ]
    """Hidden layers of each classifier to train; la9-32 is light attention, with a kernel of 9 residues, before one of
    32, and needs embeddings with pooling residues."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(no_twins)] = [0, 1, 2]
    """Each classifier is trained once per seed."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 30
    """The most rounds of federated averaging; alone, a site trains for as many."""
    epochs: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Passes over a site's own proteins in a round."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Proteins in a step."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    """Step size of Adam."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 1e-4
    """Decoupled weight decay."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of hidden units that are switched off in a step."""
    patience: Annotated[int, Field(ge=1)] = 8
    """Stop after so many rounds without a better validation accuracy."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training proteins held back for validation where the data flag none."""
    min_proteins: Annotated[int, Field(ge=2)] = 10
    """A site with fewer training proteins abstains: sums over so few would give single embeddings away."""
    attention_residues: Annotated[int, Field(ge=2, le=100_000)] = 1_000
    """The most residues of a protein that light attention reads; of a longer one, its first and last half of them."""

    @pydantic.model_validator(mode="after")
    def _check_across(self) -> TrainingSettings:
        if all(input_problem(self.mlps, pooling) for pooling in ("residues", "mean")):
            raise ValueError(
                "mlps: light attention reads one embedding per residue and MLPs one per protein; train them in two runs"
            )
        return self


Aggregation = Literal["memory", "file", "lockstep"]


def check_aggregation(aggregation: Aggregation, quantization: Quantization) -> None:
    if aggregation != "memory" and quantization.to_sites is not None:
        raise ValueError(
            f"quantization.to_sites is {quantization.to_sites}, but with aggregation {aggregation} the server holds no "
            "model that it could quantize; set it to null"
        )


class EmbedJob(Section):
    """Every site turns its own proteins into embeddings with the encoder that the server names."""

    name: PartyName = "embed"
    workflow: Literal["embed"]
    encoder: EncoderSettings = EncoderSettings()
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(no_twins)] = list(COMPARTMENTS)
    """Labels outside them are errors, which a site hears of before it embeds."""


class ClassifyJob(Section):
    """Every site trains alone, all sites train together, and the difference is measured."""

    name: PartyName = "classify"
    workflow: Literal["classify"]
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(no_twins)] = list(COMPARTMENTS)
    """The locations to tell apart, in the order of the classifier's outputs; labels outside them are errors."""
    training: TrainingSettings = TrainingSettings()
    aggregation: Aggregation = "memory"
    """Where models are averaged: in the server's memory, in its files, or, in lockstep, while they pass through it."""
    quantization: QuantizationSetting = Quantization()
    """In which scheme the models of rounds travel: one for both ways, or keys for each; null sends them exact."""

    @pydantic.model_validator(mode="after")
    def _check_across(self) -> ClassifyJob:
        check_aggregation(self.aggregation, self.quantization)
        return self


class ProjectionJob(Section):
    """One 2-D map of all sites' proteins; their coordinates leave the sites that allow it."""

    name: PartyName = "map"
    workflow: Literal["projection"]
    points: Annotated[int, Field(ge=10, le=100_000)] = 500
    """The most proteins of a site on the map."""


def _plain(name: str) -> str:
    if PurePath(name).name != name or name.startswith("."):
        raise ValueError("expected the plain name of a file beside the job file")
    return name


FileName = Annotated[str, text_form(PLAIN_FILE, PLAIN_FILE_WORDS), AfterValidator(_plain)]


Initial = Annotated[
    str,
    text_form(
        r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.py:[A-Za-z_][A-Za-z0-9_]*$",
        "FILE.py:FUNCTION, with a file beside the job file",
    ),
]


class ClientSettings(Section):
    """The training script that runs at every site."""

    script: FileName
    """A Python file beside the job file; it is streamed to the sites, which run it if their policy allows it."""
    files: Annotated[list[FileName], AfterValidator(no_twins)] = []
    """Further files beside the job file that the script needs."""
    arguments: list[str] = []
    """Arguments of the script."""
    launch: Literal["process", "in_process", "torchrun"] = "process"
    """Run the script as a process of its own, within the site's process, or as several ranks of torchrun."""
    processes: Annotated[int, Field(ge=1, le=1_024)] = 1
    """Ranks of torchrun."""
    initial: Initial | None = None
    """FILE.py:FUNCTION that returns the initial model at one site: a module, a state dict, or named arrays."""
    idle_s: Seconds = 3600.0
    """Seconds that the script may take for one task."""


class ModelSelection(Section):
    """Which round's model is the best."""

    metric: str = "accuracy"
    """A metric that the sites report of the model that they received; their mean, weighted by examples, counts."""
    best: Literal["highest", "lowest"] = "highest"
    """Whether much or little of it is good."""
    ties: Literal["first", "last"] = "first"
    """Which of equally good rounds is chosen."""


class ServerOptimizer(Section):
    """What the server does with the mean change of the sites: Reddi et al. 2021, "Adaptive Federated Optimization"."""

    name: Literal["sgd", "adam", "yogi", "adagrad"]
    """sgd with momentum is FedAvgM; the others are FedAdam, FedYogi and FedAdagrad."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.01
    """Step size of the server."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of sgd."""
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the second moment (adam and yogi)."""
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Degree of adaptivity: added to the root of the second moment."""


class ScriptJob(Section):
    """A job whose work at the sites is a training script."""

    workflow: str
    client: ClientSettings


class FedAvgJob(ScriptJob):
    """Federated averaging of what a script trains, and its relatives."""

    name: PartyName = "fedavg"
    workflow: Literal["fedavg"]
    model: FileName | None = None
    """A safetensors file beside the job file with the initial model; null has a site make it with client.initial."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Rounds of training."""
    sites_per_round: Annotated[int, Field(ge=1)] | None = None
    """So many sites, drawn anew for each round, take part in it; null means all of them."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is drawn."""
    weighted: bool = True
    """Weigh each site by the examples that it registered; false gives all the same weight."""
    aggregate: Literal["mean", "median", "trimmed_mean", "krum"] = "mean"
    """How the sites' models become one; the last three withstand some sites that send nonsense."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of the sites that trimmed_mean leaves out at each end of every coordinate."""
    byzantine: Annotated[int, Field(ge=0)] = 1
    """Sites that krum assumes to send nonsense."""
    optimizer: ServerOptimizer | None = None
    """What the server does with the sites' mean change; null adds it to the model."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """Weight of FedProx's proximal term, which the script adds to its loss."""
    scaffold: bool = False
    """Exchange SCAFFOLD's control variates, with which the script corrects its gradients."""
    aggregation: Literal["memory", "file"] = "memory"
    """Where models are averaged: in the server's memory, or, for large ones, in its files."""
    quantization: QuantizationSetting = Quantization()
    """In which scheme the models of rounds travel: one for both ways, or keys for each; null sends them exact."""
    exclude: list[str] = []
    """Patterns of the names of parameters that stay at each site (FedBN: "*.bn*")."""
    norm_bound: Annotated[float, Field(gt=1)] | None = None
    """Refuse a site's change that is more than so many times as long as the median site's."""
    selection: ModelSelection = ModelSelection()
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many rounds without a better model; null never does."""

    @property
    def least_updates(self) -> tuple[int, str]:
        """How many sites' updates a round needs, and which rule wants them."""
        if self.aggregate == "krum":
            return 2 * self.byzantine + 3, f"krum with byzantine {self.byzantine} (2 · byzantine + 3)"
        if self.aggregate == "trimmed_mean" and self.trim:
            # one at each end at the least
            return 3, f"trimmed_mean with trim {self.trim:g} (one is left out at each end)"
        return 1, ""

    @pydantic.model_validator(mode="after")
    def _check_across(self) -> FedAvgJob:
        least, rule = self.least_updates
        if self.sites_per_round is not None and self.sites_per_round < least:
            raise ValueError(
                f"sites_per_round is {self.sites_per_round}, and {rule} needs {least} updates in every round; raise it"
            )
        if self.aggregation == "file":
            check_aggregation(self.aggregation, self.quantization)
            plain = FedAvgJob(workflow="fedavg", client=self.client)
            needs_memory = ("weighted", "aggregate", "optimizer", "scaffold", "norm_bound", "exclude")
            changed = [key for key in needs_memory if getattr(self, key) != getattr(plain, key)]
            if changed:
                raise ValueError(f"{', '.join(changed)}: needs aggregation: memory, where the server holds the models")
            if self.model is None:
                raise ValueError("aggregation file needs model: a safetensors file beside the job file to begin with")
        return self


class CyclicJob(ScriptJob):
    """One model goes from site to site, and each trains it: cyclic weight transfer."""

    name: PartyName = "cyclic"
    workflow: Literal["cyclic"]
    model: FileName | None = None
    """A safetensors file beside the job file with the initial model; null has a site make it with client.initial."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 5
    """How often it goes around."""
    order: Literal["fixed", "random"] = "fixed"
    """By name, or drawn anew for each time around."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is drawn."""


class EvaluationJob(ScriptJob):
    """Every model is tried on every site's data: a matrix."""

    name: PartyName = "evaluation"
    workflow: Literal["evaluation"]
    models: Annotated[list[FileName], AfterValidator(no_twins)] = []
    """Safetensors files beside the job file."""
    sites: bool = True
    """Try the sites' own models too: each is asked for the one that its script submits."""


class SwarmJob(ScriptJob):
    """Sites take turns in aggregating; the server only passes on what it cannot read."""

    name: PartyName = "swarm"
    workflow: Literal["swarm"]
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Rounds of training."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the turns."""
    selection: ModelSelection = ModelSelection()


class SplitJob(ScriptJob):
    """A network is cut in two: one site trains the part with the features, another the part with the labels."""

    name: PartyName = "split"
    workflow: Literal["split"]
    bottom: PartyName
    """The site with the features: the script's functions features() and bottom() are called there."""
    top: PartyName
    """The site with the labels: the script's functions labels(), top() and loss() are called there."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Passes over the proteins that both sites have."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    """The most proteins in a step."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights, of the order of the proteins, and of what training draws."""
    max_message_mb: Annotated[int, Field(ge=1, le=1024)] = 256
    """MiB of activations or gradients in one step; what is larger is not passed on."""

    @pydantic.model_validator(mode="after")
    def _check_across(self) -> SplitJob:
        if self.bottom == self.top:
            raise ValueError(f"bottom and top are both {self.top!r}; a network is cut between two sites")
        if self.client.launch == "torchrun" or self.client.initial is not None:
            raise ValueError(
                "client.launch torchrun and client.initial mean nothing here: each site makes and trains its own part "
                "in its own process"
            )
        return self


def _ascending(values: list[int]) -> list[int]:
    if values[0] < 1 or any(low >= high for low, high in itertools.pairwise(values)):
        raise ValueError("expected numbers of residues that ascend from 1 or more")
    return values


class CustomJob(Section):
    """A controller of your own, from a Python file beside the job file; it runs in the server's process."""

    name: PartyName = "custom"
    workflow: Literal["custom"]
    controller: Annotated[
        str,
        text_form(
            r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.py:[A-Za-z_]\w*$", "FILE.py:CLASS, with a file beside the job file"
        ),
    ]
    """FILE.py:CLASS, a `fedbio.federation.Controller`."""
    client: ClientSettings | None = None
    """The script that runs at the sites, if there is one."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 1
    """How often the controller will ask the sites to train: what their policies look at."""
    settings: dict[str, Any] = {}
    """Whatever the controller wants to know: `self.settings`."""


class StatisticsJob(Section):
    """Counts and histograms of all sites' proteins together."""

    name: PartyName = "statistics"
    workflow: Literal["statistics"]
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(no_twins)] = list(COMPARTMENTS)
    """Labels that are counted."""
    length_bins: Annotated[list[int], Field(min_length=1), AfterValidator(_ascending)] = [
        50,
        100,
        200,
        300,
        400,
        500,
        750,
        1000,
        2000,
        5000,
    ]
    """Upper ends of the bins of the histogram of lengths, in residues; one more bin takes what is longer."""
    min_count: Annotated[int, Field(ge=1)] = 5
    """A count below it does not leave a site."""


Job = Annotated[
    EmbedJob
    | ClassifyJob
    | ProjectionJob
    | FedAvgJob
    | CyclicJob
    | EvaluationJob
    | SwarmJob
    | SplitJob
    | StatisticsJob
    | CustomJob,
    Field(discriminator="workflow"),
]
