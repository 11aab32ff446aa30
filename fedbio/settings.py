"""Typed settings: one model for each YAML file, one loader that reports every problem at once, one place for defaults.

===================  =====================================================================
model                file
===================  =====================================================================
`RunSettings`        ``config/config.yaml``: a server and all sites on this machine
`SiteSettings`       ``config/site.yaml``: one site of a real federation
`ServerSettings`     ``config/server.yaml``: the server of a real federation
`EmbeddingsSettings` ``config/embeddings.yaml``: a large file embedded in shards, alone
`TrainEncoderSettings` ``config/encoder.yaml``: an encoder trained and measured, alone
`JobsFile`           ``config/jobs/*.yaml``: what the server runs
`FederationFile`     ``config/federation.yaml``: who takes part, for ``fedbio provision``
`KitFile`            ``kit.yaml`` in a start-up kit
===================  =====================================================================
"""

from __future__ import annotations

__all__ = [
    "FILES",
    "SCHEMES",
    "ClassifyJob",
    "EmbedJob",
    "EmbeddingsSettings",
    "EncoderSettings",
    "FederationFile",
    "FederationLimits",
    "Job",
    "JobsFile",
    "KitFile",
    "ModelSelection",
    "ProjectionJob",
    "Quantization",
    "ReportSettings",
    "RunSettings",
    "ServerParty",
    "ServerSettings",
    "TrainEncoderSettings",
    "ServerTransport",
    "SiteSettings",
    "SitesSettings",
    "TaskKind",
    "TrainingSettings",
    "Transport",
    "check",
    "check_party",
    "input_problem",
    "load",
    "parse_hidden",
    "parse_network",
]

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, Field

from fedbio.compartments import COMPARTMENTS
from fedbio.errors import SettingsError
from fedbio.networks import input_problem, parse_hidden, parse_network
from fedbio.settings_files import describe_problems, read_settings, with_overrides
from fedbio.settings_jobs import (
    Aggregation,
    ClassifyJob,
    EmbedJob,
    EncoderSettings,
    FedAvgJob,
    Job,
    ModelSelection,
    ProjectionJob,
    TrainingSettings,
    check_aggregation,
)
from fedbio.settings_parts import (
    DRIVER,
    PLAIN_FILE,
    PLAIN_FILE_WORDS,
    SCHEMES,
    Address,
    DriverName,
    FederationLimits,
    PartyName,
    Quantization,
    QuantizationSetting,
    Scheme,
    Seconds,
    Section,
    ServerTransport,
    TaskKind,
    Transport,
    no_twins,
    text_form,
)


def _no_twin_jobs(jobs: list[Job]) -> list[Job]:
    no_twins([job.name for job in jobs])
    return jobs


class JobsFile(Section):
    """What a server runs, or what is submitted to it."""

    jobs: Annotated[list[Job], AfterValidator(_no_twin_jobs)]
    """One section for each job; a server that goes on serving may begin with none."""
    sites: Annotated[list[PartyName], Field(min_length=1), AfterValidator(no_twins)] | None = None
    """Who is expected; null means every site that the federation has a kit for."""
    federation: FederationLimits = FederationLimits()
    transport: ServerTransport = ServerTransport()
    tracking: Annotated[list[Literal["tensorboard", "mlflow", "wandb"]], AfterValidator(no_twins)] | None = None
    """Where the server shows the metrics that sites send during their tasks (docs/tracking.md), beside its file
    tracking.jsonl; null takes tensorboard if it is installed there."""

    @pydantic.model_validator(mode="after")
    def _check_across(self) -> JobsFile:
        # a rule that gets too few updates fails in the middle of a job, when a site happens to be away
        problems = []
        for job in self.jobs:
            least, rule = job.least_updates if isinstance(job, FedAvgJob) else (1, "")
            for key, count in (
                ("federation.min_sites", self.federation.min_sites),
                ("the number of sites", None if self.sites is None else len(self.sites)),
            ):
                if count is not None and count < least:
                    problems.append(f"{key} is {count}, and {rule} of job {job.name} needs {least} updates in a round")
        pooling = None
        for job in self.jobs:
            if isinstance(job, EmbedJob):
                pooling = job.encoder.pooling
            elif isinstance(job, ClassifyJob) and pooling is not None:
                problem = input_problem(job.training.mlps, pooling)
                problems += [f"job {job.name}: {problem}"] if problem else []
        if problems:
            raise ValueError("; ".join(problems))
        return self


