"""What sites seal for each other: it opens for the one it is for, whole, and for nobody else."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbio.errors import ProtocolError, RefusedError
from fedbio.federation import introductions
from fedbio.federation.identity import SiteIdentity
from fedbio.federation.introductions import Introduction, Statement, introduce, read_introduction
from fedbio.federation.sealed import CHUNK_BYTES, Key, Pair, opened_size, seal, sealed_size, unseal
from fedbio.federation.swarm_mail import Mail
from fedbio.provision import provision
from fedbio.settings import FederationFile
from fedbio.transport import Credentials

HEAD, STEP = 48, CHUNK_BYTES + 16
KEY = Key.of(b"s" * 32, b"test")


def sealed(plain: bytes, key: Key = KEY) -> bytes:
    return b"".join(seal([plain], key))


def opened(found: bytes, key: Key = KEY) -> bytes:
    return b"".join(unseal([found], key))


def chunk(found: bytes, number: int) -> bytes:
    return found[HEAD + number * STEP : HEAD + (number + 1) * STEP]


# streams


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=8), st.data())
def test_what_is_sealed_opens_however_it_is_cut(pieces: list[bytes], data: st.DataObject) -> None:
    plain = b"".join(pieces)
    found = b"".join(seal(pieces, KEY))
    assert len(found) == sealed_size(len(plain))
    assert opened_size(len(found)) == len(plain)
    cut = data.draw(st.integers(0, len(found)))
    assert b"".join(unseal([found[:cut], found[cut:]], KEY)) == plain


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_sizes_around_a_chunk(size: int) -> None:
    plain = np.random.default_rng(size).bytes(size)
    found = sealed(plain)
    assert len(found) == sealed_size(size)
    assert opened_size(len(found)) == size
    assert opened(found) == plain


@pytest.mark.parametrize("size", [0, 15, 48, 63, HEAD + STEP + 1, HEAD + STEP + 15])
def test_sizes_that_nothing_has_are_refused_before_memory_is_taken(size: int) -> None:
    with pytest.raises(ProtocolError, match="no whole sealed message"):
        opened_size(size)


def test_sealing_and_opening_hold_one_chunk_at_a_time() -> None:
    taken = []

    def pieces() -> Any:
        for number in range(64):
            taken.append(number)
            yield bytes(CHUNK_BYTES)

    stream = unseal(seal(pieces(), KEY), KEY)
    next(stream)
    # each end looks one chunk ahead, to know the last one
    assert len(taken) <= 4


def test_one_plain_text_is_never_sealed_the_same_way_twice() -> None:
    one, other = sealed(b"x" * 100), sealed(b"x" * 100)
    assert one[16:48] != other[16:48]
    assert one[48:] != other[48:]


PLAIN = np.random.default_rng(0).bytes(3 * CHUNK_BYTES + 100)
SEALED = sealed(PLAIN)
TAMPERED: dict[str, Callable[[bytes], bytes]] = {
    "last chunk missing": lambda s: s[: HEAD + 3 * STEP],
    "end cut off": lambda s: s[:-1],
    "cut within the first chunk": lambda s: s[: HEAD + 100],
    "only the head": lambda s: s[:HEAD],
    "cut within the head": lambda s: s[:40],
    "nothing": lambda s: b"",
    "longer": lambda s: s + b"\0",
    "chunks swapped": lambda s: s[:HEAD] + chunk(s, 1) + chunk(s, 0) + s[HEAD + 2 * STEP :],
    "chunk doubled": lambda s: s[:HEAD] + chunk(s, 0) + s[HEAD:],
    "chunk left out": lambda s: s[:HEAD] + s[HEAD + STEP :],
    "last chunk twice": lambda s: s + chunk(s, 3),
    "another version": lambda s: b"fedbio sealed 2\n" + s[16:],
    "another stream's head": lambda s: sealed(PLAIN)[:HEAD] + s[HEAD:],
    "another stream's chunk": lambda s: s[: HEAD + STEP] + chunk(sealed(PLAIN), 1) + s[HEAD + 2 * STEP :],
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_tampered_stream_does_not_open(kind: str) -> None:
    assert opened(SEALED) == PLAIN
    with pytest.raises(ProtocolError):
        opened(TAMPERED[kind](SEALED))


@settings(max_examples=120, deadline=None)
@given(st.integers(0, sealed_size(300) * 8 - 1))
def test_every_flipped_bit_is_found(bit: int) -> None:
    found = bytearray(sealed(b"p" * 300))
    found[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        opened(bytes(found))


def test_nothing_of_a_chunk_comes_out_before_it_is_authenticated() -> None:
    found = bytearray(SEALED)
    found[HEAD + STEP + 5] ^= 1
    stream = unseal([bytes(found)], KEY)
    assert next(stream) == PLAIN[:CHUNK_BYTES]
    with pytest.raises(ProtocolError, match="chunk 1 does not open"):
        next(stream)


# pairs


def test_only_the_receiver_opens_and_only_in_the_right_direction_and_context() -> None:
    a, b, stranger = Pair.make(), Pair.make(), Pair.make()
    found = sealed(b"update", a.to(b.public, b"round 1"))
    assert opened(found, b.by(a.public, b"round 1")) == b"update"
    others = [
        b.by(a.public, b"round 2"),
        b.to(a.public, b"round 1"),
        b.by(stranger.public, b"round 1"),
        stranger.by(a.public, b"round 1"),
        a.by(b.public, b"round 1"),
    ]
    for key in others:
        with pytest.raises(ProtocolError, match="does not open"):
            opened(found, key)


def test_fields_of_a_context_cannot_run_into_each_other() -> None:
    a, b = Pair.make(), Pair.make()
    with pytest.raises(ProtocolError):
        opened(sealed(b"x", a.to(b.public, b"1", b"23")), b.by(a.public, b"12", b"3"))


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32), b"\1" + bytes(31)], ids=len)
def test_public_key_that_gives_a_known_secret_is_refused(public: bytes) -> None:
    with pytest.raises(RefusedError, match="not a public key"):
        Pair.make().to(public)


def test_keys_are_not_shown() -> None:
    assert "s" * 8 not in repr(KEY)


# introductions

EXPECTED = {"federation": "test", "job": "swarm", "run": "0" * 32, "exchange": 7, "site": "site-1"}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    for name in ("test", "other"):
        found = {"federation": name, "server": {"address": "localhost:1"}, "sites": ["site-1", "site-2", "site-3"]}
        provision(FederationFile.model_validate(found), folder / name)
    return folder


def identity(kits: Path, name: str, federation: str = "test") -> SiteIdentity:
    return SiteIdentity(Credentials.from_kit(kits / federation / name))


def statement(**changes: Any) -> Statement:
    return Statement(**{**EXPECTED, "examples": 30, "key": Pair.make().public, **changes})


def read(introduction: bytes, kits: Path, **changes: Any) -> Statement:
    return read_introduction(introduction, identity(kits, "site-2").authority(), **{**EXPECTED, **changes})


def test_introduction_says_what_its_site_signed(kits: Path) -> None:
    said = statement()
    assert read(introduce(said, identity(kits, "site-1")), kits) == said


@pytest.mark.parametrize(
    ("name", "federation", "reason"),
    [
        ("site-2", "test", "its certificate is that of 'site-2'"),
        ("server", "test", "its certificate is that of 'server'"),
        ("site-1", "other", "its certificate is of a foreign authority"),
    ],
)
def test_introduction_with_anothers_certificate_is_refused(kits: Path, name: str, federation: str, reason: str) -> None:
    with pytest.raises(RefusedError, match=f"the introduction of site-1 is refused: {reason}"):
        read(introduce(statement(), identity(kits, name, federation)), kits)


def test_certificate_of_another_federation_of_one_authority_is_refused(kits: Path) -> None:
    said = introduce(statement(federation="elsewhere"), identity(kits, "site-1"))
    with pytest.raises(RefusedError, match="its certificate is of federation 'test', not 'elsewhere'"):
        read(said, kits, federation="elsewhere")


def test_servers_certificate_is_no_sites_even_under_its_own_name(kits: Path) -> None:
    said = introduce(statement(site="server"), identity(kits, "server"))
    with pytest.raises(RefusedError, match="its certificate is not a site's"):
        read(said, kits, site="server")


@pytest.mark.parametrize(
    ("field", "value"),
    [("federation", "other"), ("job", "else"), ("run", "1" * 32), ("exchange", 6), ("site", "site-3")],
)
def test_signature_for_something_else_is_refused(kits: Path, field: str, value: Any) -> None:
    said = introduce(statement(**{field: value}), identity(kits, "site-1"))
    with pytest.raises(RefusedError, match=f"it was signed for {field}"):
        read(said, kits)


def changed(introduction: bytes, **changes: Any) -> bytes:
    found = msgspec.msgpack.decode(introduction, type=Introduction)
    return msgspec.msgpack.encode(msgspec.structs.replace(found, **changes))


def test_key_or_examples_that_somebody_put_in_are_refused(kits: Path) -> None:
    said = introduce(statement(), identity(kits, "site-1"))
    for other in (statement(), statement(examples=10**6)):
        with pytest.raises(RefusedError, match="the signature is not of its certificate's key; somebody between"):
            read(changed(said, statement=msgspec.msgpack.encode(other)), kits)


def test_signature_for_another_purpose_is_refused(kits: Path) -> None:
    site = identity(kits, "site-1")
    text = msgspec.msgpack.encode(statement())
    with pytest.raises(RefusedError, match="the signature"):
        read(changed(introduce(statement(), site), statement=text, signature=site.sign(text)), kits)


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"\x93\xc4\x01a\xc4\x01b\xc4\x01c", bytes(100_000)], ids=len)
def test_garbage_is_refused(kits: Path, garbage: bytes) -> None:
    with pytest.raises(RefusedError, match="the introduction of site-1 is refused"):
        read(garbage, kits)


def certificate(kits: Path, begin: int, end: int) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    """Return a certificate (DER) of site-1 by the federation's authority, in force between two days from today."""
    ca = x509.load_pem_x509_certificate((kits / "test/ca/ca.pem").read_bytes())
    ca_key = serialization.load_pem_private_key((kits / "test/ca/private.key").read_bytes(), None)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    original = x509.load_pem_x509_certificate((kits / "test/site-1/certificate.pem").read_bytes())
    builder = (
        x509.CertificateBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "test"),
                    x509.NameAttribute(NameOID.COMMON_NAME, "site-1"),
                ]
            )
        )
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + datetime.timedelta(days=begin))
        .not_valid_after(now + datetime.timedelta(days=end))
        .add_extension(original.extensions.get_extension_for_class(x509.KeyUsage).value, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )
    found = builder.sign(ca_key, hashes.SHA256())  # type: ignore[arg-type]
    return found.public_bytes(serialization.Encoding.DER), key


