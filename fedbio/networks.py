"""A classifier's network by its name: an MLP (``256-128-64``), or light attention before one (``la9-32``)."""

from __future__ import annotations

__all__ = ["Attention", "NetworkShape", "input_problem", "parse_hidden", "parse_network"]

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

MAX_KERNEL = 31

_ATTENTION = re.compile(r"la([1-9][0-9]?)(?:x([1-9][0-9]{0,4}))?-(.*)", re.ASCII | re.DOTALL)


class Attention(msgspec.Struct, frozen=True):
    """The shape of light attention.

    Parameters
    ----------
    kernel : int
        Residues that a convolution sees at once; odd.
    filters : int or None
        Outputs of each convolution; None for as many as an embedding is wide.
    """

    kernel: int = 9
    filters: int | None = None

    def width(self, inputs: int) -> int:
        """Return the number of filters for embeddings of a width."""
        return inputs if self.filters is None else self.filters


class NetworkShape(NamedTuple):
    """Widths of the hidden layers of an MLP, and the light attention before it, if there is one."""

    hidden: tuple[int, ...]
    attention: Attention | None = None

    @property
    def name(self) -> str:
        """``"256-128-64"``, ``"la9-32"``, or ``"la9x64-32"`` with 64 filters."""
        widths = "-".join(map(str, self.hidden))
        if self.attention is None:
            return widths
        filters = "" if self.attention.filters is None else f"x{self.attention.filters}"
        return f"la{self.attention.kernel}{filters}-{widths}"

    def tensors(self, inputs: int, classes: int) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the parameters, for embeddings of width `inputs`."""
        shapes: dict[str, tuple[int, ...]] = {}
        width = inputs
        if self.attention is not None:
            filters = self.attention.width(inputs)
            convolution = (filters, inputs, self.attention.kernel)
            shapes = {
                "attention.values.weight": convolution,
                "attention.values.bias": (filters,),
                "attention.scores.weight": convolution,
            }
            width = 2 * filters
        for layer, (before, after) in enumerate(pairwise((width, *self.hidden, classes))):
            shapes[f"layers.{layer}.weight"] = (after, before)
            shapes[f"layers.{layer}.bias"] = (after,)
        return shapes


def parse_hidden(text: str) -> tuple[int, ...]:
    """Turn an MLP's name into the widths of its hidden layers: ``"256-128-64"`` into ``(256, 128, 64)``.

    Raises
    ------
    ValueError
        If the text is not one to eight widths between 1 and 65,536 joined by hyphens.
    """
    widths = tuple(int(part) if part.isascii() and part.isdigit() else 0 for part in text.split("-"))
    if not (1 <= len(widths) <= 8 and all(1 <= width <= 65_536 for width in widths)):
        raise ValueError("expected one to eight layer widths joined by hyphens, for example 256-128-64")
    return widths


def parse_network(text: str) -> NetworkShape:
    """Turn a classifier's name into its shape.

    Parameters
    ----------
    text : str
        The hidden layers of an MLP; before them, for light attention, ``laK-`` with a kernel of K residues, or
        ``laKxF-`` with F filters instead of as many as an embedding is wide.

    Raises
    ------
    ValueError
        If it is neither; the message says what is allowed.

    Examples
    --------
    >>> parse_network("la9x64-32")
    NetworkShape(hidden=(32,), attention=Attention(kernel=9, filters=64))
    """
    if not text.startswith("la"):
        return NetworkShape(parse_hidden(text))
    found = _ATTENTION.fullmatch(text)
    kernel, filters = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
    if found is None or not kernel % 2 or kernel > MAX_KERNEL or filters > 65_536:
        raise ValueError(
            f"expected light attention as la, an odd kernel up to {MAX_KERNEL}, perhaps x and a number of filters, and "
            "the hidden layers, for example la9-32 or la9x64-32"
        )
    return NetworkShape(parse_hidden(found[3]), Attention(kernel, filters or None))


def input_problem(names: Sequence[str], pooling: str) -> str | None:
    """Return why classifiers cannot take embeddings of a pooling, with what to do; None if all of them can.

    Parameters
    ----------
    names : sequence of str
        Of classifiers.
    pooling : str
        As in `fedbio.results.EncoderInfo`.
    """
    per_residue = pooling == "residues"
    for name in names:
        attention = parse_network(name).attention is not None
        if attention and not per_residue:
            return (
                f"light attention ({name}) reads one embedding per residue, and these are one per protein, pooled by "
                f"{pooling!r}; embed with pooling residues, or choose an MLP such as 32"
            )
        if per_residue and not attention:
            return (
                f"the MLP {name} reads one embedding per protein, and these are one per residue; embed with another "
                "pooling such as mean, or choose light attention such as la9-32"
            )
    return None
