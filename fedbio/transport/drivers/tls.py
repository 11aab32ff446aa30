"""TLS as all drivers use it: both ends show certificates, and what goes wrong is said so that a person can act."""

from __future__ import annotations

__all__ = ["common_name", "context", "diagnose", "explain"]

import socket
import ssl
import time
from typing import Any

from fedbio.errors import RefusedError
from fedbio.transport.credentials import Credentials, Identity
from fedbio.transport.drivers.addresses import connect, split

_THEIRS = {
    9: "is not yet valid; check this machine's clock",
    10: "has expired; the coordinator must renew it",
    18: "is of a foreign authority (signed by itself)",
    19: "is of a foreign authority",
    20: "is of a foreign authority",
    21: "is of a foreign authority",
    26: "is not a server's",
    62: "is not for this host name",
    64: "is not for this IP address",
}
"""OpenSSL's numbers for what is wrong with the certificate that the server shows."""


def context(credentials: Credentials, alpn: str, *, listening: bool) -> ssl.SSLContext:
    """Return how one end proves itself and whom it believes: TLS 1.3, and the federation's authority alone."""
    credentials.read()  # names a file that is missing
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listening else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_mode = ssl.CERT_REQUIRED
    made.set_alpn_protocols([alpn])
    if listening:
        made.num_tickets = 0  # a site dials anew after hours, and proves itself anew
    else:
        made.hostname_checks_common_name = False
    try:
        made.load_verify_locations(credentials.ca)
        made.load_cert_chain(credentials.certificate, credentials.key)
    except ssl.SSLError:
        credentials.check()  # names the file and what is wrong with it
        raise
    return made


def common_name(certificate: dict[str, Any] | None) -> str:
    """Return the one party that a verified certificate names."""
    subject = (certificate or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    if len(names) != 1:
        raise RefusedError("the certificate must name one party")
    return str(names[0])


def explain(error: Exception, address: str, credentials: Identity) -> str:
    """Return in words why a server could not be reached, if that may pass.

    Raises
    ------
    RefusedError
        If one of the two ends does not take the other's certificate: no further try will help.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        fault = _THEIRS.get(error.verify_code, f"was not accepted ({error.verify_message})")
        raise RefusedError(
            f"server {address}: its certificate {fault}; check the address, and that the kit is of this federation"
        ) from error
    if isinstance(error, ssl.SSLError) and "alert" not in (reason := _reason(error)):
        return f"no TLS there: {reason}"
    if isinstance(error, EOFError) and error.args:
        return str(error)
    if isinstance(error, ssl.SSLError | EOFError):
        # with TLS 1.3 the server judges our certificate after our handshake
        if isinstance(credentials, Credentials):
            credentials.check()
            return "it hung up on seeing our certificate, which is in order here; is the server's clock right?"
        return "it hung up; does it expect a certificate, or another driver?"
    if isinstance(error, socket.gaierror):
        return f"host name {split(address)[0]!r} is not known"
    if isinstance(error, TimeoutError):
        return "no answer"
    return (getattr(error, "strerror", None) or str(error)).lower()


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


def diagnose(address: str, credentials: Identity, alpn: str, timeout_s: float) -> str | None:
    """Dial once more with the standard library, which names causes where gRPC does not; see `explain`."""
    host, port = split(address)
    try:
        with connect(host, port, time.monotonic() + timeout_s) as plain:
            if not isinstance(credentials, Credentials):
                raise EOFError
            with context(credentials, alpn, listening=False).wrap_socket(plain, server_hostname=host) as secure:
                if secure.recv(1):
                    return None
                raise EOFError
    except (OSError, EOFError) as error:
        return explain(error, address, credentials)
