"""``fedbio data``: list and fetch known data sets, check a file, make demo proteins, simulate sites, make shards."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedbio.compartments import named_classes
from fedbio.errors import DataError
from fedbio.progress import Progress
from fedbio.proteins import Protein, ReadCounts

EXAMPLE = """fedbio data check my_proteins.fasta
  fedbio data fetch mixed_soft -o mixed_soft.csv
  fedbio data demo -o demo.fasta --count 900 --seed 0
  fedbio data split demo.fasta --sites 3 --alpha 1.0 --seed 0 -o sites/
  fedbio data shard large.fasta.gz --shards 8 -o shards/"""

FILE_HELP = "FASTA, CSV, TSV, Swiss-Prot text, UniProt XML or GenBank; plain or .gz"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs ``list``, ``fetch``, ``check``, ``demo``, ``split`` and ``shard``."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verbs.add_parser("list", help="list the data sets that are known by name")

    fetch = verbs.add_parser("fetch", help="download a data set, and check it against its first download")
    fetch.add_argument("name", metavar="NAME", help="a name from 'fedbio data list'")
    fetch.add_argument("-o", "--output", type=Path, metavar="FILE", help="put the proteins into this file")
    fetch.add_argument("--folder", type=Path, default=Path("data"), help="where downloads are kept, if without -o")

    check = verbs.add_parser("check", help="validate a file and describe what is in it")
    _add_input(check)

    demo = verbs.add_parser("demo", help="write labelled synthetic proteins")
    demo.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the FASTA file to write")
    demo.add_argument("--count", type=int, default=900, help="how many proteins")
    demo.add_argument("--seed", type=int, default=0, help="the same seed gives the same file")
    demo.add_argument("--test-fraction", type=float, default=0.2, help="share of the proteins in the test set")
    demo.add_argument("--validation-fraction", type=float, default=0.1, help="share set aside for validation")
    demo.add_argument("--difficulty", type=float, default=0.3, help="how alike the locations are, 0 to 1")

    split = verbs.add_parser("split", help="share a file's proteins out among simulated sites")
    _add_input(split)
    split.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="a FASTA file per site goes here"
    )
    sites = split.add_mutually_exclusive_group(required=True)
    sites.add_argument("--sites", type=int, metavar="N", help="number of sites: site-1, site-2, ...")
    sites.add_argument("--names", metavar="A,B", help="names of the sites, with commas between")
    how = split.add_mutually_exclusive_group()
    how.add_argument("--by", default="dirichlet", metavar="HOW", help="dirichlet (by class), iid, or a column's name")
    how.add_argument("--iid", dest="by", action="store_const", const="iid", help="the same as --by iid")
    split.add_argument("--table", type=Path, metavar="CSV", help="where the column is, if not in FILE or --labels")
    split.add_argument("--alpha", type=float, default=1.0, help="Dirichlet: small makes sites differ")
    split.add_argument("--seed", type=int, default=0, help="the same seed gives the same sites")
    split.add_argument("--limit", type=int, metavar="N", help="use at most N proteins, in proportion")
    split.add_argument(
        "--test-fraction", type=float, default=0.2, help="share drawn as test set if the file marks no test proteins"
    )

    shard = verbs.add_parser("shard", help="divide a large file into files of about as many residues each")
    _add_input(shard)
    shard.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="1-of-N.fasta, 2-of-N.fasta, ... go here"
    )
    shard.add_argument("--shards", type=int, required=True, metavar="N", help="how many files to make")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help=FILE_HELP)
    parser.add_argument("--labels", type=Path, metavar="CSV", help="table with the columns id and target")
    parser.add_argument("--classes", metavar="A,B", help="the labels that are known (default: the ten compartments)")
    parser.add_argument("--skip-invalid", action="store_true", help="leave wrong records out instead of stopping")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sub-verb."""
    verbs = {"list": _list, "fetch": _fetch, "check": _check, "demo": _demo, "split": _split, "shard": _shard}
    return verbs[args.verb](args)