class SitesSettings(Section):
    count: Annotated[int, Field(ge=1, le=1_000)] = 3
    """Number of sites."""
    by: str = "dirichlet"
    """How proteins are dealt out: dirichlet, iid, or the name of a column of the data set."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Dirichlet concentration: small makes sites differ, large makes them alike."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the deal."""

    @property
    def names(self) -> list[str]:
        """Return ``site-1``, ``site-2``, ..."""
        return [f"site-{number}" for number in range(1, self.count + 1)]


class DemoSettings(Section):
    proteins: Annotated[int, Field(ge=50)] = 900
    """How many synthetic proteins to write."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the generator."""
    difficulty: Annotated[float, Field(ge=0, le=1)] = 0.3
    """From 0, each compartment has a composition of its own, to 1, only the sorting signals differ."""


class ReportSettings(Section):
    map: bool = True
    """Draw the 2-D map of the embeddings; for this the sites' 2-D coordinates go to the server."""
    map_points: Annotated[int, Field(ge=10, le=100_000)] = 500
    """The most proteins of a site on the map."""


RunName = Annotated[
    str,
    text_form(
        r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", "letters, digits, _, dots and -, a letter or digit first, at most 63"
    ),
]


class RunSettings(Section):
    """A server and all sites on this machine, each a process of its own."""

    party: Literal["all"] = "all"
    run: RunName | None = None
    """Name of the run's folder under results/; null takes the data set's name."""
    dataset: str = "demo"
    """demo for synthetic proteins, the name of a known data set, or the path of a FASTA, CSV or TSV file."""
    labels: str | None = None
    """A CSV or TSV file with the labels of a FASTA file, joined by id."""
    max_proteins: Annotated[int, Field(ge=50)] | None = None
    """Use at most so many proteins of the data set, drawn with its proportions of classes and splits."""
    demo: DemoSettings = DemoSettings()
    sites: SitesSettings = SitesSettings()
    encoder: EncoderSettings = EncoderSettings()
    embeddings: str | None = None
    """An embeddings file of the same encoder to take vectors from instead of computing them again."""
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(no_twins)] = list(COMPARTMENTS)
    """The locations to tell apart, in the order of the classifier's outputs; labels outside them are errors."""
    training: TrainingSettings = TrainingSettings()
    aggregation: Aggregation = "memory"
    """Where models are averaged: in the server's memory, in its files, or, in lockstep, while they pass through it."""
    quantization: QuantizationSetting = Quantization()
    """In which scheme the models of rounds travel: one for both ways, or keys for each; null sends them exact."""
    federation: FederationLimits = FederationLimits()
    driver: DriverName = DRIVER
    """What moves bytes between the parties: grpc, tcp, http, or one that an installed package offers."""
    transport: ServerTransport = ServerTransport()
    report: ReportSettings = ReportSettings()
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    @pydantic.model_validator(mode="after")
    def _check_across(self) -> RunSettings:
        least = self.federation.min_sites
        if least is not None and least > self.sites.count:
            raise ValueError(f"federation.min_sites is {least}, but sites.count is only {self.sites.count}")
        check_aggregation(self.aggregation, self.quantization)
        if problem := input_problem(self.training.mlps, self.encoder.pooling):
            raise ValueError(f"encoder.pooling and training.mlps: {problem}")
        return self

    @property
    def run_name(self) -> str:
        """The run's name: as set, or that of the data set without folders and endings."""
        return self.run or Path(self.dataset).name.split(".")[0] or "run"

    def jobs(self) -> JobsFile:
        """Return the jobs of this run as the server reads them."""
        jobs: list[Job] = [
            EmbedJob(workflow="embed", encoder=self.encoder, classes=self.classes),
            ClassifyJob(
                workflow="classify",
                classes=self.classes,
                training=self.training,
                aggregation=self.aggregation,
                quantization=self.quantization,
            ),
        ]
        if self.report.map:
            jobs.append(ProjectionJob(workflow="projection", points=self.report.map_points))
        return JobsFile(jobs=jobs, sites=self.sites.names, federation=self.federation, transport=self.transport)


WorkflowName = Literal[
    "embed", "classify", "projection", "fedavg", "cyclic", "evaluation", "swarm", "split", "statistics", "custom"
]
MOST_LAST_LINES = 20
"""The most of a failed script's last lines that a site tells."""

CodeName = Annotated[str, text_form(PLAIN_FILE, PLAIN_FILE_WORDS)]


