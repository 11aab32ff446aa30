"""Known data sets by name: built in, and from plug-ins.

A plug-in is an installed package with an entry point in the group ``fedbio.datasets``: a name, and a function that
is given a folder and returns the path of a file there, in any form that `fedbio.proteins.read` takes. Ten lines::

    # lab_proteins.py
    from pathlib import Path

    def fetch(folder: Path) -> Path:
        \"\"\"Two proteins of our laboratory.\"\"\"
        path = folder / "lab.fasta"
        path.write_text(">P1 TARGET=Nucleus SET=train\\nMKRKRPAS\\n>P2 TARGET=Plastid SET=test\\nMASSTV\\n")
        return path

    # pyproject.toml
    [project.entry-points."fedbio.datasets"]
    lab-proteins = "lab_proteins:fetch"

``fedbio data list`` then shows ``lab-proteins`` with the first line of the docstring.
"""

from __future__ import annotations

__all__ = [
    "DATASETS",
    "ENTRY_POINT_GROUP",
    "FLIP_SCL_ADDRESS",
    "Dataset",
    "fetch",
    "is_named",
    "known_datasets",
    "resolve",
]

import difflib
import functools
import importlib.metadata
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from fedbio.errors import DataError, FormatError
from fedbio.files import whole_file
from fedbio.proteins.download import download
from fedbio.proteins.fasta import write_fasta

ENTRY_POINT_GROUP = "fedbio.datasets"

FLIP_SCL_ADDRESS = "https://raw.githubusercontent.com/J-SNACKKB/FLIP/main/splits/scl/splits.zip"
"""The splits for subcellular location of FLIP (Dallago et al. 2021), from DeepLoc 1.0 (CC BY 4.0; splits AFL-3.0)."""

FLIP_SPLITS = {
    "mixed_soft": "DeepLoc 1.0, its own test set",
    "mixed_hard": "DeepLoc 1.0, the harder test set of Light attention",
    "human_soft": "human proteins of DeepLoc 1.0, its own test set",
    "human_hard": "human proteins of DeepLoc 1.0, the harder test set",
    "balanced": "as mixed_hard, test classes balanced as in training",
}
MULTI_LABEL = "mixed_vs_human_2"

MAX_UNPACKED_BYTES = 2**30
DEMO_COUNT = 900


class Dataset(NamedTuple):
    """A data set that can be fetched by name.

    Parameters
    ----------
    name, summary : str
    origin : str
        ``"built in"``, or the distribution that brought it.
    fetch : callable
        Given a folder, puts the data there unless it is there, and returns its path.
    """

    name: str
    summary: str
    origin: str
    fetch: Callable[[Path], Path]


def _demo(folder: Path) -> Path:
    from fedbio.proteins.demo import generate

    path = folder / "demo.fasta"
    if not path.exists():
        write_fasta(generate(DEMO_COUNT, seed=0), path)
    return path


def fetch_flip_scl(folder: Path, *, address: str = FLIP_SCL_ADDRESS) -> Path:
    """Download FLIP's location splits unless they are there, and unpack those with one location per protein.

    Parameters
    ----------
    folder : Path
    address : str
        FLIP's own address, or a mirror's.

    Returns
    -------
    Path
        The folder ``flip-scl`` with one CSV per split.
    """
    archive = download(address, folder / "flip-scl" / "splits.zip")
    try:
        with zipfile.ZipFile(archive) as unpacked:
            members = {Path(member.filename).name: member for member in unpacked.infolist()}
            for split in FLIP_SPLITS:
                target = archive.with_name(f"{split}.csv")
                member = members.get(target.name)
                if member is None:
                    raise FormatError(f"{archive}: no {target.name} in the archive; delete the file and fetch it again")
                if member.file_size > MAX_UNPACKED_BYTES:
                    raise FormatError(
                        f"{archive}: {target.name} would unpack to {member.file_size:,} bytes; not unpacked"
                    )
                if not target.exists():
                    # zipfile stops at the declared size and checks the CRC of what it read
                    with whole_file(target) as beside:
                        beside.write_bytes(unpacked.read(member))
    except (zipfile.BadZipFile, EOFError) as error:
        raise FormatError(f"{archive}: damaged zip archive ({error}); delete the file and fetch it again") from error
    return archive.parent