def _list(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.proteins.datasets import known_datasets

    known = known_datasets().values()
    if not args.json:
        width = max(len(dataset.name) for dataset in known)
        for dataset in known:
            print(f"{dataset.name:<{width}}  {dataset.summary} [{dataset.origin}]")
    return {"datasets": [{"name": each.name, "summary": each.summary, "origin": each.origin} for each in known]}


def _fetch(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.files import sha256_file, whole_file
    from fedbio.proteins.datasets import fetch

    path = fetch(args.name, args.output.parent if args.output else args.folder)
    if args.output:
        if path.is_dir():
            raise DataError(f"{args.name}: a collection of files; use --folder, or fetch one of its parts")
        if path != args.output:
            with whole_file(args.output) as beside:
                shutil.copyfile(path, beside)
            path = args.output
    if not args.json:
        print(f"{args.name}: {path}")
    return {"name": args.name, "path": str(path), "sha256": None if path.is_dir() else sha256_file(path)}


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.proteins import read

    counts = ReadCounts()
    description = _describe(
        read(args.file, labels=args.labels, classes=named_classes(args.classes), skip_invalid=True, counts=counts)
    )
    description = {"file": str(args.file), "residues": counts.residues, **description, **_leniencies(counts)}
    if not args.json:
        _print_description(description)
    if counts.skipped and not args.skip_invalid:
        wrong = sum(counts.skipped.values())
        more = f"\n  ... and {wrong - len(counts.examples)} more" if wrong > len(counts.examples) else ""
        raise DataError(
            f"{args.file}: {wrong} of {wrong + counts.proteins} records are wrong:\n  "
            + "\n  ".join(counts.examples)
            + more
        )
    return description


def _leniencies(counts: ReadCounts) -> dict[str, Any]:
    return {"unusual": dict(counts.unusual), "accepted": dict(counts.accepted), "skipped": dict(counts.skipped)}


def _describe(proteins: Iterable[Protein]) -> dict[str, Any]:
    """Count by class and split, and take the quartiles of the lengths."""
    import numpy as np

    lengths: list[int] = []
    classes: dict[str, Counter[str]] = {}
    for protein in proteins:
        lengths.append(len(protein.sequence))
        classes.setdefault(protein.target or "", Counter())[_part(protein)] += 1
    shortest, first, median, third, longest = (int(value) for value in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
    unlabelled = classes.pop("", Counter())
    return {
        "proteins": len(lengths),
        "length": {"min": shortest, "quartiles": [first, median, third], "max": longest},
        "classes": {name: {part: classes[name][part] for part in PARTS} for name in sorted(classes)},
        "unlabelled": sum(unlabelled.values()),
    }


PARTS = ("train", "validation", "test")


def _part(protein: Protein) -> str:
    return "validation" if protein.validation else protein.set


def _print_description(found: dict[str, Any]) -> None:
    length = found["length"]
    first, median, third = length["quartiles"]
    print(f"{found['file']}: {found['proteins']:,} proteins, {found['residues']:,} residues")
    print(f"length: {length['min']:,} to {length['max']:,}, quartiles {first:,} / {median:,} / {third:,}")
    if found["classes"]:
        rows = [(name, *(counts[part] for part in PARTS)) for name, counts in found["classes"].items()]
        _print_table(("location", *PARTS), [*rows, ("all", *(sum(row[i] for row in rows) for i in (1, 2, 3)))])
    if found["unlabelled"]:
        print(f"without a label: {found['unlabelled']:,}")
    if not found["classes"]:
        print("no label at all: these proteins can be embedded and predicted, but not trained on (docs/data.md)")
    elif not any(counts["test"] for counts in found["classes"].values()):
        print("no test set: a fifth is drawn where these proteins are dealt out to sites; SET=test marks your own")
    if found["unusual"]:
        print("unusual residues: " + ", ".join(f"{letter} {number:,}" for letter, number in found["unusual"].items()))
    for title in ("accepted", "skipped"):
        for what, number in found[title].items():
            print(f"{title}: {what}: {number:,}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    width = max(len(str(row[0])) for row in (header, *rows))
    for row in (header, *rows):
        cells = (f"{cell:>11,}" if isinstance(cell, int) else f"{cell:>11}" for cell in row[1:])
        print(f"  {row[0]:<{width}}", *cells)


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.proteins import write_fasta
    from fedbio.proteins.demo import generate

    parts: Counter[str] = Counter()

    def counted(progress: Progress) -> Iterator[Protein]:
        proteins = generate(
            args.count,
            seed=args.seed,
            test_fraction=args.test_fraction,
            validation_fraction=args.validation_fraction,
            difficulty=args.difficulty,
        )
        for protein in proteins:
            parts[_part(protein)] += 1
            progress.advance(1)
            yield protein

    with Progress("making demo proteins", total=args.count, unit="proteins") as progress:
        write_fasta(counted(progress), args.output)
    if not args.json:
        numbers = ", ".join(f"{part} {parts[part]:,}" for part in PARTS)
        print(f"{args.output}: {args.count:,} synthetic proteins ({numbers})")
    return {"path": str(args.output), "proteins": args.count, **{part: parts[part] for part in PARTS}}


def _split(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.proteins import partition, partition_by, partition_iid, read, sample, write_fasta
    from fedbio.proteins.tables import read_column

    names = _site_names(args)
    counts = ReadCounts()
    proteins = list(
        read(
            args.file,
            labels=args.labels,
            classes=named_classes(args.classes),
            require_labels=True,
            skip_invalid=args.skip_invalid,
            counts=counts,
        )
    )
    if args.limit is not None:
        proteins = sample(proteins, args.limit, args.seed)
    if not any(protein.set == "test" for protein in proteins):
        proteins = _with_test_set(proteins, args)
    if args.by == "dirichlet":
        shares = partition(proteins, names, alpha=args.alpha, seed=args.seed)
    elif args.by == "iid":
        shares = partition_iid(proteins, names, seed=args.seed)
    else:
        table = args.table or args.labels or args.file
        shares = partition_by(proteins, names, column=read_column(table, args.by), source=f"{table}: {args.by}")
    sites: dict[str, Any] = {}
    for name, share in shares.items():
        path = args.output / f"{name}.fasta"
        write_fasta(share, path)
        parts = Counter(map(_part, share))
        classes = Counter(protein.target for protein in share if protein.set == "train")
        sites[name] = {
            "path": str(path),
            **{part: parts[part] for part in PARTS},
            "classes": dict(sorted(classes.items())),
        }
    if not args.json:
        print(f"{args.file}: {len(proteins):,} proteins shared out among {len(names)} sites in {args.output}")
        rows = [(name, *(site[part] for part in PARTS), len(site["classes"])) for name, site in sites.items()]
        _print_table(("site", *PARTS, "locations"), rows)
        for reason, number in counts.skipped.items():
            print(f"skipped: {reason}: {number:,}")
    return {"sites": sites, "skipped": dict(counts.skipped)}


def _shard(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.encoder.shard_files import write_shards

    counts = ReadCounts()
    shards = write_shards(
        args.file,
        args.output,
        args.shards,
        labels=args.labels,
        classes=named_classes(args.classes),
        skip_invalid=args.skip_invalid,
        counts=counts,
    )
    if not args.json:
        print(f"{args.file}: {counts.proteins:,} proteins, {counts.residues:,} residues in {len(shards):,} shards")
        _print_table(
            ("shard", "proteins", "residues"), [(each.path.name, each.proteins, each.residues) for each in shards]
        )
        for reason, number in counts.skipped.items():
            print(f"skipped: {reason}: {number:,}")
    return {
        "shards": [{**dataclasses.asdict(each), "path": str(each.path)} for each in shards],
        "skipped": dict(counts.skipped),
    }


def _site_names(args: argparse.Namespace) -> list[str]:
    if args.names is not None:
        names = [name.strip() for name in args.names.split(",")]
        if wrong := [name for name in names if not name or name != Path(name).name]:
            raise DataError(
                f"--names {args.names}: {wrong[0]!r} cannot name a site and its file; use letters and digits"
            )
        return names
    if args.sites < 1:
        raise DataError(f"--sites {args.sites}: needs at least 1")
    return [f"site-{number}" for number in range(1, args.sites + 1)]


def _with_test_set(proteins: list[Protein], args: argparse.Namespace) -> list[Protein]:
    """Draw a test set at random, in proportion to the classes, where the file marks none."""
    from fedbio.proteins import sample

    drawn = {protein.id for protein in sample(proteins, round(args.test_fraction * len(proteins)), args.seed)}
    if not args.json:
        print(
            f"{args.file}: no protein is marked as test; {len(drawn):,} were drawn at random "
            "(a fair measure needs SET=test for proteins without relatives in training)"
        )
    return [
        dataclasses.replace(protein, set="test", validation=False) if protein.id in drawn else protein
        for protein in proteins
    ]
