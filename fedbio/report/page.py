"""Lay a run's findings out as one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

__all__ = ["write_page"]

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fedbio.errors import MachineError
from fedbio.files import write_whole
from fedbio.report.accuracy_plates import accuracy_plate, curves_plate, gain_plate
from fedbio.report.class_plates import confusion_plate, scores_plate
from fedbio.report.collect import Run
from fedbio.report.ledger import kinds_sent, ledger_table, statement
from fedbio.report.plates import MANY_SITES, Table
from fedbio.report.site_plates import counts_plate, map_plate
from fedbio.report.study import Study
from fedbio.report.words import (
    NONE,
    bytes_words,
    duration,
    encoder_words,
    interval,
    named,
    percent,
    perplexity_words,
    verdict,
)

if TYPE_CHECKING:
    import markupsafe


MOST_REMARKS, SHOWN_REMARKS = 6, 3
"""If the parties have made more remarks than the first number, so many are shown: the numbers come after them."""


def write_page(study: Study, path: str | os.PathLike[str]) -> Path:
    """Write the report as one self-contained HTML file and return its path.

    Raises
    ------
    MachineError
        If jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MachineError(
            "the report's page needs jinja2, which is not installed; install it with: pip install 'fedbio[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedbio.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    run = study.run
    whose = f"{run.sites[0].party}" if run.own and run.sites else run.folder.resolve().name
    html = environment.get_template("report.html.j2").render(
        whose=whose,
        own=run.own,
        encoder_name=encoder_words(run.encoder),
        verdict=verdict(study),
        notices=_notices(study),
        tiles=_tiles(study),
        best=study.best,
        accuracy=accuracy_plate(study),
        gain=gain_plate(study),
        scores=scores_plate(study),
        confusion=confusion_plate(study),
        counts=counts_plate(study),
        curves=curves_plate(study),
        map=map_plate(study),
        statement=statement(run),
        kinds=kinds_sent(run),
        many=len(run.sites) > MANY_SITES,
        ledger=ledger_table(run),
        encoder=_encoder_table(run),
        data=_data_table(run),
        times=_times_table(run),
        versions=_versions_table(run),
        settings=_settings(run),
        seeds=", ".join(map(str, study.seeds)),
        started=min((party.started for party in run.parties if party.started), default=""),
        finished=max((party.finished for party in run.parties if party.finished), default=""),
        written_by=next((party.versions["fedbio"] for party in run.parties if "fedbio" in party.versions), ""),
    )  # fmt: skip
    write_whole(path, html)
    return Path(path)


def _prose(text: str) -> markupsafe.Markup:
    """Escape a text and keep the name of an MLP, and a number with its unit, on one line."""
    import markupsafe

    whole = re.compile(r"\d+(?:-\d+)+|[+−\d][\d.,]*\u00a0?\s(?:%|points)")
    return markupsafe.Markup(whole.sub(r'<span class="whole">\g<0></span>', str(markupsafe.escape(text))))  # noqa: S704


def _tiles(study: Study) -> list[tuple[str, str, str, str]]:
    """The four accuracies that are compared, those that exist: style, name, value, interval."""
    best = study.accuracies[study.best]
    alone = "Alone" if len(best.sites) < 2 else f"Alone, mean of {len(best.sites)}"
    return [
        (style, name, percent(estimate), interval(estimate))
        for style, name, estimate in (
            ("federated", "Together", best.federated),
            ("local", alone, best.local),
            ("central", "All in one place", best.central),
            ("majority", f"Always “{study.majority_class}”", best.majority),
        )
        if estimate is not None
    ]


def _notices(study: Study) -> list[tuple[str, str]]:
    """What a reader must know before the numbers: a heading and a sentence each."""
    run, best = study.run, study.accuracies[study.best]
    notices = []
    if run.encoder is not None and not run.encoder.trained:
        notices.append(
            (
                "Untrained encoder",
                f"The encoder {run.encoder.name} has random weights from a fixed seed: it has learned nothing from "
                "proteins. The numbers show that the machinery works and what joining is worth under these conditions, "
                "not how well proteins can be placed with a trained encoder.",
            )
        )
    if any(site.data and site.data.synthetic for site in run.sites):
        notices.append(
            (
                "Synthetic proteins",
                "The proteins were made by fedbio's demo generator. They are not real, and nothing here is a finding "
                "about biology.",
            )
        )
    encoders = {party.encoder.weights_sha256 for party in run.parties if party.encoder}
    if len(encoders) > 1:
        notices.append(
            (
                "Different encoders",
                "The parties used different encoder weights, so that their embeddings do not fit together.",
            )
        )
    if len(run.counts) == 1:
        notices.append(
            ("One site only", "With a single site, federated training is training alone on another schedule.")
        )
    if best.federated.low <= best.majority.value:
        notices.append(
            (
                "Close to guessing",
                f"The federated classifier is not clearly better than always answering “{study.majority_class}” "
                f"({percent(best.majority)}).",
            )
        )
    if not study.best_known:
        notices.append(
            (
                "No validation",
                f"No validation accuracy was recorded, so that no best classifier could be chosen: {study.best} is "
                "merely the smallest.",
            )
        )
    remarks = [(f"Remark of {party.party}", remark) for party in run.parties for remark in party.remarks]
    if len(remarks) > MOST_REMARKS:
        more = len(remarks) - SHOWN_REMARKS
        remarks[SHOWN_REMARKS:] = [(f"{more} further remarks", "They are in the parties' own party.json.")]
    return notices + remarks


def _encoder_table(run: Run) -> Table:
    encoder = run.encoder
    if encoder is None:
        return Table("Encoder", ["Property", "Value"], [])
    cut = {"cut": "the rest is cut off", "window": "longer ones are covered by overlapping windows"}[encoder.long]
    how = {
        "mean": "mean over residues",
        "ends": f"means over all residues and over those at the ends ({encoder.bins})",
        "max": "maximum over residues",
        "start": "start token",
    }
    return Table(
        "Encoder",
        ["Property", "Value"],
        [
            ["Name", encoder.name],
            ["Weights", "trained" if encoder.trained else "untrained: random numbers from a fixed seed"],
            *([] if encoder.perplexity is None else [["Perplexity", perplexity_words(encoder.perplexity)]]),
            ["SHA-256 of the weights", encoder.weights_sha256],
            [
                "Embedding",
                f"{encoder.width} numbers, {how.get(encoder.pooling, encoder.pooling)} of layer {encoder.layer}",
            ],
            ["Arithmetic", encoder.dtype],
            ["Longest protein taken whole", f"{encoder.max_residues} residues; {cut}"],
        ],
    )


def _data_table(run: Run) -> Table:
    rows = []
    for name, counts in run.counts.items():
        data = next((site.data for site in run.sites if site.party == name), None)
        splits = [f"{sum(split.values()):,}" for split in (counts.train, counts.validation, counts.test)]
        known = [f"{data.residues:,}", f"{data.longer:,}", data.source] if data else [NONE] * 3
        rows.append([name, *splits, *known])
    return Table(
        "Proteins of each site (too long: longer than the encoder takes whole)",
        ["Site", "Training", "Validation", "Test", "Residues", "Too long", "File"],
        rows,
    )


def _times_table(run: Run) -> Table:
    stages = list(dict.fromkeys(stage for party in run.parties for stage in party.seconds))
    return Table(
        "Time and memory",
        ["Party", *stages, "Peak memory"],
        [
            [
                party.party,
                *(duration(party.seconds[stage]) if stage in party.seconds else NONE for stage in stages),
                bytes_words(party.peak_memory_bytes) if party.peak_memory_bytes else NONE,
            ]
            for party in run.parties
        ],
    )


def _versions_table(run: Run) -> Table:
    names = list(dict.fromkeys(name for party in run.parties for name in party.versions))
    alike: dict[tuple[str, ...], list[str]] = {}
    for party in run.parties:
        alike.setdefault(tuple(party.versions.get(name, NONE) for name in names), []).append(party.party)
    return Table(
        "Versions",
        ["Party", *names],
        [[named(parties), *cells] for cells, parties in alike.items()],
    )


def _settings(run: Run) -> list[tuple[str, str]]:
    """Each different settings text with the parties that used it."""
    texts: dict[str, list[str]] = {}
    for party in run.parties:
        if party.settings:
            texts.setdefault(json.dumps(party.settings, indent=2, ensure_ascii=False), []).append(party.party)
    return [(named(parties), text) for text, parties in texts.items()]
