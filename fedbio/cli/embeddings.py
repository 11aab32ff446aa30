"""``fedbio embeddings``: show, merge and convert embeddings files."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedbio.errors import DataError, SettingsError

if TYPE_CHECKING:
    from fedbio.embeddings_exchange import Form
    from fedbio.embeddings_merge import Proteins
    from fedbio.results import EncoderInfo

EXAMPLE = """fedbio embeddings show proteins.h5
  fedbio embeddings merge part-1.h5 part-2.h5 -o all.h5 --like all.fasta
  fedbio embeddings convert proteins.h5 -o proteins.npy
  fedbio embeddings convert per-protein.h5 -o proteins.h5 --proteins proteins.fasta --encoder-name prot_t5"""

ENDINGS = {".h5": "", ".hdf5": "", ".npy": "npy", ".parquet": "parquet"}
"""Form of an output by its ending; HDF5 has several, of which the input decides."""

TARGETS = ("fedbio", "uniprot", "bio_embeddings", "biotrainer", "npy", "parquet")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    show = verbs.add_parser("show", help="say what a file holds and how it was made")
    show.add_argument("file", type=Path, metavar="EMB.h5", help="embeddings file")
    merge = verbs.add_parser("merge", help="join files of one encoder, such as the shards of a run")
    merge.add_argument("files", type=Path, nargs="+", metavar="EMB.h5", help="embeddings files, in the order to be")
    merge.add_argument("-o", "--output", type=Path, required=True, metavar="EMB.h5", help="file to make")
    merge.add_argument("--like", type=Path, metavar="FASTA", help="keep the proteins of this file, in its order")
    convert = verbs.add_parser(
        "convert", help="to and from one dataset per protein, and to .npy and .parquet", description=_CONVERT
    )
    convert.add_argument("file", type=Path, metavar="FILE", help="HDF5 file of either kind")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to make")
    convert.add_argument(
        "--to", choices=TARGETS, help="form of the output (default: by its ending and by what FILE is)"
    )
    convert.add_argument("--proteins", type=Path, metavar="FASTA", help="the sequences of the ids")
    convert.add_argument("--encoder-name", metavar="NAME", help="which encoder made another tool's file")


_CONVERT = """Convert our file into the form of another tool, or another tool's file with one dataset per protein into
ours. Without --to an output that ends in .npy or .parquet becomes that; one in .h5 or .hdf5 becomes uniprot's form
if FILE is ours, else ours. Another tool's file needs --encoder-name and --proteins, whose proteins and order the
result has; biotrainer's form needs --proteins."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run one of the verbs."""
    return {"show": _show, "merge": _merge, "convert": _convert}[args.verb](args)


