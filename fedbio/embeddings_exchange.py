"""Carry embeddings to and from files with one dataset per protein, as other tools write them.

==================  ===========================================================  =========================
form                key of a dataset                                             where the id is
==================  ===========================================================  =========================
``uniprot``         accession (of ``sp|P12345|NAME`` the middle), else the id    the key
``bio_embeddings``  number                                                       attribute ``original_id``
``biotrainer``      SHA-256 of the sequence, ``_`` and its length                attribute ``original_id``
==================  ===========================================================  =========================

A dataset is a vector (d,), or has a row per residue (residues, d). Ours have three more attributes, `length`, `sha256`
and `place`, and the root says which encoder made them, so that `from_flat` restores the file that they came from.
"""

from __future__ import annotations

__all__ = ["FORMS", "Form", "from_flat", "to_flat"]

import hashlib
import os
from collections.abc import Iterator
from typing import Literal, get_args

import h5py
import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbio.embeddings import RESIDUES, Embeddings, sequence_digest, write_embeddings
from fedbio.embeddings_flat import FlatFile
from fedbio.embeddings_merge import Proteins
from fedbio.errors import DataError
from fedbio.files import whole_file
from fedbio.results import EncoderInfo

_StrPath = str | os.PathLike[str]

Form = Literal["uniprot", "bio_embeddings", "biotrainer"]
FORMS: tuple[Form, ...] = get_args(Form)

FLAT_FORMAT = "fedbio-embeddings-flat"


def to_flat(source: _StrPath, output: _StrPath, form: Form = "uniprot", *, proteins: Proteins | None = None) -> int:
    """Write one dataset per protein, whole or not at all; returns their number.

    Parameters
    ----------
    source, output : path-like
    form : {"uniprot", "bio_embeddings", "biotrainer"}
    proteins : callable, optional
        Ids and sequences; biotrainer's keys are made of the sequences.

    Raises
    ------
    DataError
        If two proteins have the same key, or a sequence that is needed is not there.

    Notes
    -----
    biotrainer looks a protein up by its sequence, so of several with the same sequence the first is written. Where an
    id has a slash, which HDF5 takes for a folder, the key in UniProt's form is the sequence's SHA-256 and the place.
    """
    with Embeddings.open(source) as embeddings, whole_file(output) as beside, h5py.File(beside, "w") as file:
        file.attrs.update({"format": FLAT_FORMAT, "version": 1, **msgspec.to_builtins(embeddings.info)})
        keys = _keys(embeddings, form, proteins)
        used: dict[str, str] = {}
        for place, (key, name) in enumerate(zip(keys, embeddings.ids, strict=True)):
            if key in used:
                if form == "biotrainer":
                    continue
                raise DataError(
                    f"{embeddings.path}: ids {used[key]!r} and {name!r} have the same key {key!r} in this form; "
                    "rename one, or choose --to bio_embeddings"
                )
            used[key] = name
            first, last = (place, place + 1) if embeddings.pointers is None else embeddings.pointers[place : place + 2]
            rows = embeddings.span(int(first), int(last))
            item = file.create_dataset(key, data=rows[0] if embeddings.pointers is None else rows, track_times=False)
            item.attrs["original_id"] = name
            item.attrs["length"] = embeddings.lengths[place]
            item.attrs["sha256"] = embeddings.digests[place].tobytes().hex()
            item.attrs["place"] = place
        return len(used)


def _keys(embeddings: Embeddings, form: Form, proteins: Proteins | None) -> Iterator[str]:
    if form == "bio_embeddings":
        yield from map(str, range(len(embeddings)))
    elif form == "uniprot":
        for place, name in enumerate(embeddings.ids):
            # `.` is a folder too
            safe = "/" not in name and name.strip(".")
            yield _accession(name) if safe else f"{embeddings.digests[place].tobytes().hex()}-{place}"
    else:
        if proteins is None:
            raise DataError(f"{embeddings.path}: biotrainer's keys need the sequences; give them with --proteins")
        known = {name: (sequence_digest(text), _biotrainer_hash(text)) for name, text in proteins()}
        for place, name in enumerate(embeddings.ids):
            digest, key = known.get(name, (b"", ""))
            if digest != embeddings.digests[place].tobytes():
                what = "another sequence" if digest else "no sequence"
                raise DataError(f"{embeddings.path}: id {name!r} has {what} in the file given with --proteins")
            yield key


def _accession(name: str) -> str:
    parts = name.split("|")
    return parts[1] if len(parts) == 3 and parts[1] else name


