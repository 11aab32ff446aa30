"""Look at every byte that leaves a site, before encryption: no sequence, no embedding; a planted leak is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedbio.classifier import load_model
from fedbio.embeddings import Embeddings
from fedbio.executors import registry
from fedbio.federation import Executor, FLModel
from fedbio.transport.drivers import memory
from fedbio.transport.frames import Frame, encode

SITES = ("site-1", "site-2", "site-3")
RESIDUES = 12
"""So many residues in a row are taken for a piece of a sequence."""
NUMBERS = 4
"""So many numbers in a row are taken for a piece of an embedding."""


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytearray]:
    """What each site wrote to its connections: all frames, in order."""
    found: dict[str, bytearray] = {}
    dial = memory.MemoryDriver.dial

    def watched(self: Any, address: str, credentials: Any, timeout_s: float) -> Any:
        connection = dial(self, address, credentials, timeout_s)
        kept = found.setdefault(credentials.check(), bytearray())
        write = connection.write

        def record(frame: Frame, *options: Any) -> None:
            kept.extend(encode([frame]))
            write(frame, *options)

        connection.write = record
        return connection

    monkeypatch.setattr(memory.MemoryDriver, "dial", watched)
    return found


def pieces(study: Any, site: str) -> dict[str, set[bytes]]:
    """Every piece of the site's sequences and embeddings, as stored and standardized, in both widths of number."""
    proteins = study.proteins[site]
    sequences = {
        each.sequence[begin : begin + RESIDUES].encode()
        for each in proteins
        for begin in range(0, len(each.sequence) - RESIDUES, RESIDUES)
    }
    with Embeddings.open(study.folder / site / "embeddings.h5") as store:
        rows = store.rows([each.id for each in proteins])
    standardizer = load_model(study.folder / "server/global").standardizer
    forms = [form.astype(dtype) for form in (rows, standardizer.apply(rows)) for dtype in (np.float32, np.float64)]
    embeddings = {
        row[begin : begin + NUMBERS].tobytes()
        for form in forms
        for row in form
        for begin in range(0, rows.shape[1] - NUMBERS + 1, NUMBERS)
    }
    return {"sequence": sequences, "embedding": embeddings}


def leaks(study: Any, site: str, content: bytes) -> set[str]:
    return {kind for kind, wanted in pieces(study, site).items() if any(piece in content for piece in wanted)}


def test_no_sequence_and_no_embedding_leaves_a_site(study: Any, left: dict[str, bytearray]) -> None:
    allow = dict.fromkeys(SITES, ("embed", "statistics", "train", "evaluate", "publish", "map"))
    study.run(study.jobs(points=20), allow=allow)
    for site in SITES:
        assert len(left[site]) > 10_000
        assert leaks(study, site, bytes(left[site])) == set()
        ids = [each.id.encode() for each in study.proteins[site]]
        assert not any(each in left[site] for each in ids)


class _Leaky(Executor):
    """An executor that does its work and lets something more out."""

    def __init__(self, honest: Executor, leak: Any) -> None:
        self.honest, self.leak = honest, leak
        self.name, self.kind, self.leaves, self.stage = honest.name, honest.kind, honest.leaves, honest.stage  # type: ignore[misc]

    def execute(self, task: Any, model: FLModel, context: Any) -> FLModel:
        return self.leak(self.honest.execute(task, model, context), context)


@pytest.mark.parametrize("kind", ["sequence", "embedding"])
def test_looking_finds_a_planted_leak(study: Any, left: dict[str, bytearray], kind: str) -> None:
    study.embed_all()
    first = study.proteins["site-1"][0]

    def leak(model: FLModel, context: Any) -> FLModel:
        if kind == "sequence":
            model.meta["note"] = first.sequence
        else:
            with Embeddings.open(context.embeddings) as store:
                row = store.rows([first.id])[0]
            model.params["layers.0.bias"] = row[: len(model.params["layers.0.bias"])].copy()
        return model

    executors = registry()
    executors["train"] = _Leaky(executors["train"], leak)
    study.run(study.jobs(embed=False, rounds=1), executors={"site-1": executors})
    assert leaks(study, "site-1", bytes(left["site-1"])) == {kind}
    assert leaks(study, "site-2", bytes(left["site-2"])) == set()
