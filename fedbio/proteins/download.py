"""Download a public file once, remember its SHA-256, and hold every later copy to it."""

from __future__ import annotations

__all__ = ["checksum_path", "download"]

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from fedbio.errors import DataError, PeerUnreachable, RefusedError, TransportError
from fedbio.files import sha256_file, whole_file, write_whole
from fedbio.progress import Progress

ATTEMPTS = 3
TIMEOUT_S = 30.0
PAUSE_S = 1.0
CHUNK_BYTES = 1 << 18
MAX_BYTES = 4 * 2**30


def checksum_path(path: Path) -> Path:
    """Return where a file's checksum is kept: beside it, in the form that ``sha256sum --check`` reads."""
    return path.with_name(f"{path.name}.sha256")


def download(address: str, path: Path) -> Path:
    """Fetch `address` to `path` unless it is there, whole or not at all, and check it.

    The first copy's SHA-256 is recorded beside the file; whatever is found or fetched later must have it. A file put
    there by hand is recorded as the first copy. Proxies come from the environment (``https_proxy``).

    Parameters
    ----------
    address : str
        An http or https address.
    path : Path

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    RefusedError
        If the checksum differs from the recorded one; a file that just arrived is thrown away.
    PeerUnreachable
        If the address does not answer, after three attempts.
    TransportError
        If it answers with an error.
    """
    if path.exists():
        _check(path, path)
        return path
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise DataError(f"{address}: not an http or https address")
    by_hand = f"on a machine with network, fetch it to {path} by hand, and run the same command again"
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with whole_file(path) as beside:
                _fetch(address, beside)
                _check(beside, path)
            return path
        except urllib.error.HTTPError as error:
            error.close()
            raise TransportError(f"{address}: the server answers {error.code} {error.reason}; {by_hand}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            if attempt == ATTEMPTS:
                raise PeerUnreachable(
                    f"{address}: not reached within {time.monotonic() - started:.0f} s and {ATTEMPTS} attempts "
                    f"(last: {cause}); {by_hand}"
                ) from error
            time.sleep(PAUSE_S * attempt)
    raise AssertionError("unreachable")


def _fetch(address: str, target: Path) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "fedbio"})  # noqa: S310 (scheme checked above)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer, open(target, "wb") as file:  # noqa: S310
        total = int(answer.headers.get("Content-Length") or 0)
        received = 0
        with Progress(f"fetching {address}", total=total, unit="bytes") as progress:
            while chunk := answer.read(CHUNK_BYTES):
                received += len(chunk)
                if received > MAX_BYTES:
                    raise RefusedError(f"{address}: sends more than {MAX_BYTES:,} bytes; is the address right?")
                file.write(chunk)
                progress.advance(len(chunk))
        if received < total:
            raise ConnectionError(f"broke off after {received:,} of {total:,} bytes")


def _check(found: Path, path: Path) -> None:
    """Hold `found` to the checksum recorded for `path`, or record it."""
    digest, record = sha256_file(found), checksum_path(path)
    if not record.exists():
        write_whole(record, f"{digest}  {path.name}\n")
    elif (expected := record.read_text().split()[0]) != digest:
        raise RefusedError(
            f"{path}: SHA-256 {digest} differs from {expected} of the first download ({record}); the file was changed "
            "or damaged: ask its publisher, and delete both files only if the new one is to be trusted"
        )