def _show(args: argparse.Namespace) -> dict[str, Any]:
    import msgspec

    from fedbio.embeddings import Embeddings

    with Embeddings.open(args.file) as embeddings:
        lengths = embeddings.lengths
        facts: dict[str, Any] = {
            "proteins": len(embeddings),
            "residues": int(lengths.sum()),
            "shortest": int(lengths.min(initial=lengths.max(initial=0))),
            "longest": int(lengths.max(initial=0)),
            "longer": int((lengths > embeddings.info.max_residues).sum()),
            "distinct_sequences": len({row.tobytes() for row in embeddings.digests}),
            "width": embeddings.info.width,
            "rows": len(embeddings) if embeddings.pointers is None else int(embeddings.pointers[-1]),
            "first_ids": next(embeddings.heads()).ids[:5] if len(embeddings) else [],
            "encoder": msgspec.structs.asdict(embeddings.info),
        }
    if not args.json:
        encoder = facts["encoder"]
        done = "cut" if encoder["long"] == "cut" else "covered by windows"
        first = ", ".join(facts["first_ids"])
        print(
            f"{args.file}: {facts['proteins']:,} proteins ({facts['distinct_sequences']:,} distinct sequences), "
            f"{facts['residues']:,} residues, {facts['shortest']:,} to {facts['longest']:,} each\n"
            f"first ids: {first}\n"
            f"{facts['rows']:,} rows of width {facts['width']:,}, one per "
            f"{'residue' if encoder['pooling'] == 'residues' else 'protein'}\n"
            f"{facts['longer']:,} proteins longer than {encoder['max_residues']} residues were {done}\n"
            f"made with {'trained' if encoder['trained'] else 'untrained'} encoder {encoder['name']}:"
        )
        for name, value in encoder.items():
            if name not in ("name", "trained", "width") and value not in (None, ""):
                print(f"  {name:<14} {value}")
    return facts


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from fedbio.embeddings_merge import merge

    _refuse_inputs(args, [*args.files, args.like])
    report = merge(args.files, args.output, like=_proteins(args.like))
    return _made(args, **asdict(report))


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.embeddings_exchange import from_flat, to_flat
    from fedbio.embeddings_flat import is_flat
    from fedbio.embeddings_tables import to_npy, to_parquet

    _refuse_inputs(args, [args.file, args.proteins])
    ending = args.output.suffix.lower()
    if args.to is None and ending not in ENDINGS:
        found = f"the ending {ending!r} stands for no known form" if ending else "it has no ending"
        raise SettingsError(f"-o {args.output}: {found}; end it in {', '.join(ENDINGS)}, or say the form with --to")
    flat = is_flat(args.file)
    to = args.to or ENDINGS[ending] or ("fedbio" if flat else "uniprot")
    if flat and to != "fedbio":
        raise DataError(f"{args.file}: has one dataset per protein; convert it to our form first (--to fedbio)")
    if to == "fedbio" and not flat:
        raise DataError(f"{args.file}: is in our form already; choose another one with --to")
    if to == "npy":
        proteins, ids = to_npy(args.file, args.output)
        return _made(args, proteins, ids=str(ids))
    if to == "parquet":
        return _made(args, to_parquet(args.file, args.output))
    if to == "fedbio":
        info = _foreign_encoder(args.encoder_name) if args.encoder_name else None
        return _made(args, from_flat(args.file, args.output, info=info, proteins=_proteins(args.proteins)))
    return _made(args, to_flat(args.file, args.output, cast("Form", to), proteins=_proteins(args.proteins)))


def _refuse_inputs(args: argparse.Namespace, inputs: list[Path | None]) -> None:
    """Refuse an output that is one of the files that are read, under this name or another."""
    output: Path = args.output
    for each in inputs:
        if each is not None and each.exists() and output.exists() and output.samefile(each):
            raise SettingsError(f"-o {output}: this is {each}, which is read; name another file for the result")


def _proteins(path: Path | None) -> Proteins | None:
    """Give the ids and sequences of a file of proteins, anew each time."""
    from fedbio.proteins import read

    if path is None:
        return None
    # whatever labels there are, they do not matter here
    return lambda: ((protein.id, protein.sequence) for protein in read(path, classes=None))


def _foreign_encoder(name: str) -> EncoderInfo:
    from fedbio.results import EncoderInfo

    # what another tool's file does not say stays unknown, and so never equals an encoder that is known
    return EncoderInfo(
        name=name,
        weights_sha256="unknown",
        trained=True,
        width=0,
        pooling="mean",
        layer=0,
        dtype="unknown",
        max_residues=2**31 - 1,
        long="cut",
    )


def _made(args: argparse.Namespace, proteins: int, **more: Any) -> dict[str, Any]:
    if not args.json:
        print(f"{args.output}: {proteins:,} proteins")
        if more.get("repeated"):
            print(f"ids that stand in several files, taken from the first: {more['repeated']:,}")
        if more.get("left_out"):
            print(f"proteins that were not asked for, left out: {more['left_out']:,}")
        if "ids" in more:
            print(f"{more['ids']}: their ids, in order")
    return {"proteins": proteins, "output": str(args.output), **more}
