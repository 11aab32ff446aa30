"""Parts that several settings files share: names, limits of the transport and of rounds, quantization of models."""

from __future__ import annotations

__all__ = [
    "DRIVER",
    "SCHEMES",
    "TEXT_FORMS",
    "Address",
    "DriverName",
    "PLAIN_FILE",
    "PLAIN_FILE_WORDS",
    "FederationLimits",
    "NetworkName",
    "PartyName",
    "Quantization",
    "QuantizationSetting",
    "Scheme",
    "Seconds",
    "Section",
    "ServerTransport",
    "TaskKind",
    "Transport",
    "no_twins",
    "text_form",
]

import typing
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from fedbio.networks import parse_network


def _is_network(text: str) -> str:
    parse_network(text)
    return text


def no_twins(values: list[Any]) -> list[Any]:
    """Return a list as it is, or raise `ValueError` if something is in it twice."""
    twins = sorted({str(value) for value in values if values.count(value) > 1})
    if twins:
        raise ValueError(f"{', '.join(twins)} named twice; name each once")
    return values


DRIVER = "grpc"
"""What moves frames where nothing else was said."""

TEXT_FORMS: dict[str, str] = {}
"""Regular expressions in words, for those whose text does not match."""


def text_form(pattern: str, words: str) -> Any:
    """Return a field whose text matches `pattern`, which messages call `words`."""
    TEXT_FORMS[pattern] = words
    return Field(pattern=pattern)


PLAIN_FILE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
PLAIN_FILE_WORDS = "letters, digits, dots, _ and -, a letter or digit first, at most 128"
"""A name that is never a path."""

PartyName = Annotated[
    str,
    text_form(r"^[a-z0-9][a-z0-9-]{0,62}$", "lower-case letters, digits and hyphens, the first no hyphen, at most 63"),
]
DriverName = Annotated[
    str, text_form(r"^[a-z][a-z0-9_-]{0,62}$", "a driver's name: lower-case letters, digits, _ and -, at most 63")
]
Address = Annotated[
    str,
    text_form(
        r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$", "HOST:PORT, for example fl.example.org:8443 or [::1]:8443"
    ),
]
NetworkName = Annotated[str, AfterValidator(_is_network)]
Seconds = Annotated[float, Field(gt=0, le=1e7)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Bytes = Annotated[int, Field(ge=1 << 16, le=1 << 50)]
TaskKind = Literal["embed", "statistics", "train", "evaluate", "publish", "map", "code", "split"]
Scheme = Literal["float16", "bfloat16", "int8", "fp4", "nf4"]
SCHEMES: tuple[Scheme, ...] = typing.get_args(Scheme)


class Section(pydantic.BaseModel):
    """Keys that belong together: unknown ones are errors, and the text below each says what it means."""

    # a process checks few of these models: those are built when they are
    model_config = pydantic.ConfigDict(defer_build=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class Transport(Section):
    """What a party accepts from its peers, and how long it waits (`fedbio.transport.Limits`)."""

    max_payload_bytes: Bytes = 256 << 30
    """Bytes of one model, file or other payload; more is refused before it is sent."""
    max_item_bytes: Bytes = 16 << 30
    """Bytes of one tensor in a stream of tensors."""
    memory_bytes: Annotated[int, Field(ge=0, le=1 << 50)] = 64 << 20
    """Bytes of one peer's payloads that are held in memory; what exceeds them goes to a file in the workspace."""
    max_messages: Count = 64
    """Messages of one peer that are arriving or not yet handled; more are refused."""
    max_partial_files: Count = 8
    """Files of one peer that wait half-received for their rest; the oldest makes room for one more."""
    keep_partial_s: Seconds = 86_400.0
    """Seconds that a half-received file waits for its rest."""
    window_chunks: Annotated[int, Field(ge=1, le=1_000)] = 8
    """Chunks of 1 MiB that may be under way in one stream; more fill a fast link over a long way, and cost memory."""
    handshake_s: Seconds = 10.0
    """Seconds from a connection to the end of its handshake."""
    idle_s: Seconds = 120.0
    """Seconds in which nothing of a payload arrives, on a connection that stands, after which it is given up."""
    resume_s: Seconds = 120.0
    """Seconds that what is under way outlives a broken connection."""
    takeover_s: Seconds = 2.0
    """Seconds that a peer has to show life when a second process comes under its name."""


class ServerTransport(Transport):
    """What a server accepts from its sites, and how long it waits (`fedbio.transport.Limits`)."""

    max_peers: Count = 256
    """Connections at the same time."""
    max_handshakes: Count = 64
    """Connections that have not yet proven who they are; one more ends the oldest of them."""


class Quantization(Section):
    """How the models of rounds travel; training and averaging keep their own precision."""

    to_sites: Scheme | None = None
    """Scheme in which the server sends models to train; null sends them exact."""
    to_server: Scheme | None = None
    """Scheme in which the sites send trained models back; null sends them exact."""
    error_feedback: bool = False
    """Each sender adds to its next model what quantization took from its last one, and keeps that much in memory."""

    @pydantic.model_validator(mode="after")
    def _check_across(self) -> Quantization:
        if self.error_feedback and self.to_sites is None and self.to_server is None:
            raise ValueError("error_feedback needs a scheme in to_sites or to_server")
        return self


def _both_ways(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return {"to_sites": value, "to_server": value}
    return value


QuantizationSetting = Annotated[
    Quantization, BeforeValidator(_both_ways, json_schema_input_type=Quantization | Scheme | None)
]
"""One scheme for both ways, or a `Quantization`."""


class FederationLimits(Section):
    """How many sites a round needs, and how long it waits for them."""

    min_sites: Annotated[int, Field(ge=1)] | None = None
    """A round goes on with so many results once its deadline has passed; null means every site."""
    join_deadline_s: Seconds = 3600.0
    """Seconds that the server waits for `min_sites` to join, and a site for the server."""
    round_deadline_s: Seconds = 3600.0
    """Seconds that the server waits for the results of a task."""
    jobs_at_once: Annotated[int, Field(ge=1, le=100)] = 1
    """Jobs that the server runs at the same time; 1 runs one after the other."""
    heartbeat_s: Seconds = 5.0
    """Seconds between two signs of life; the connection of a site that is silent for three of them is ended."""
