"""The torch room: alphabet, network, checkpoints, packs of proteins, inference."""

from __future__ import annotations

__all__ = ["BUILT_IN", "EmbedReport", "embed_file", "load_encoder_weights", "untrained_weights"]

from typing import TYPE_CHECKING, Any

from fedbio.encoder.untrained import BUILT_IN, untrained_weights

if TYPE_CHECKING:
    from fedbio.encoder.checkpoint import load_encoder_weights
    from fedbio.encoder.embed import EmbedReport, embed_file

_HOMES = {"EmbedReport": "embed", "embed_file": "embed", "load_encoder_weights": "checkpoint"}


def __getattr__(name: str) -> Any:
    # torch is imported when it is first needed, so that one may ask for an untrained encoder's digest without it
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
