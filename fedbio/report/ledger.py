"""Say what left each site, from the sites' own ledgers, and say no more than they show."""

from __future__ import annotations

__all__ = ["kinds_sent", "ledger_table", "statement"]

from fedbio.report.collect import Run
from fedbio.report.plates import MANY_SITES, Table
from fedbio.report.words import bytes_words

KINDS = {
    "model": "weights of classifiers",
    "sealed": "weights of classifiers, sealed for another site so that the server cannot read them",
    "metrics": "accuracies, losses, learning curves, and counts of right and wrong answers",
    "counts": "numbers of proteins, by class and split",
    "sums": "sums over all training proteins of a site, for the common mean and spread, and for the axes of a map",
    "coordinates": "two coordinates of each protein on the map, with its compartment and split, without its name",
    "control": "joining, signs of life, empty answers",
}
"""What a kind of message holds. A kind that is not named here is reported as unknown to the reader."""


def statement(run: Run) -> str:
    """Say in words what left the sites and what did not."""
    kinds = [kind for kind in KINDS if any(kind in site.sent for site in run.sites)]
    unknown = sorted({kind for site in run.sites for kind in site.sent} - set(KINDS))
    if not kinds and not unknown:
        return "The sites kept no ledger of what they sent, so that this report cannot say what left them."
    whose = "site's own ledger lists" if len(run.sites) == 1 else "sites' own ledgers list"
    if unknown:
        return (
            f"The {whose} kinds of messages that this report does not know ({', '.join(unknown)}); whether they held "
            "sequences or embeddings cannot be said here. Ask who wrote the job."
        )
    listed = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
    mapped = (
        " The map was on: two coordinates of each mapped protein did leave, with its compartment and without its name."
        if "coordinates" in kinds
        else ""
    )
    return (
        f"No sequence and no embedding left a site: the {whose} {listed}, and nothing else.{mapped} Weights, sums and "
        "counts are computed from the proteins, so that they do tell something about a site as a whole."
    )


def kinds_sent(run: Run) -> list[tuple[str, str]]:
    """Return each kind of message that left a site, and what such a message holds."""
    sent = {kind for site in run.sites for kind in site.sent}
    known = [(kind, holds) for kind, holds in KINDS.items() if kind in sent]
    if schemes := _schemes(run):
        in_schemes = f"those of rounds as {', '.join(schemes)}, whose bytes are counted"
        known = [(kind, f"{holds}; {in_schemes}" if kind == "model" else holds) for kind, holds in known]
    return known + [(kind, "not known to this report") for kind in sorted(sent - set(KINDS))]


def _schemes(run: Run) -> list[str]:
    """Return the quantization schemes in which sites sent their models, as the job's settings say."""
    chosen = [site.settings.get("quantization") for site in run.sites]
    return sorted({str(each["to_server"]) for each in chosen if isinstance(each, dict) and each.get("to_server")})


def ledger_table(run: Run) -> Table:
    """Return messages and bytes by site and kind; of many sites a row each, with the bytes."""
    if len(run.sites) > MANY_SITES:
        return _bytes_of_many(run)
    rows = []
    for site in run.sites:
        for kind, traffic in sorted(site.sent.items(), key=lambda item: -item[1].bytes):
            rows.append(
                [
                    site.party,
                    kind,
                    f"{traffic.messages:,}",
                    f"{traffic.bytes:,}",
                    bytes_words(traffic.bytes),
                ]
            )
        messages = sum(traffic.messages for traffic in site.sent.values())
        total = sum(traffic.bytes for traffic in site.sent.values())
        rows.append([site.party, "all kinds", f"{messages:,}", f"{total:,}", bytes_words(total)])
    return Table("What left each site", ["Site", "Kind", "Messages", "Bytes", "That is"], rows)


def _bytes_of_many(run: Run) -> Table:
    kinds = [kind for kind, _ in kinds_sent(run)]
    sent = {site.party: {kind: traffic.bytes for kind, traffic in site.sent.items()} for site in run.sites}
    totals = {kind: sum(each.get(kind, 0) for each in sent.values()) for kind in kinds}
    rows = [
        [name, *(f"{found.get(kind, 0):,}" for kind in kinds), f"{sum(found.values()):,}"]
        for name, found in {"all sites": totals, **sent}.items()
    ]
    return Table("Bytes that left each site, by kind", ["Site", *kinds, "All kinds"], rows)
