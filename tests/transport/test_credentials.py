"""Expired, premature and foreign certificates, seen from both ends, over real TLS."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedbio.errors import PeerUnreachable, RefusedError, SettingsError
from fedbio.transport import Credentials, Limits, ServerEndpoint, SiteEndpoint
from fedbio.transport.drivers import Connection, Listener, load

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def reissued(kits: Path, party: str, folder: Path, begin: datetime.datetime, end: datetime.datetime) -> Credentials:
    """Copy a kit and let the same authority sign the same certificate for another time."""
    kit = Path(shutil.copytree(kits / party, folder / party))
    old = x509.load_pem_x509_certificate((kit / "certificate.pem").read_bytes())
    authority = serialization.load_pem_private_key((kits / "ca" / "private.key").read_bytes(), password=None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, old.public_key(), x509.random_serial_number(), begin, end, list(old.extensions)
    )
    new = builder.sign(authority, hashes.SHA256())
    (kit / "certificate.pem").write_bytes(new.public_bytes(serialization.Encoding.PEM))
    return Credentials.from_kit(kit)


@pytest.fixture
def listener(kits: Path) -> Iterator[Listener]:
    listener = load("grpc").listen("127.0.0.1:0", Credentials.from_kit(kits / "server"), Limits())
    accepted: list[Connection] = []
    listener.start(accepted.append)
    yield listener
    listener.close()
    assert accepted == []


def test_sound_kit_gives_its_name(kits: Path) -> None:
    assert Credentials.from_kit(kits / "site-1").check() == "site-1"


def test_expired_certificate_is_refused_before_dialling(kits: Path, tmp_path: Path) -> None:
    expired = reissued(kits, "site-1", tmp_path, NOW - 30 * DAY, NOW - DAY)
    with pytest.raises(RefusedError, match=r"certificate\.pem: the certificate expired on 20..-..-.. ..:.. UTC; ask"):
        SiteEndpoint("127.0.0.1:1", expired, spool=tmp_path, on_message=print)


def test_certificate_of_tomorrow_is_refused_before_dialling(kits: Path, tmp_path: Path) -> None:
    early = reissued(kits, "site-1", tmp_path, NOW + DAY, NOW + 30 * DAY)
    with pytest.raises(
        RefusedError, match=r"the certificate is not yet valid, only from .* check this machine's clock"
    ):
        SiteEndpoint("127.0.0.1:1", early, spool=tmp_path, on_message=print)


def test_expired_server_certificate_is_refused_at_the_server(kits: Path, tmp_path: Path) -> None:
    expired = reissued(kits, "server", tmp_path, NOW - 30 * DAY, NOW - DAY)
    with pytest.raises(RefusedError, match="the certificate expired on"):
        ServerEndpoint("127.0.0.1:0", expired, spool=tmp_path, on_message=print)


def test_mixed_kit_is_refused_before_dialling(kits: Path, foreign_kits: Path) -> None:
    site, foreign = Credentials.from_kit(kits / "site-1"), Credentials.from_kit(foreign_kits / "site-1")
    with pytest.raises(RefusedError, match="the certificate is of a foreign authority, not of"):
        Credentials(site.ca, foreign.certificate, foreign.key).check()
    with pytest.raises(RefusedError, match=r"private\.key: the key does not belong to"):
        Credentials(site.ca, site.certificate, foreign.key).check()


def test_missing_or_damaged_file_is_named(kits: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"ca\.pem: No such file or directory; give the folder of a start-up kit"):
        Credentials.from_kit(tmp_path).check()
    kit = Path(shutil.copytree(kits / "site-1", tmp_path / "kit"))
    (kit / "private.key").write_text("not a key")
    with pytest.raises(SettingsError, match=r"private\.key: not a readable PEM file"):
        Credentials.from_kit(kit).check()


def dial(listener: Listener, credentials: Credentials, host: str = "127.0.0.1") -> None:
    load("grpc").dial(f"{host}:{listener.address.rpartition(':')[2]}", credentials, 5.0)


def test_server_refuses_a_foreign_site_and_says_so(listener: Listener, kits: Path, foreign_kits: Path) -> None:
    foreign = Credentials.from_kit(foreign_kits / "site-1")
    with pytest.raises(RefusedError, match=r"certificate\.pem: the certificate is of a foreign authority"):
        dial(listener, Credentials(kits / "site-1" / "ca.pem", foreign.certificate, foreign.key))


def test_server_refuses_an_expired_site_and_says_so(listener: Listener, kits: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"certificate\.pem: the certificate expired on"):
        dial(listener, reissued(kits, "site-1", tmp_path, NOW - 30 * DAY, NOW - DAY))


def test_server_refuses_a_premature_site_and_says_so(listener: Listener, kits: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"certificate\.pem: the certificate is not yet valid"):
        dial(listener, reissued(kits, "site-1", tmp_path, NOW + DAY, NOW + 30 * DAY))


def test_site_refuses_a_foreign_server(listener: Listener, foreign_kits: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"server 127.*: its certificate is of a foreign authority; check the address"
    ):
        dial(listener, Credentials.from_kit(foreign_kits / "site-1"))


def serving(credentials: Credentials, address: str = "127.0.0.1:0") -> Listener:
    listener = load("grpc").listen(address, credentials, Limits())
    listener.start(lambda connection: None)
    return listener


@pytest.mark.parametrize(
    ("begin", "end", "text"),
    [
        (NOW - 30 * DAY, NOW - DAY, "its certificate has expired; the coordinator must renew it"),
        (NOW + DAY, NOW + 30 * DAY, "its certificate is not yet valid; check this machine's clock"),
    ],
)
def test_site_refuses_a_server_out_of_date(
    kits: Path, tmp_path: Path, begin: datetime.datetime, end: datetime.datetime, text: str
) -> None:
    listener = serving(reissued(kits, "server", tmp_path, begin, end))
    with pytest.raises(RefusedError, match=text):
        dial(listener, Credentials.from_kit(kits / "site-1"))
    listener.close()


def test_site_refuses_another_site_that_plays_the_server(kits: Path) -> None:
    listener = serving(Credentials.from_kit(kits / "site-2"))
    with pytest.raises(RefusedError, match=r"its certificate is not (for this IP address|a server's)"):
        dial(listener, Credentials.from_kit(kits / "site-1"))
    listener.close()


def test_site_refuses_a_server_under_another_host_name(kits: Path) -> None:
    listener = serving(Credentials.from_kit(kits / "server"), "0.0.0.0:0")
    with pytest.raises(RefusedError, match="its certificate is not for this IP address"):
        dial(listener, Credentials.from_kit(kits / "site-1"), host="127.0.0.2")
    listener.close()


def test_port_that_speaks_no_tls_is_said_to(kits: Path, tmp_path: Path) -> None:
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as plain:

        def serve() -> None:
            while True:
                try:
                    peer, _ = plain.accept()
                except OSError:
                    return
                with peer:
                    peer.sendall(b"220 mail.example.org ESMTP\r\n")

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{plain.getsockname()[1]}"
        site = SiteEndpoint(
            address,
            Credentials.from_kit(kits / "site-1"),
            spool=tmp_path,
            on_message=print,
            connect_deadline_s=0.5,
        )
        with pytest.raises(PeerUnreachable, match=rf"server {address} not reached within 0.5 s \(last: no TLS there"):
            site.start()
        plain.shutdown(socket.SHUT_RDWR)