def _flip_split(folder: Path, *, split: str) -> Path:
    return fetch_flip_scl(folder) / f"{split}.csv"


def _not_yet(folder: Path) -> Path:
    raise DataError(
        f"{MULTI_LABEL}: not yet: DeepLoc 2 gives a protein several locations, and this release takes one location per "
        f"protein; use {', '.join(FLIP_SPLITS)}"
    )


DATASETS: dict[str, Dataset] = {
    entry.name: entry
    for entry in (
        Dataset("demo", f"{DEMO_COUNT} short synthetic proteins, made on this machine", "built in", _demo),
        Dataset("flip-scl", "all of FLIP's location splits below", "built in", fetch_flip_scl),
        *(
            Dataset(split, f"FLIP: {summary}", "built in", functools.partial(_flip_split, split=split))
            for split, summary in FLIP_SPLITS.items()
        ),
        Dataset(MULTI_LABEL, "FLIP: DeepLoc 2.0, several locations per protein (not yet)", "built in", _not_yet),
    )
}
"""The built-in data sets by name."""


def known_datasets() -> dict[str, Dataset]:
    """Return the built-in data sets and those of installed plug-ins; a built-in name cannot be taken."""
    found = dict(DATASETS)
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        origin = entry.dist.name if entry.dist else "a plug-in"
        try:
            function = entry.load()
            summary = (function.__doc__ or "").strip().partition("\n")[0]
        except Exception as error:  # a plug-in may fail in any way; the others stay usable
            function, summary = functools.partial(_broken, origin=origin, error=error), f"cannot be loaded ({error})"
        found.setdefault(entry.name, Dataset(entry.name, summary, origin, function))
    return found


def _broken(folder: Path, *, origin: str, error: Exception) -> Path:
    raise DataError(f"the data set plug-in of {origin!r} cannot be loaded ({error}); repair or uninstall it") from error


def fetch(name: str, folder: Path) -> Path:
    """Put a data set by name into `folder`, unless it is there.

    Parameters
    ----------
    name : str
        One of `known_datasets`.
    folder : Path
        Made if it is missing.

    Returns
    -------
    Path
        Its file, or the folder of a collection.

    Raises
    ------
    DataError
        If no data set has this name, with the nearest name.
    PeerUnreachable
        If its address cannot be reached.
    RefusedError
        If what arrives is not what arrived the first time.
    """
    datasets = known_datasets()
    if name not in datasets:
        raise DataError(f"{name}: no data set of this name; {_hint(name, datasets)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(datasets[name].fetch(folder))
    if not path.exists():
        raise DataError(f"{name}: the plug-in of {datasets[name].origin!r} returned {path}, which does not exist")
    return path


def is_named(dataset: str) -> bool:
    """Return whether a person means a known data set by ``dataset``, and not the path of a file; nothing is fetched.

    Raises
    ------
    DataError
        If it is neither.
    """
    path = Path(dataset)
    if path.is_file():
        return False
    datasets = known_datasets()
    if dataset in datasets:
        return True
    if path.suffix or len(path.parts) > 1:
        raise DataError(f"{dataset}: no such file; check the path, or see 'fedbio data list' for known names")
    raise DataError(f"{dataset}: no such file, and no data set of this name; {_hint(dataset, datasets)}")


def _hint(name: str, datasets: Collection[str]) -> str:
    near = difflib.get_close_matches(name, datasets, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(datasets)}"


def resolve(dataset: str, *, folder: Path = Path("data")) -> Path:
    """Return the file that a person means by ``dataset``: the path of a file, or a known name, fetched if needed.

    Raises
    ------
    DataError
        If it is neither, or a collection of several files.
    """
    if not is_named(dataset):
        return Path(dataset)
    found = fetch(dataset, folder)
    if found.is_dir():
        raise DataError(f"{dataset}: a collection; name one of its parts, see 'fedbio data list'")
    return found
