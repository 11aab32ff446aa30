"""What a party proves itself with, checked here before anyone is dialled."""

from __future__ import annotations

__all__ = ["Credentials", "Identity", "Unencrypted"]

import datetime
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedbio.errors import RefusedError, SettingsError

if TYPE_CHECKING:
    from cryptography import x509

REMEDY = "ask the coordinator for a new start-up kit"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Three PEM files: the federation's authority, the party's own certificate, and its private key."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def from_kit(cls, folder: str | os.PathLike[str]) -> Credentials:
        """Return the credentials in a start-up kit."""
        kit = Path(folder)
        return cls(kit / "ca.pem", kit / "certificate.pem", kit / "private.key")

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Return the content of the three files."""
        try:
            return self.ca.read_bytes(), self.certificate.read_bytes(), self.key.read_bytes()
        except OSError as error:
            raise SettingsError(f"{error.filename}: {error.strerror}; give the folder of a start-up kit") from error

    def check(self) -> str:
        """Return the party's name, after checking that the certificate is in force, of this authority, and has its key.

        Raises
        ------
        RefusedError
            Naming the file and what is wrong: expired, not yet valid, of a foreign authority, or another's key.
        SettingsError
            If a file is missing or is no PEM file.
        """
        # imported here: only who checks credentials pays for the import
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization

        ca_pem, certificate_pem, key_pem = self.read()
        try:
            path = self.ca
            authority = x509.load_pem_x509_certificate(ca_pem)
            path = self.certificate
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            path = self.key
            key = serialization.load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError) as error:
            raise SettingsError(f"{path}: not a readable PEM file; {REMEDY}") from error
        _check_dates(self.ca, authority)
        _check_dates(self.certificate, certificate)
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise RefusedError(
                f"{self.certificate}: the certificate is of a foreign authority, not of {self.ca}; {REMEDY}"
            ) from error
        if key.public_key() != certificate.public_key():
            raise RefusedError(f"{self.key}: the key does not belong to {self.certificate}; {REMEDY}")
        return _common_name(self.certificate, certificate)


@dataclass(frozen=True, slots=True)
class Unencrypted:
    """A name that nothing proves: for links that are private already (a VPN, one machine), tests and benchmarks.

    Both ends must be given one: a listener with certificates takes no plain peer, and a plain one no other.
    """

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.name):
            raise SettingsError(f"name: expected 1 to 64 letters, digits, dots or hyphens, found {self.name[:64]!r}")

    def check(self) -> str:
        """Return the party's name."""
        return self.name


Identity = Credentials | Unencrypted
"""What either end of a connection is given."""


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise RefusedError(f"{path}: the certificate expired on {_day(certificate.not_valid_after_utc)}; {REMEDY}")
    if now < certificate.not_valid_before_utc:
        raise RefusedError(
            f"{path}: the certificate is not yet valid, only from {_day(certificate.not_valid_before_utc)}; "
            f"check this machine's clock (now {_day(now)}), else {REMEDY}"
        )


def _day(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _common_name(path: Path, certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise RefusedError(f"{path}: the certificate names {len(names)} parties, expected one; {REMEDY}")
    return str(names[0].value)
