"""Where encoders are found by name: those that come with fedbio, and the cache folder of this machine.

Nothing here downloads anything or imports torch, so that a server resolves names as a site does.
"""

from __future__ import annotations

__all__ = [
    "CACHE_VARIABLE",
    "DEFAULT_ENCODER",
    "KNOWN",
    "PACKAGED",
    "KnownEncoder",
    "cache_folder",
    "cached_path",
    "find_encoder",
    "named_path",
    "packaged_encoders",
    "packaged_path",
]

import difflib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedbio.errors import SettingsError

DEFAULT_ENCODER = "esm1nv-mini"
"""The encoder of settings and commands that name none."""

PACKAGED = Path(__file__).parent / "encoders"
"""Where the trained encoders lie that come with fedbio, each in a folder of its name."""

CACHE_VARIABLE = "FEDBIO_ENCODERS"
"""Environment variable that names another cache folder."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?")
_SUFFIXES = ("", ".pt", ".nemo")


@dataclass(frozen=True)
class KnownEncoder:
    """A public checkpoint.

    Parameters
    ----------
    name : str
        What a person calls it; its place in the cache follows from it.
    summary : str
    address : str
        Of the file, or what the names of a folder's files are appended to.
    folder : bool
        Whether it is a Hugging Face folder, or else one fair-esm file.
    """

    name: str
    summary: str
    address: str
    folder: bool


_ESM = {
    "esm2_t6_8M_UR50D": "ESM-2, 8M",
    "esm2_t12_35M_UR50D": "ESM-2, 35M",
    "esm2_t30_150M_UR50D": "ESM-2, 150M",
    "esm2_t33_650M_UR50D": "ESM-2, 650M",
    "esm1b_t33_650M_UR50S": "ESM-1b, 650M",
    **{f"esm1v_t33_650M_UR90S_{n}": f"ESM-1v, 650M, model {n} of 5" for n in range(1, 6)},
}

KNOWN = {
    known.name: known
    for name, summary in _ESM.items()
    for known in (
        KnownEncoder(name, f"{summary}; fair-esm", f"https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt", False),
        KnownEncoder(
            f"facebook/{name}", f"{summary}; Hugging Face", f"https://huggingface.co/facebook/{name}/resolve/main", True
        ),
    )
}
"""Public checkpoints by name."""


def cache_folder(chosen: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder where encoders are kept by name; it need not exist.

    Parameters
    ----------
    chosen : path-like, optional
        Taken before the environment variable ``FEDBIO_ENCODERS`` and before the platform's own place for caches
        (``$XDG_CACHE_HOME`` or ``~/.cache``, on macOS ``~/Library/Caches``).
    """
    if chosen is not None:
        return Path(chosen)
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        named = os.environ.get("XDG_CACHE_HOME", "")
        # the specification of base directories has relative paths ignored
        base = Path(named) if named.startswith("/") else Path.home() / ".cache"
    return base / "fedbio" / "encoders"


def cached_path(name: str, cache: str | os.PathLike[str] | None = None) -> Path | None:
    """Return where an encoder of this name lies in the cache, or None.

    A name is that of a folder, or of a ``.pt`` or ``.nemo`` file, with or without this ending; a folder counts once
    its ``config.json``, which is fetched last, is there.
    """
    if not _NAME.fullmatch(name):
        return None
    place = cache_folder(cache) / name
    for suffix in _SUFFIXES:
        path = place.with_name(place.name + suffix)
        if path.is_file() or (path / "config.json").is_file():
            return path
    return None


def packaged_path(name: str) -> Path | None:
    """Return the folder of an encoder that comes with fedbio, or None if none has this name."""
    if "/" in name or not _NAME.fullmatch(name):
        return None
    folder = PACKAGED / name
    return folder if (folder / "config.json").is_file() else None


def packaged_encoders() -> list[str]:
    """Return the names of the trained encoders that come with fedbio, sorted."""
    if not PACKAGED.is_dir():
        return []
    return sorted(each.name for each in PACKAGED.iterdir() if packaged_path(each.name) is not None)


def named_path(name: str, cache: str | os.PathLike[str] | None = None) -> Path | None:
    """Return where an encoder of this name lies, with fedbio or else in the cache, or None."""
    return packaged_path(name) or cached_path(name, cache)


def find_encoder(
    name: str, cache: str | os.PathLike[str] | None = None, *, built_in: Iterable[str] = ()
) -> Path | None:
    """Return the file or folder that a person means.

    It is, in this order, a path that exists, a name of an encoder that comes with fedbio, or a name in the cache.

    Parameters
    ----------
    name : str
    cache : path-like, optional
        See `cache_folder`.
    built_in : iterable of str
        Names that need no file; if nothing else has such a name, the answer is None.

    Raises
    ------
    SettingsError
        If there is neither a path nor such a name; the message says how a known name is fetched.
    """
    built_in = tuple(built_in)
    found = Path(name) if Path(name).exists() else named_path(name, cache)
    if found is not None or name in built_in:
        return found
    if name in KNOWN:
        option = "" if cache is None else f" --cache {os.fspath(cache)}"
        raise SettingsError(
            f"encoder {name!r}: a known checkpoint, but not in the cache {cache_folder(cache)}; "
            f"fetch it once with: fedbio encoder fetch {name}{option}"
        )
    here = [*packaged_encoders(), *built_in]
    near = difflib.get_close_matches(name, [*here, *KNOWN], n=1, cutoff=0.75)
    hint = f"did you mean {near[0]!r}?" if near else "check the path, or see 'fedbio encoder list' for known names"
    raise SettingsError(
        f"encoder {name!r}: neither a built-in name ({', '.join(dict.fromkeys(here))}), nor a name in the cache "
        f"{cache_folder(cache)}, nor an existing folder or file; {hint}"
    )