class SiteSettings(Section):
    """One site of a real federation."""

    party: Literal["site"]
    kit: str
    """The start-up kit that the coordinator gave you: a folder."""
    proteins: str
    """Your FASTA, CSV or TSV file; it never leaves this machine."""
    labels: str | None = None
    """A CSV or TSV file with the labels of a FASTA file, joined by id."""
    run: RunName = "site"
    """Name of the folder under results/ for everything this site keeps."""
    embeddings: str | None = None
    """An embeddings file of the same encoder to take vectors from instead of computing them again."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    connect_deadline_s: Seconds = 3600.0
    """Seconds to keep trying to reach the server before giving up."""
    heartbeat_s: Seconds = 5.0
    """Seconds between two signs of life; a server that is silent for three of them is dialled anew."""
    allow: Annotated[list[TaskKind], AfterValidator(no_twins)] = [
        "embed",
        "statistics",
        "train",
        "evaluate",
        "publish",
    ]
    """Tasks that this site takes; add map to let 2-D coordinates of your proteins leave, and split to let activations
    of a network's first layers for each of them, or gradients that its labels went into, go to another site."""
    quantization: Annotated[list[Scheme], AfterValidator(no_twins)] = list(SCHEMES)
    """Schemes in which models may come to this site and leave it; none means exact models only."""
    workflows: Annotated[list[WorkflowName], AfterValidator(no_twins)] | None = None
    """Workflows of the server's jobs that this site takes part in; null means all."""
    max_rounds: Annotated[int, Field(ge=1)] | None = None
    """The most rounds of a job that this site takes part in; null sets no bound."""
    code: Annotated[list[CodeName], AfterValidator(no_twins)] = []
    """Training scripts of the server that may run here: each the name of a file beside this one that you have read, its
    SHA-256, or any for whatever comes. None runs unless it is named."""
    last_lines: Annotated[int, Field(ge=0, le=MOST_LAST_LINES)] = 0
    """How many of the last lines that a failed script has written here go to the server with its error, beside the last
    line of its exception; whatever it has printed may stand in them. This site's log has them in any case."""
    examples: Annotated[int, Field(ge=1)] | None = None
    """How many examples this site registers for the jobs of training scripts; null counts its proteins."""
    min_count: Annotated[int, Field(ge=1)] = 5
    """No count below it leaves this site with a statistics job, whatever that says; a job may ask for more."""
    transport: Transport = Transport()


class ServerSettings(Section):
    """The server of a real federation; it has no proteins."""

    party: Literal["server"]
    kit: str
    """The server's start-up kit: a folder."""
    jobs: str = "config/jobs/classify.yaml"
    """What to run."""
    run: RunName = "server"
    """Name of the folder under results/ for everything the server keeps."""


class EmbeddingsSettings(Section):
    """A large file of proteins, embedded in shards by jobs of their own; nobody else takes part."""

    party: Literal["embeddings"]
    proteins: str
    """Your FASTA, CSV or TSV file."""
    labels: str | None = None
    """A CSV or TSV file with the labels of a FASTA file, joined by id."""
    classes: Annotated[list[str], Field(min_length=2), AfterValidator(no_twins)] = list(COMPARTMENTS)
    """The locations that labels may name; others are errors."""
    run: RunName = "embeddings"
    """Name of the folder under results/ for the embeddings file and, while they are needed, its shards."""
    shards: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Number of jobs; each embeds about as many residues as the others."""
    threads: Annotated[int, Field(ge=1, le=1_024)] = 8
    """CPU threads of the job of a shard, and the cores that a cluster gives it."""
    encoder: EncoderSettings = EncoderSettings()
    embeddings: str | None = None
    """An embeddings file of the same encoder to take vectors from instead of computing them again."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; unless it is cpu, the job of a shard asks for one GPU."""


class TrainEncoderSettings(Section):
    """An encoder from proteins to what it is worth; nobody else takes part."""

    party: Literal["encoder"]
    corpus: Annotated[list[str], Field(min_length=1), AfterValidator(no_twins)]
    """Files of proteins to learn from."""
    valid: str | None = None
    """Proteins that are held out for the perplexity; null holds out one in a hundred."""
    table: str
    """Labelled proteins in FLIP's form, on which the encoder is measured; none of them is trained on."""
    meta: str | None = None
    """A table of id and near_test: what is measured is measured without relatives of test proteins as well."""
    run: RunName = "encoder"
    """Name of the folder under results/."""
    preset: Literal["esm1nv-44m", "esm1nv-mini"] = "esm1nv-44m"
    """Architecture and recipe."""
    tokens: Annotated[float, Field(ge=1, le=1e13)] = 1e9
    """Tokens to learn from, about one a residue."""
    weights: Literal["float32", "float16", "int8"] = "int8"
    """How the weights are kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; unless it is cpu, training and embedding ask for one GPU each."""
    threads: Annotated[int, Field(ge=1, le=1_024)] = 8
    """CPU threads."""
    pretrain: list[str] = []
    """Further options of ``fedbio pretrain``."""
    probe: list[str] = []
    """Further options of ``benchmarks/scl_probe.py``."""


