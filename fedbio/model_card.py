"""Write the model card of an encoder from the account of its training."""

from __future__ import annotations

__all__ = ["CARD_FILE", "UNWRITTEN", "is_card", "model_card"]

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from fedbio.training_account import TrainingAccount
from fedbio.weights import EncoderConfig

CARD_FILE = "README.md"

UNWRITTEN = "To be written"
"""How a part begins that only a person can write, and has not written yet."""

_BY_HAND = {
    "data": f"{UNWRITTEN}: from which collections the proteins come, and the licences of these and of the weights.",
    "accuracy": f"{UNWRITTEN}: what a classifier reaches on embeddings of this encoder, and what it reaches without.",
}
_MOST_POINTS = 24
"""Rows of the table of perplexities; a longer curve is thinned out."""


class _Source(msgspec.Struct, frozen=True):
    name: str
    bytes: int = 0
    sha256: str = ""


class _Corpus(msgspec.Struct, frozen=True):
    sources: list[_Source] = []
    valid_sources: list[_Source] = []
    excluded_sources: list[_Source] = []
    proteins: dict[str, int] = {}
    residues: dict[str, int] = {}
    excluded: int = 0
    excluded_parts: int = 0
    held_out_twins: int = 0
    sha256: dict[str, str] = {}


class _Weights(msgspec.Struct, frozen=True):
    form: str = "float32"
    bytes: int = 0
    original_sha256: str = ""


class _Details(msgspec.Struct, frozen=True):
    """What the card tells of an account beyond `TrainingAccount`."""

    origin: str | None = msgspec.field(name="from", default=None)
    step: int = 0
    seconds: float = 0.0
    recipe: dict[str, str | int | float | bool | None] = {}
    corpus: _Corpus = _Corpus()
    weights: _Weights = _Weights()
    stretches: list[dict[str, str | int]] = []
    software: dict[str, str] = {}


def is_card(text: str) -> bool:
    """Whether a ``README.md`` is a card that `model_card` has written."""
    return all(_marks(part)[0] in text for part in _BY_HAND)


def model_card(account: dict[str, Any], config: EncoderConfig, *, before: str | None = None) -> str:
    """Return the card as Markdown.

    Parameters
    ----------
    account : dict
        What ``training.json`` holds.
    config : EncoderConfig
    before : str, optional
        An earlier card, whose parts written by hand are kept.

    Returns
    -------
    str
        With two parts for a person to write, between marks: the data's origin and licences, and accuracies.
    """
    known = msgspec.convert(account, TrainingAccount)
    details = msgspec.convert(account, _Details)
    parts = [
        _head(known, details, config),
        _purpose(known, config),
        _data(details.corpus, before),
        _training(known, details),
        _curve(known),
        "## Accuracy\n\n" + _by_hand("accuracy", before),
        _weights(known, details.weights),
    ]
    return "\n\n".join(parts) + "\n"


def _head(known: TrainingAccount, details: _Details, config: EncoderConfig) -> str:
    perplexity = "not measured" if known.perplexity is None else f"{known.perplexity:.2f}, masked residues held out"
    facts = [
        ["parameters", f"{known.parameters:,}, with the language-model head"],
        [
            "architecture",
            f"{config.layers} layers, {config.heads} heads, width {config.width}, feed-forward {config.ffn}, "
            f"{config.positions} positions, {config.activation}",
        ],
        ["longest protein at once", f"{config.max_residues} residues"],
        ["tokens learnt from", f"{known.tokens:,}"],
        ["perplexity", perplexity],
        ["weights", f"{details.weights.form}, {details.weights.bytes / 1e6:.1f} MB"],
        ["SHA-256 of the weights", f"`{known.weights_sha256}`"],
    ]
    origin = "from random numbers" if details.origin is None else f"from the weights of {details.origin}"
    unfinished = "" if known.finished else "\n\n**Its training was stopped before the end of the schedule.**"
    return (
        f"# {config.name}\n\nA protein language model (a BERT over amino acids), trained {origin} with "
        f"`fedbio pretrain`.{unfinished}\n\n{_table(['what', 'value'], facts)}\n\n"
        f"```console\n$ fedbio embed proteins.fasta -o proteins.h5 --encoder {config.name} --pooling ends\n```"
    )


def _purpose(known: TrainingAccount, config: EncoderConfig) -> str:
    return f"""## What it is for

Turning proteins into vectors on which small classifiers are trained, of subcellular location above all, at one place
or in a federation. It needs no download and runs on a laptop.

## Limits

- It is small and has seen little: {_short(known.parameters)} parameters, {_short(known.tokens)} tokens.
  Public encoders (ESM-2, ESM-1nv) have seen far more, and where you may use one, expect it to be better.
- Proteins longer than {config.max_residues} residues are covered by windows; what lies farther apart was never seen
  together.
- It knows the twenty residues and X, B, Z, U, O. Designed proteins and fragments are unlike what it has learnt from.
- Its perplexity is that of natural proteins like those of its training, and says nothing of any one use.
- What is predicted from its vectors is a hypothesis to be tested, and no ground for a decision about a patient."""


