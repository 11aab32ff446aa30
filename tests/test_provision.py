from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from cryptography import x509

from fedbio.cli import main
from fedbio.errors import SettingsError
from fedbio.provision import provision
from fedbio.settings import FederationFile, KitFile, load
from fedbio.transport import Credentials


def federation(*sites: str, name: str = "demo", **more: object) -> FederationFile:
    server = {"address": "fed.example.org:8443", "also": ["localhost", "127.0.0.1"]}
    return FederationFile(federation=name, server=server, sites=list(sites), **more)


def certificate(kit: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((kit / "certificate.pem").read_bytes())


def test_every_party_gets_a_whole_kit_and_the_authority_stays_apart(tmp_path: Path) -> None:
    made = provision(federation("site-1", "site-2"), tmp_path)
    assert made == [tmp_path / "server", tmp_path / "site-1", tmp_path / "site-2", tmp_path / "admin"]
    for kit in made:
        assert sorted(path.name for path in kit.iterdir()) == ["ca.pem", "certificate.pem", "kit.yaml", "private.key"]
        assert (kit / "private.key").stat().st_mode & 0o777 == 0o600
        assert Credentials.from_kit(kit).check() == kit.name
    assert (tmp_path / "ca" / "private.key").stat().st_mode & 0o777 == 0o600
    assert load(tmp_path / "site-2" / "kit.yaml", KitFile) == KitFile(
        federation="demo", party="site-2", role="site", server="fed.example.org:8443"
    )
    assert load(tmp_path / "server" / "kit.yaml", KitFile).sites == ["site-1", "site-2"]


def test_administrator_is_known_to_the_server_by_the_name_that_the_federation_file_gives(tmp_path: Path) -> None:
    assert provision(federation("site-1", admin=None), tmp_path) == [tmp_path / "server", tmp_path / "site-1"]
    assert load(tmp_path / "server" / "kit.yaml", KitFile).admin is None
    # named later: its kit is made and the server hears of it
    assert provision(federation("site-1", admin="chief"), tmp_path) == [tmp_path / "chief"]
    assert load(tmp_path / "server" / "kit.yaml", KitFile).admin == "chief"
    assert load(tmp_path / "server" / "kit.yaml", KitFile).sites == ["site-1"]
    assert load(tmp_path / "chief" / "kit.yaml", KitFile).role == "admin"
    with pytest.raises(ValueError, match="admin: 'site-1' is the name of another party"):
        federation("site-1", admin="site-1")


def test_certificates_say_what_each_party_may_do(tmp_path: Path) -> None:
    provision(federation("site-1", valid_days=30), tmp_path)
    server, site = certificate(tmp_path / "server"), certificate(tmp_path / "site-1")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    purposes = [
        [use.dotted_string for use in each.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value]
        for each in (server, site)
    ]
    assert purposes == [["1.3.6.1.5.5.7.3.1"], ["1.3.6.1.5.5.7.3.2"]]
    left = site.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29, hours=23) < left <= datetime.timedelta(days=30)


def test_second_call_changes_nothing_and_a_new_party_is_added(tmp_path: Path) -> None:
    provision(federation("site-1"), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert provision(federation("site-1"), tmp_path) == []
    assert provision(federation("site-1", "site-2"), tmp_path) == [tmp_path / "site-2"]
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert changed == [tmp_path / "server" / "kit.yaml"]
    assert load(tmp_path / "server" / "kit.yaml", KitFile).sites == ["site-1", "site-2"]
    assert Credentials.from_kit(tmp_path / "site-2").check() == "site-2"


def test_driver_goes_into_every_kit_and_changes_in_all_of_them(tmp_path: Path) -> None:
    provision(federation("site-1"), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert provision(federation("site-1", driver="tcp"), tmp_path) == []
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert sorted(changed) == [tmp_path / party / "kit.yaml" for party in ("admin", "server", "site-1")]
    assert [load(path, KitFile).driver for path in changed] == ["tcp", "tcp", "tcp"]


def test_driver_that_nobody_offers_does_not_go_into_kits(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"driver: expected one of grpc, tcp, .*found 'htpp'"):
        provision(federation("site-1", driver="htpp"), tmp_path)
    with pytest.raises(SettingsError, match="memory joins the two ends of one process"):
        provision(federation("site-1", driver="memory"), tmp_path)
    assert not (tmp_path / "site-1").exists()


def test_kit_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    provision(federation("site-1"), tmp_path)
    (tmp_path / "site-1" / "kit.yaml").unlink()
    assert provision(federation("site-1"), tmp_path) == [tmp_path / "site-1"]
    assert Credentials.from_kit(tmp_path / "site-1").check() == "site-1"


def test_folder_of_another_federation_is_refused(tmp_path: Path) -> None:
    provision(federation("site-1"), tmp_path)
    with pytest.raises(SettingsError, match="the authority of another federation"):
        provision(federation("site-1", name="other"), tmp_path)


def test_the_name_of_the_authority_is_taken(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="party 'ca': the name is taken"):
        provision(federation("ca"), tmp_path)


def test_command_says_what_to_hand_to_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "federation.yaml"
    settings.write_text("federation: demo\nserver: {address: 'localhost:8443'}\nsites: [site-1]\n")
    assert main(["provision", str(settings), "-o", str(tmp_path / "kits")]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/kits/site-1  to whoever runs site-1" in shown
    assert main(["provision", str(settings), "-o", str(tmp_path / "kits"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"made": [], "authority": f"{tmp_path}/kits/ca"}


@pytest.mark.parametrize("name", ["../etc", "Site 1", "site_1", "", "-site", "a" * 64])
def test_name_that_could_be_a_path_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "federation.yaml"
    settings.write_text(f"federation: demo\nserver: {{address: 'localhost:8443'}}\nsites: ['{name}']\n")
    assert main(["provision", str(settings), "-o", str(tmp_path / "kits")]) == 2
    assert "sites.0: expected lower-case letters, digits and hyphens" in capsys.readouterr().err
