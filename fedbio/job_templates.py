"""Templates of job files, written from the settings themselves: their words, their defaults."""

from __future__ import annotations

__all__ = ["TEMPLATES", "template"]

import difflib
import json
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import pydantic

from fedbio import settings_jobs
from fedbio.errors import SettingsError
from fedbio.settings import JobsFile

COLUMNS = 118


class Template(NamedTuple):
    """A job file in short: what it is for, the job's section, the keys that it shows, and those that it sets."""

    about: str
    section: type[pydantic.BaseModel]
    keys: tuple[str, ...]
    values: Mapping[str, Any] = {}


_SCRIPT = ("client.script", "client.initial")
_CLIENT = {"client.script": "train.py", "client.initial": "train.py:initial_model"}
_FEDAVG = (*_SCRIPT, "rounds", "selection.metric")

TEMPLATES: dict[str, Template] = {
    "fedavg": Template(
        "Federated averaging: McMahan et al. 2017, arXiv 1602.05629.",
        settings_jobs.FedAvgJob,
        (*_SCRIPT, "client.files", "client.launch", "rounds", "sites_per_round", "selection.metric", "patience"),
        _CLIENT,
    ),
    "fedopt": Template(
        "Federated averaging with an optimizer at the server: Reddi et al. 2021, arXiv 2003.00295.",
        settings_jobs.FedAvgJob,
        (
            *_FEDAVG,
            "optimizer.name",
            "optimizer.learning_rate",
            "optimizer.beta_1",
            "optimizer.beta_2",
            "optimizer.tau",
        ),
        {**_CLIENT, "name": "fedopt", "optimizer.name": "adam"},
    ),
    "fedprox": Template(
        "Federated averaging with a proximal term: Li et al. 2020, arXiv 1812.06127.",
        settings_jobs.FedAvgJob,
        (*_FEDAVG, "proximal_mu"),
        {**_CLIENT, "name": "fedprox", "proximal_mu": 0.01},
    ),
    "scaffold": Template(
        "Federated averaging with control variates: Karimireddy et al. 2020, arXiv 1910.06378.",
        settings_jobs.FedAvgJob,
        (*_FEDAVG, "scaffold"),
        {**_CLIENT, "name": "scaffold", "scaffold": True},
    ),
    "median": Template(
        "The median of each coordinate instead of the mean: Yin et al. 2018, arXiv 1803.01498.",
        settings_jobs.FedAvgJob,
        (*_FEDAVG, "aggregate", "norm_bound"),
        {**_CLIENT, "name": "median", "aggregate": "median"},
    ),
    "cyclic": Template(
        "Cyclic weight transfer: Chang et al. 2018, doi 10.1093/jamia/ocy017.",
        settings_jobs.CyclicJob,
        (*_SCRIPT, "rounds", "order", "seed"),
        _CLIENT,
    ),
    "evaluation": Template(
        "Every model on every site's data.",
        settings_jobs.EvaluationJob,
        ("client.script", "models", "sites"),
        {"client.script": "train.py"},
    ),
    "swarm": Template(
        "Swarm learning, in which the server cannot read any model: Warnat-Herresthal et al. 2021, doi "
        "10.1038/s41586-021-03583-3.",
        settings_jobs.SwarmJob,
        (*_SCRIPT, "rounds", "seed"),
        _CLIENT,
    ),
    "split": Template(
        "Split learning, a network cut between two sites: Gupta & Raskar 2018, doi 10.1016/j.jnca.2018.05.003.",
        settings_jobs.SplitJob,
        ("client.script", "bottom", "top", "epochs", "batch_size", "seed", "max_message_mb"),
        {"client.script": "net.py", "bottom": "site-1", "top": "site-2"},
    ),
    "statistics": Template(
        "Counts and histograms of all sites' proteins.",
        settings_jobs.StatisticsJob,
        ("classes", "length_bins", "min_count"),
    ),
    "classify": Template(
        "The classifier of subcellular location: alone, together, and the difference.",
        settings_jobs.ClassifyJob,
        ("classes", "training.mlps", "training.seeds", "training.rounds", "training.epochs", "aggregation"),
    ),
    "embed": Template(
        "Embeddings of every site's proteins, at the site.",
        settings_jobs.EmbedJob,
        ("encoder.name", "encoder.sha256", "encoder.dtype"),
    ),
}


def template(name: str) -> str:
    """Return a commented job file in YAML.

    Raises
    ------
    SettingsError
        If there is no such template; with all that there are.
    """
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SettingsError(f"template {name!r}: there is none; {hint}there are {', '.join(TEMPLATES)}")
    about, section, keys, values = TEMPLATES[name]
    tree: dict[str, Any] = {}
    for key in ("name", "workflow", *keys):
        *parents, last = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = values.get(key)
    lines = [
        *_comment(about, ""),
        *_comment((section.__doc__ or "").strip().splitlines()[0], ""),
        *_comment(
            "Send it to a running server: fedbio job submit FILE --kit KIT. All keys: fedbio settings schema jobs.", ""
        ),
        "",
        "jobs:",
    ]
    body = _lines(section, tree, "    ")
    # the first key opens the list's entry
    first = next(number for number, line in enumerate(body) if not line.lstrip().startswith("#"))
    body[first] = "  - " + body[first].lstrip()
    federation = JobsFile.model_fields["federation"].annotation
    assert isinstance(federation, type)
    limits = {"min_sites": None, "round_deadline_s": None}
    return "\n".join([*lines, *body, "", "federation:", *_lines(federation, limits, "  "), ""])


def _lines(section: type[pydantic.BaseModel], tree: Mapping[str, Any], indent: str) -> list[str]:
    """Return keys with what their settings say of them; None stands for the default."""
    lines: list[str] = []
    for key, value in tree.items():
        described = section.model_fields[key]
        if described.description:
            lines += _comment(described.description, indent)
        nested = _section_of(described.annotation)
        if isinstance(value, dict):
            assert nested is not None
            lines += [f"{indent}{key}:", *_lines(nested, value, indent + "  ")]
            continue
        if value is None:
            value = _default(section, key)
        lines.append(f"{indent}{key}: {_yaml(value)}")
    return lines


def _default(section: type[pydantic.BaseModel], key: str) -> Any:
    described = section.model_fields[key]
    if key == "workflow":
        return described.annotation.__args__[0]  # type: ignore[union-attr]
    return described.get_default(call_default_factory=True)


def _section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    """Return the section that a key holds, also where it may be null instead."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, pydantic.BaseModel)), None)


def _yaml(value: Any) -> str:
    # what JSON writes YAML reads; plain words need no quotes
    if isinstance(value, str) and value.replace("-", "").replace("_", "").replace(".", "").isalnum():
        return value if not value[0].isdigit() else json.dumps(value)
    return json.dumps(value)


def _comment(text: str, indent: str) -> list[str]:
    words = " ".join(text.split())
    return [f"{indent}# {line}" for line in textwrap.wrap(words, COLUMNS - len(indent) - 2, break_long_words=False)]