@pytest.mark.parametrize(("begin", "end", "reason"), [(-9, 9, ""), (-9, -1, "expired on"), (1, 9, "valid only from")])
def test_certificate_must_be_in_force(kits: Path, begin: int, end: int, reason: str) -> None:
    der, key = certificate(kits, begin, end)
    text = msgspec.msgpack.encode(statement())
    signature = key.sign(introductions._PURPOSE + text, ec.ECDSA(hashes.SHA256()))
    said = msgspec.msgpack.encode(Introduction(text, signature, der))
    if not reason:
        assert read(said, kits).examples == 30
        return
    with pytest.raises(RefusedError, match=f"its certificate {reason}|its certificate is {reason}"):
        read(said, kits)


# mail

PARAMS = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.float64)}


def mail(kits: Path, site: str, **changes: Any) -> Mail:
    options = {"job": "swarm", "run": "0" * 32, "exchange": 7, "examples": 30, **changes}
    return Mail(identity=identity(kits, site), site=site, **options)


def known(by: Mail, *others: Mail) -> list[Statement]:
    found = {each.site: each.introduction for each in others}
    return [by.read(each.site, found) for each in others]


def test_update_opens_for_its_receiver_in_its_round_only(kits: Path) -> None:
    one, two, three = (mail(kits, f"site-{number}") for number in (1, 2, 3))
    [to_two] = known(one, two)
    found = one.seal_update(PARAMS, 12.5, 3, to_two)
    [by_one, by_three] = known(two, one, three)
    params, weight = two.open_update(found, 3, by_one)
    assert weight == 12.5
    assert all(np.array_equal(params[name], value) for name, value in PARAMS.items())
    with pytest.raises(ProtocolError):
        two.open_update(found, 4, by_one)
    with pytest.raises(ProtocolError):
        two.open_update(found, 3, by_three)
    with pytest.raises(ProtocolError):
        three.open_update(found, 3, *known(three, one))