class ServerParty(Section):
    name: PartyName = "server"
    """The name in the server's certificate."""
    address: Address
    """host:port under which the sites reach the server."""
    also: list[str] = []
    """Further host names or IP addresses for the server's certificate."""


class FederationFile(Section):
    """Who takes part: what ``fedbio provision`` reads."""

    federation: PartyName
    """The federation's name."""
    server: ServerParty
    sites: Annotated[list[PartyName], Field(min_length=1), AfterValidator(no_twins)]
    """One name per site."""
    admin: PartyName | None = "admin"
    """Who submits jobs to the running server and ends them (`fedbio job`); null makes no kit for it."""
    driver: DriverName = DRIVER
    """What moves bytes between server and sites: grpc, tcp, http, or one that an installed package offers. It goes into
    every kit, since both ends must use the same; no other file sets it."""
    valid_days: Annotated[int, Field(ge=1, le=3650)] = 365
    """Days until the certificates expire."""

    @pydantic.model_validator(mode="after")
    def _check_across(self) -> FederationFile:
        if self.server.name in self.sites:
            raise ValueError(f"sites: {self.server.name!r} is the server's name; give every party its own")
        if self.admin in (self.server.name, *self.sites):
            raise ValueError(f"admin: {self.admin!r} is the name of another party; set admin to another name, or null")
        return self


class KitFile(Section):
    """What a party needs to know beside its certificate and key."""

    federation: PartyName
    party: PartyName
    role: Literal["server", "site", "admin"]
    server: Address
    """host:port under which the sites reach the server; the server listens on that port."""
    server_name: PartyName = "server"
    """The name in the server's certificate."""
    driver: DriverName = DRIVER
    """What moves bytes between server and sites."""
    sites: list[PartyName] = []
    """At the server: every site that has a kit."""
    admin: PartyName | None = None
    """At the server: whose certificate may submit jobs and end them; null lets nobody."""


FILES: dict[str, type[Section]] = {
    "config": RunSettings,
    "site": SiteSettings,
    "server": ServerSettings,
    "embeddings": EmbeddingsSettings,
    "encoder": TrainEncoderSettings,
    "jobs": JobsFile,
    "federation": FederationFile,
    "kit": KitFile,
}
"""Every settings file by the name of its JSON schema."""

PartySettings = RunSettings | SiteSettings | ServerSettings | EmbeddingsSettings | TrainEncoderSettings

PARTIES: dict[str, type[PartySettings]] = {
    "all": RunSettings,
    "site": SiteSettings,
    "server": ServerSettings,
    "embeddings": EmbeddingsSettings,
    "encoder": TrainEncoderSettings,
}

S = TypeVar("S", bound=Section)


def load(path: str | Path, model: type[S], overrides: list[str] | None = None) -> S:
    """Read one settings file and check all of it.

    Parameters
    ----------
    path : path-like
        A YAML file; JSON or TOML if it ends in ``.json`` or ``.toml``.
    model : type
        One of the models in `FILES`.
    overrides : list of str, optional
        ``dotted.key=value`` with the value in YAML; each replaces what the file says.

    Raises
    ------
    SettingsError
        Naming the file, and for every problem the dotted key, what was expected and what was found.
    """
    return check(with_overrides(read_settings(path), overrides or [], path), model, path)


def check(content: Mapping[str, Any], model: type[S], path: str | Path) -> S:
    """Check settings that were read already; `path` says in messages where they came from."""
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        raise describe_problems(path, error, model) from error


def check_party(content: Mapping[str, Any], path: str | Path) -> PartySettings:
    """Check the settings of whichever party the key `party` names: all, site, server or embeddings."""
    party = content.get("party", "all")
    if party not in PARTIES:
        raise SettingsError(f"{path}: party: expected one of {', '.join(PARTIES)}, found {party!r}")
    return check(content, PARTIES[party], path)