def _data(corpus: _Corpus, before: str | None) -> str:
    rows = [
        [role, each.name, f"{each.bytes:,}", f"`{each.sha256}`"]
        for role, sources in (
            ("learnt from", corpus.sources),
            ("held out", corpus.valid_sources),
            ("kept away from", corpus.excluded_sources),
        )
        for each in sources
    ]
    counts = ", ".join(
        f"{corpus.proteins[part]:,} proteins ({corpus.residues.get(part, 0):,} residues) {what}"
        for part, what in (("train", "to learn from"), ("valid", "held out"))
        if part in corpus.proteins
    )
    left_out = (
        f"{corpus.excluded:,} proteins were left out because they are identical to one of a file to be kept away from, "
        f"{corpus.excluded_parts:,} because they are a part of one or have one as a part, "
        f"{corpus.held_out_twins:,} because they are identical to one that was held out."
    )
    table = _table(["use", "file", "bytes", "SHA-256"], rows)
    if listed := corpus.sha256.get("train"):
        left_out += f" SHA-256 of the sequences learnt from, one a line and in the order of the files: `{listed}`."
    return f"## Data\n\n{_by_hand('data', before)}\n\n{table}\n\n{counts or 'Not counted'}. {left_out}"


def _training(known: TrainingAccount, details: _Details) -> str:
    rows = [[key, _shown(value)] for key, value in details.recipe.items()]
    devices = dict.fromkeys(str(each.get("device", "")) for each in details.stretches)
    ran = f"{details.step:,} updates in {details.seconds / 3600:.1f} hours"
    where = f" on {', '.join(devices)}, calls: {len(details.stretches)}" if devices else ""
    software = ", ".join(f"{name} {version}" for name, version in details.software.items())
    return (
        "## Recipe\n\nMasked-language modelling; what the keys mean stands in fedbio's `docs/pretraining.md`.\n\n"
        f"{_table(['key', 'value'], rows)}\n\n{ran}{where}; {software or 'software not recorded'}."
    )


def _curve(known: TrainingAccount) -> str:
    points = list(known.curve)
    if len(points) > _MOST_POINTS:
        last = len(points) - 1
        points = [points[round(place * last / (_MOST_POINTS - 1))] for place in range(_MOST_POINTS)]
    rows = [
        [f"{each.step:,}", f"{each.tokens:,}", _shown_perplexity(each.perplexity), f"{each.masked:,}"]
        for each in points
    ]
    final = any(each.final for each in points)
    told = "The last row is of the weights as they are, on all that was held out." if final else "It was not finished."
    return (
        "## Perplexity\n\nOf masked residues of proteins that were held out. On the way a part of them was taken. "
        f"{told} Rounding of the weights came later.\n\n"
        f"{_table(['update', 'tokens', 'perplexity', 'masked residues'], rows)}"
    )


def _weights(known: TrainingAccount, weights: _Weights) -> str:
    rounded = ""
    if weights.original_sha256 not in ("", known.weights_sha256):
        rounded = (
            f" The numbers that training ended with, before they were rounded to {weights.form}, had the SHA-256 "
            f"`{weights.original_sha256}`."
        )
    return (
        "## The weights\n\n"
        f"Their SHA-256 is `{known.weights_sha256}`: of the float32 tensors that inference uses, not of the file, so "
        f"that it stays the same in whatever form they are kept. fedbio compares it each time it loads them.{rounded}"
    )


def _by_hand(part: str, before: str | None) -> str:
    begin, end = _marks(part)
    text = f"\n{_BY_HAND[part]}\n"
    if before is not None and begin in before and end in before.split(begin, 1)[1]:
        text = before.split(begin, 1)[1].split(end, 1)[0]
    return f"{begin}{text}{end}"


def _marks(part: str) -> tuple[str, str]:
    return f"<!-- {part}: written by hand, and kept when this card is made again -->", f"<!-- end of {part} -->"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: str | int | float | bool | None) -> str:
    return "none" if value is None else str(value)


def _shown_perplexity(perplexity: float | None) -> str:
    return "none" if perplexity is None else f"{perplexity:.2f}"


def _short(count: int) -> str:
    """Give a number in words with three digits at most: 4,969,344 -> ``5.0 million``."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.1f} {word}" if count < 100 * size else f"{count / size:.0f} {word}"
    return str(count)
