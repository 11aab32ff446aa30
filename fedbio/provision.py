"""Make a federation's certificate authority and one start-up kit per party; what exists is kept."""

from __future__ import annotations

__all__ = ["provision"]

import datetime
import ipaddress
import os
from pathlib import Path
from typing import NamedTuple

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedbio.errors import SettingsError
from fedbio.files import exclusive_lock, whole_file, write_whole
from fedbio.settings import FederationFile, KitFile, load
from fedbio.transport import drivers

AUTHORITY_DAYS = 3650
CLOCK_SKEW = datetime.timedelta(minutes=10)
"""How far a party's clock may lag behind the coordinator's on the day of the kits."""


class _Identity(NamedTuple):
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def provision(settings: FederationFile, out: str | os.PathLike[str]) -> list[Path]:
    """Make the authority and the kits that are not there yet.

    Parameters
    ----------
    settings : FederationFile
        Who takes part.
    out : path-like
        Gets ``ca/`` (the authority: it never leaves the coordinator) and one folder per party with ``ca.pem``,
        ``certificate.pem``, ``private.key`` (readable by its owner only) and ``kit.yaml``.

    Returns
    -------
    list of Path
        The kits made now; those that exist keep their certificate and key. If the driver has changed, it changes in all
        kits.

    Raises
    ------
    SettingsError
        If two parties have one name, no driver has the name, or `out` holds the kits of another federation.
    """
    folder = Path(out)
    parties = [settings.server.name, *settings.sites, *([settings.admin] if settings.admin else [])]
    for name in parties:
        if name == "ca" or parties.count(name) > 1:
            raise SettingsError(f"party {name!r}: the name is taken; give every party its own, and none the name 'ca'")
    if settings.driver == "memory":
        raise SettingsError("driver: memory joins the two ends of one process; choose grpc, tcp or http")
    drivers.load(settings.driver)  # a name that is misspelt shall not go into the kits
    with exclusive_lock(folder / ".lock", f"{folder}"):
        authority = _authority(settings.federation, folder / "ca")
        missing = [name for name in parties if not (folder / name / "kit.yaml").exists()]
        made = [_make_kit(folder / name, name, settings, authority) for name in missing]
        for name in parties:
            if name not in missing and _is_outdated(folder / name, name, settings, added=bool(made)):
                _write_kit_file(folder / name, name, settings)
        return made


def _is_outdated(kit: Path, name: str, settings: FederationFile, *, added: bool) -> bool:
    """Whether a kit's file, not its certificate and key, has to say something else."""
    found = load(kit / "kit.yaml", KitFile)
    # sites that joined later: the server has to expect them
    is_server = name == settings.server.name
    return found.driver != settings.driver or (is_server and (added or found.admin != settings.admin))


def _authority(federation: str, folder: Path) -> _Identity:
    """Return the authority in `folder`, made now if there is none."""
    subject = _subject(federation, "fedbio CA")
    if (folder / "ca.pem").exists():
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "private.key").read_bytes(), password=None)
        if certificate.subject != subject or not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SettingsError(
                f"{folder}: the authority of another federation ({certificate.subject.rfc4514_string()}), not of "
                f"{federation!r}; choose another folder"
            )
        return _Identity(certificate, key)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(subject, subject, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_key(folder / "private.key", key)
    write_whole(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    return _Identity(certificate, key)


def _make_kit(kit: Path, name: str, settings: FederationFile, authority: _Identity) -> Path:
    """Write one party's kit; ``kit.yaml`` comes last, so that a kit with one is whole."""
    is_server = name == settings.server.name
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(settings.federation, name)
    # a site's certificate is no server's: no site can play the server for another
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(subject, authority.certificate.subject, key, settings.valid_days, authority.certificate)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if is_server:
        builder = builder.add_extension(x509.SubjectAlternativeName(_server_names(settings)), critical=False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    _write_key(kit / "private.key", key)
    write_whole(kit / "certificate.pem", certificate.public_bytes(serialization.Encoding.PEM))
    write_whole(kit / "ca.pem", authority.certificate.public_bytes(serialization.Encoding.PEM))
    _write_kit_file(kit, name, settings)
    return kit


def _write_kit_file(kit: Path, name: str, settings: FederationFile) -> None:
    is_server = name == settings.server.name
    content = KitFile(
        federation=settings.federation,
        party=name,
        role="server" if is_server else "admin" if name == settings.admin else "site",
        server=settings.server.address,
        server_name=settings.server.name,
        driver=settings.driver,
        sites=settings.sites if is_server else [],
        admin=settings.admin if is_server else None,
    )
    write_whole(kit / "kit.yaml", yaml.safe_dump(content.model_dump(), sort_keys=False))


def _server_names(settings: FederationFile) -> list[x509.GeneralName]:
    """Return every host name and address under which the sites may reach the server."""
    host = settings.server.address.rpartition(":")[0].strip("[]")
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys([host, *settings.server.also]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    return names


def _subject(federation: str, name: str) -> x509.Name:
    attributes = {NameOID.ORGANIZATION_NAME: federation, NameOID.COMMON_NAME: name}
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes.items()])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    authority: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(min(end, authority.not_valid_after_utc) if authority else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a private key that nobody but its owner can read at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with whole_file(path) as beside, open(os.open(beside, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(pem)
