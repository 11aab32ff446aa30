"""Every error that a person sees, each with the exit code that the command line returns for it.

::

    FedbioError                    1  (never raised itself)
    ├─ InputError                  2
    │   ├─ SettingsError           2  a key, a path or a value: always with file and dotted key
    │   ├─ DataError               2  FASTA, labels, embeddings: always with file and line or record
    │   │   └─ FormatError         2  unknown or damaged format: with found and readable versions
    │   └─ MachineError            2  this machine stands in the way: a full disk, a port in use
    ├─ TransportError              3  peer address and elapsed seconds
    │   ├─ PeerUnreachable         3  retry may help; given up after the total deadline
    │   └─ ProtocolError           3  a malformed, oversized or out-of-order message
    ├─ FederationError             3  a round cannot complete: which sites are missing, which minimum applies
    │   └─ ScriptError             3  a training script has failed: how, and the last of what it has written
    └─ RefusedError                4  certificate, identity, permission, policy: never retried

A message says what is wrong, where, what was found, what is allowed and what to do next, in one sentence
without an exclamation mark. Context is added on the way up with ``error.add_note``.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "DataError",
    "FedbioError",
    "FederationError",
    "FormatError",
    "InputError",
    "MachineError",
    "PeerUnreachable",
    "ProtocolError",
    "RefusedError",
    "ScriptError",
    "SettingsError",
    "TransportError",
]


class FedbioError(Exception):
    """Base of every error that is reported as one line instead of a traceback."""

    exit_code = 1


class InputError(FedbioError):
    """The input, the settings or this machine stand in the way."""

    exit_code = 2


class SettingsError(InputError):
    """A settings file is wrong; the message lists every problem, one line each."""


class DataError(InputError):
    """A sequence file, a label or an embeddings file is wrong."""


class FormatError(DataError):
    """A file's format is unknown, damaged, or of a version that this release cannot read."""


class MachineError(InputError):
    """This machine stands in the way: a full disk, a port in use, a missing device."""


class TransportError(FedbioError):
    """A peer or the network failed past all retries."""

    exit_code = 3


class PeerUnreachable(TransportError):
    """A peer did not answer within the total deadline; trying again later may help."""


class ProtocolError(TransportError):
    """A peer sent a malformed, oversized or out-of-order message."""


class FederationError(FedbioError):
    """A round or a job cannot complete."""

    exit_code = 3


class ScriptError(FederationError):
    """A training script has failed.

    Parameters
    ----------
    message : str
        How, on one line.
    last_lines : sequence of str
        Of what it has written, the lines that the server may have.
    """

    def __init__(self, message: str, last_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.last_lines = tuple(last_lines)


class RefusedError(FedbioError):
    """A certificate, an identity or a policy was refused; never tried again."""

    exit_code = 4
