"""How a site introduces itself to other sites through a server that they need not trust.

A site signs its ephemeral public key, and what it is for, with the key of its certificate, and sends the certificate
along. Who gets the introduction checks the certificate against the federation's authority, the name in it, and the
signature. A server can hold introductions back; it cannot make one or change one.
"""

from __future__ import annotations

__all__ = ["Introduction", "Statement", "federation_of", "fingerprint", "introduce", "read_introduction"]

import datetime

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedbio.errors import RefusedError
from fedbio.federation.identity import SiteIdentity
from fedbio.federation.workflows.swarm_words import MAX_INTRODUCTION_BYTES

_PURPOSE = b"fedbio: a site introduces itself to others, 1\n"
"""Before every statement that is signed: no signature for another purpose passes as one of these."""


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What a site says of itself for one exchange.

    Parameters
    ----------
    federation, job, run, site : str
    exchange : int
        Its number in the run; each has keys of its own.
    examples : int
        How many examples the site has registered: the most weight that its update may have.
    key : bytes
        The public half of its ephemeral key pair.
    """

    federation: str
    job: str
    run: str
    exchange: int
    site: str
    examples: int
    key: bytes


class Introduction(msgspec.Struct, frozen=True, array_like=True):
    """A statement as it was signed, the signature, and the certificate (DER) whose key signed it."""

    statement: bytes
    signature: bytes
    certificate: bytes


def introduce(statement: Statement, identity: SiteIdentity) -> bytes:
    """Return the signed introduction."""
    text = msgspec.msgpack.encode(statement)
    return msgspec.msgpack.encode(Introduction(text, identity.sign(_PURPOSE + text), identity.certificate()))


def federation_of(identity: SiteIdentity) -> str:
    """Return the federation in a site's own certificate."""
    return _name(x509.load_der_x509_certificate(identity.certificate()), NameOID.ORGANIZATION_NAME)


def read_introduction(
    introduction: bytes, authority: bytes, *, federation: str, job: str, run: str, exchange: int, site: str
) -> Statement:
    """Return what a site says of itself, once it is certain that the site says so, and for this exchange.

    Parameters
    ----------
    introduction : bytes
        As it came.
    authority : bytes
        The certificate of the federation's authority, PEM.
    federation, job, run, exchange, site
        What the statement must say.

    Raises
    ------
    RefusedError
        If the certificate is not in force, of another authority or another party, or the signature is not of its key,
        or the statement is for something else; names the site and the reason.
    """
    try:
        if len(introduction) > MAX_INTRODUCTION_BYTES:
            raise RefusedError(f"{len(introduction)} bytes, at most {MAX_INTRODUCTION_BYTES} are allowed")
        found = msgspec.msgpack.decode(introduction, type=Introduction)
        certificate = x509.load_der_x509_certificate(found.certificate)
        key = _checked_key(certificate, x509.load_pem_x509_certificate(authority), federation, site)
        key.verify(found.signature, _PURPOSE + found.statement, ec.ECDSA(hashes.SHA256()))
        statement = msgspec.msgpack.decode(found.statement, type=Statement)
    except RefusedError as error:
        raise RefusedError(f"the introduction of {site} is refused: {error}") from error
    except InvalidSignature as error:
        raise RefusedError(
            f"the introduction of {site} is refused: the signature is not of its certificate's key; somebody between "
            "the sites has put in a key"
        ) from error
    except (ValueError, TypeError, msgspec.MsgspecError) as error:
        raise RefusedError(f"the introduction of {site} is refused: it cannot be read") from error
    expected = {"federation": federation, "job": job, "run": run, "exchange": exchange, "site": site}
    for field, value in expected.items():
        if (said := getattr(statement, field)) != value:
            raise RefusedError(
                f"the introduction of {site} is refused: it was signed for {field} {said!r}, not {value!r}; somebody "
                "between the sites has sent another one"
            )
    return statement


def fingerprint(introduction: bytes) -> str:
    """Return the SHA-256 of the certificate in an introduction that was read: what sites may compare by telephone."""
    found = msgspec.msgpack.decode(introduction, type=Introduction)
    return x509.load_der_x509_certificate(found.certificate).fingerprint(hashes.SHA256()).hex()


def _checked_key(
    certificate: x509.Certificate, authority: x509.Certificate, federation: str, site: str
) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate that is in force, of this authority, and of this site."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise RefusedError("its certificate is of a foreign authority") from error
    now = datetime.datetime.now(datetime.UTC)
    for whose, each in (("its", certificate), ("the authority's", authority)):
        if now > each.not_valid_after_utc:
            raise RefusedError(f"{whose} certificate expired on {each.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
        if now < each.not_valid_before_utc:
            raise RefusedError(f"{whose} certificate is valid only from {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    named, member = _name(certificate, NameOID.COMMON_NAME), _name(certificate, NameOID.ORGANIZATION_NAME)
    if named != site:
        raise RefusedError(f"its certificate is that of {named!r}")
    if member != federation:
        raise RefusedError(f"its certificate is of federation {member!r}, not {federation!r}")
    try:
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        raise RefusedError("its certificate does not say what its key is for") from error
    if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes or not usage.digital_signature:
        # a server's certificate is of the same authority
        raise RefusedError("its certificate is not a site's")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise RefusedError("its certificate's key is not an elliptic curve key; it needs a new start-up kit")
    return key


def _name(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    names = certificate.subject.get_attributes_for_oid(oid)
    if len(names) != 1:
        raise RefusedError(f"its certificate gives {len(names)} names ({oid._name}), expected one")
    return str(names[0].value)