def _biotrainer_hash(sequence: str) -> str:
    """The key of biotrainer (docs/h5_file_standardization.md, "Sequence hash definition")."""
    return hashlib.sha256(f"{sequence}_{len(sequence)}".encode()).hexdigest()


def from_flat(
    source: _StrPath, output: _StrPath, *, info: EncoderInfo | None = None, proteins: Proteins | None = None
) -> int:
    """Read a file with one dataset per protein into our form, whole or not at all; returns the number of proteins.

    Parameters
    ----------
    source, output : path-like
    info : EncoderInfo, optional
        How the vectors were made; files that `to_flat` wrote know it. Its width is taken from the file.
    proteins : callable, optional
        Ids and sequences; the result holds these proteins, in this order. A protein is found by its id, by its
        accession, or by the hash of its sequence that biotrainer or bio_embeddings make. Files that `to_flat` wrote
        do without.

    Raises
    ------
    DataError
        If something that the file does not say was not given, or a protein is not in the file.
    FormatError
        If a dataset is not a vector of finite numbers, or one per residue, of the same width as the others.

    Notes
    -----
    Values per residue are averaged, unless `info` says that the file keeps them.
    """
    with FlatFile(source) as flat:
        info = msgspec.structs.replace(info or _own_info(flat), width=flat.width)
        if proteins is not None:
            ids, lengths, digests, keys = _asked_for(flat, proteins)
        else:
            ids, lengths, digests, keys = _by_themselves(flat)
        per_residue = info.pooling == RESIDUES
        pointers = None
        if per_residue:
            pointers = np.cumsum([0, *(flat.rows_of(key) for key in keys)], dtype=np.int64)
        write_embeddings(
            output,
            info=info,
            ids=ids,
            lengths=lengths,
            digests=digests,
            blocks=flat.residues(keys) if per_residue else flat.vectors(keys, lengths),
            pointers=pointers,
        )
        return len(ids)


_Chosen = tuple[list[str], NDArray[np.int64], list[bytes], list[str]]
"""Ids, lengths, digests of the sequences, and keys in the file."""


def _asked_for(flat: FlatFile, proteins: Proteins) -> _Chosen:
    keys = flat.keys_by_id()
    by_accession = {_accession(name): key for name, key in keys.items()}
    ids, lengths, digests, chosen, missing = [], [], [], [], []
    for name, sequence in proteins():
        key = keys.get(name) or by_accession.get(_accession(name))
        if key is None:
            hashes = (_biotrainer_hash(sequence), hashlib.md5(sequence.encode()).hexdigest())
            key = next((each for each in hashes if each in flat), None)
        if key is None:
            missing.append(name)
            continue
        known = flat.entries[key].digest
        digest = sequence_digest(sequence)
        if known is not None and known != digest:
            raise DataError(
                f"{flat.path}: dataset {key!r} is of another sequence than {name!r} in the file given with --proteins"
            )
        ids.append(name)
        lengths.append(len(sequence))
        digests.append(digest)
        chosen.append(key)
    if missing:
        raise DataError(
            f"{flat.path}: {len(missing)} of {len(missing) + len(ids)} proteins given with --proteins are not in it, "
            f"first {missing[0]!r}; leave them out there"
        )
    return ids, np.array(lengths, dtype=np.int64), digests, chosen


def _by_themselves(flat: FlatFile) -> _Chosen:
    ids, lengths, digests, chosen = [], [], [], []
    for name, key in sorted(flat.keys_by_id().items(), key=lambda item: flat.entries[item[1]].place):
        entry = flat.entries[key]
        if entry.digest is None or not entry.length:
            raise DataError(
                f"{flat.path}: the file does not hold the sequences' digests and lengths; "
                "give the proteins with --proteins"
            )
        ids.append(name)
        lengths.append(entry.length)
        digests.append(entry.digest)
        chosen.append(key)
    return ids, np.array(lengths, dtype=np.int64), digests, chosen


def _own_info(flat: FlatFile) -> EncoderInfo:
    attributes = flat.attributes
    if attributes.get("format") != FLAT_FORMAT:
        raise DataError(f"{flat.path}: the file does not say which encoder made it; name it with --encoder-name")
    fields = [field.name for field in msgspec.structs.fields(EncoderInfo)]
    try:
        return msgspec.convert({name: attributes[name] for name in fields if name in attributes}, EncoderInfo)
    except msgspec.ValidationError as error:
        raise DataError(f"{flat.path}: attributes of the root: {error}; convert the file again") from error
