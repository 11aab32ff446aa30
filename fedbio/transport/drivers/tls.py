"""Say why a server could not be reached or a port not be taken, in words that a person can act on."""

from __future__ import annotations

__all__ = ["diagnose", "why_not_bound"]

import errno
import socket

from fedbio.errors import FedbioError, MachineError, RefusedError
from fedbio.transport.credentials import Credentials

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


def diagnose(address: str, credentials: Credentials, timeout_s: float) -> str | None:
    """Dial once more with the standard library, which names causes; return one that may pass.

    Raises
    ------
    RefusedError
        If one of the two ends does not take the other's certificate: no further try will help.
    """
    import ssl

    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cafile=str(credentials.ca))
    context.load_cert_chain(credentials.certificate, credentials.key)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), timeout=min(timeout_s, 5.0)) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            # with TLS 1.3 the server judges our certificate after our handshake; gRPC then hangs up without a word
            if secure.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        fault = _THEIRS.get(error.verify_code, f"was not accepted ({error.verify_message})")
        raise RefusedError(
            f"server {address}: its certificate {fault}; check the address, and that the kit is of this federation"
        ) from error
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        if "alert" not in reason:
            return f"no TLS there: {reason}"
    except socket.gaierror:
        return f"host name {host!r} is not known"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    credentials.check()
    return "it hung up on seeing our certificate, which is in order here; is the server's clock right?"


def why_not_bound(host: str, port: int) -> FedbioError:
    """Return the error for an address that could not be taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return MachineError(
                f"port {port} is in use on this machine; stop what uses it (ss -ltnp shows it) or choose another"
            )
        return MachineError(f"{host}:{port} cannot be listened on ({error.strerror}); check the address")
    return MachineError(f"{host}:{port} cannot be listened on; check the address")