def test_model_is_sealed_once_and_opens_for_each_receiver(kits: Path) -> None:
    one, two, three = (mail(kits, f"site-{number}") for number in (1, 2, 3))
    found = one.seal_model(PARAMS, 1, known(one, two, three))
    for each in (two, three):
        params = each.open_model(found.model, found.keys[each.site], 1, *known(each, one))
        assert np.array_equal(params["w"], PARAMS["w"])
    with pytest.raises(ProtocolError):
        three.open_model(found.model, found.keys["site-2"], 1, *known(three, one))
    with pytest.raises(ProtocolError):
        two.open_model(found.model, found.keys["site-2"], 2, *known(two, one))


def test_receiver_of_a_model_cannot_forge_one_for_another(kits: Path) -> None:
    """Site-2 learns the content key; with a helpful server it still cannot seal another model for site-3."""
    one, two, three = (mail(kits, f"site-{number}") for number in (1, 2, 3))
    found = one.seal_model(PARAMS, 1, known(one, two, three))
    [by_one] = known(two, one)
    note = opened(found.keys["site-2"].tobytes(), two._key_by(by_one, "key", 1))
    text = b"".join(unseal([found.model.data], two._content(note[:32], 1)))
    forged = np.frombuffer(sealed(text.replace(b"\0\0\x80?", b"\0\0\0@"), two._content(note[:32], 1)), np.uint8)
    with pytest.raises(ProtocolError, match="the model is not the one that site-1 sealed"):
        three.open_model(forged, found.keys["site-3"], 1, *known(three, one))


def test_keys_of_a_former_exchange_open_nothing(kits: Path) -> None:
    one, two = mail(kits, "site-1"), mail(kits, "site-2")
    found = one.seal_update(PARAMS, 1.0, 3, *known(one, two))
    later_one, later_two = (mail(kits, site, exchange=8) for site in ("site-1", "site-2"))
    with pytest.raises(ProtocolError):
        later_two.open_update(found, 3, *known(later_two, later_one))
    with pytest.raises(RefusedError, match="it was signed for exchange 7, not 8"):
        known(later_two, one)


def test_what_opens_and_is_no_model_is_refused(kits: Path) -> None:
    one, two = mail(kits, "site-1"), mail(kits, "site-2")
    [to_two], [by_one] = known(one, two), known(two, one)
    for plain in (b"", b"\xff" * 64, b"\1\0\0\0\x90".ljust(64, b"\0") + b"no tensors"):
        found = np.frombuffer(sealed(plain, one._key_to(to_two, "update", 1)), np.uint8)
        with pytest.raises(ProtocolError, match="it opens, but is not a model"):
            two.open_update(found, 1, by_one)
