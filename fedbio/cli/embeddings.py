"""``fedbio embeddings``: show, merge and convert embeddings files."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = "fedbio embeddings merge part-1.h5 part-2.h5 -o all.h5"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    show = verbs.add_parser("show", help="say what a file holds and how it was made")
    show.add_argument("file", type=Path, metavar="EMB.h5", help="embeddings file")
    merge = verbs.add_parser("merge", help="join files of one encoder")
    merge.add_argument("files", type=Path, nargs="+", metavar="EMB.h5", help="embeddings files")
    merge.add_argument("-o", "--output", type=Path, required=True, metavar="EMB.h5", help="file to make")
    convert = verbs.add_parser(
        "convert", help="to one dataset per protein (UniProt's form) from our form, or back", description=_CONVERT
    )
    convert.add_argument("file", type=Path, metavar="FILE", help="HDF5 file of either form")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to make")
    convert.add_argument("--proteins", type=Path, metavar="FASTA", help="sequences of the ids in another tool's file")
    convert.add_argument("--encoder-name", metavar="NAME", help="which encoder made another tool's file")


_CONVERT = """Convert our form into one dataset per protein, or the other way round; the form of FILE decides.
Files of other tools (UniProt, bio_embeddings, biotrainer) need --proteins and --encoder-name."""


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
            "encoder": msgspec.structs.asdict(embeddings.info),
        }
    if not args.json:
        encoder = facts["encoder"]
        done = "cut" if encoder["long"] == "cut" else "averaged over windows"
        print(
            f"{args.file}: {facts['proteins']:,} proteins ({facts['distinct_sequences']:,} distinct sequences), "
            f"{facts['residues']:,} residues, {facts['shortest']:,} to {facts['longest']:,} each\n"
            f"{facts['longer']:,} proteins longer than {encoder['max_residues']} residues were {done}\n"
            f"encoder {encoder['name']} ({'trained' if encoder['trained'] else 'untrained encoder'}), "
            f"width {encoder['width']}, {encoder['pooling']} over residues of layer {encoder['layer']}, "
            f"{encoder['dtype']}\nSHA-256 of its weights {encoder['weights_sha256']}"
        )
    return facts


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.embeddings_exchange import merge

    return _made(args, merge(args.files, args.output))


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.embeddings_exchange import from_flat, is_flat, to_flat
    from fedbio.proteins import read
    from fedbio.results import EncoderInfo

    if not is_flat(args.file):
        return _made(args, to_flat(args.file, args.output))
    sequences = {protein.id: protein.sequence for protein in read(args.proteins)} if args.proteins else None
    info = None
    if args.encoder_name:
        # what another tool's file does not say stays unknown, and so never equals an encoder that is known
        info = EncoderInfo(
            name=args.encoder_name,
            weights_sha256="unknown",
            trained=True,
            width=0,
            pooling="mean",
            layer=0,
            dtype="unknown",
            max_residues=2**31 - 1,
            long="cut",
        )
    return _made(args, from_flat(args.file, args.output, info=info, sequences=sequences))


def _made(args: argparse.Namespace, proteins: int) -> dict[str, Any]:
    if not args.json:
        print(f"{args.output}: {proteins:,} proteins")
    return {"proteins": proteins, "output": str(args.output)}
