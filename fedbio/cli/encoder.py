"""``fedbio encoder``: list and fetch public checkpoints, look into encoders, convert them."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedbio.encoder.checkpoint import Loaded

EXAMPLE = """fedbio encoder fetch facebook/esm2_t6_8M_UR50D
  fedbio encoder show facebook/esm2_t6_8M_UR50D
  fedbio encoder convert esm1nv.nemo -o esm1nv/ --to fedbio"""

FORMS = {
    "built in": "built in, random weights from a seed",
    "fedbio": "folder of fedbio",
    "huggingface": "folder of Hugging Face",
    "fair-esm": "file of fair-esm",
    "nemo": "archive of BioNeMo",
}

SOURCE_HELP = "built-in name, name in the cache, encoder folder, .pt file or .nemo archive"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs ``list``, ``fetch``, ``show`` and ``convert``."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    listing = verbs.add_parser("list", help="list the encoders that are known by name, and which are here")

    fetch = verbs.add_parser("fetch", help="download a public checkpoint into the cache")
    fetch.add_argument("name", metavar="NAME", help="a name from 'fedbio encoder list'")
    fetch.add_argument("--from", dest="address", metavar="URL", help="a mirror: the file, or the folder of files")

    show = verbs.add_parser("show", help="say what an encoder is, how large, and which digest it has")
    show.add_argument("encoder", metavar="ENCODER", help=SOURCE_HELP)

    convert = verbs.add_parser("convert", help="write an encoder as a folder of another form")
    convert.add_argument("encoder", metavar="ENCODER", help=SOURCE_HELP)
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    convert.add_argument("--to", choices=["fedbio", "huggingface"], default="fedbio", help="whose form")
    convert.add_argument("--name", metavar="NAME", help="what reports call it (default: its name so far)")

    for each in (show, convert):
        each.add_argument("--seed", type=int, default=0, help="seed of the weights of a built-in architecture")
    for each in (listing, fetch, show, convert):
        each.add_argument(
            "--cache",
            type=Path,
            metavar="DIR",
            help="where encoders are kept by name (default: $FEDBIO_ENCODERS, or this user's own cache folder)",
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sub-verb."""
    return {"list": _list, "fetch": _fetch, "show": _show, "convert": _convert}[args.verb](args)


def _list(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.encoder import BUILT_IN
    from fedbio.encoder_names import KNOWN, cache_folder, cached_path

    rows = [
        {"name": name, "summary": "architecture without trained weights", "origin": "built in", "path": None}
        for name in BUILT_IN
    ]
    for known in KNOWN.values():
        path = cached_path(known.name, args.cache)
        rows.append(
            {
                "name": known.name,
                "summary": known.summary,
                "origin": known.address,
                "path": None if path is None else str(path),
            }
        )
    cache = cache_folder(args.cache)
    if not args.json:
        width = max(len(str(row["name"])) for row in rows)
        for row in rows:
            place = "built in" if row["origin"] == "built in" else "here" if row["path"] else "not fetched"
            print(f"{row['name']:<{width}}  {row['summary']} [{place}]")
        print(f"cache: {cache}")
    return {"cache": str(cache), "encoders": rows}


def _fetch(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.encoder.fetch import fetch_encoder

    path = fetch_encoder(args.name, args.cache, address=args.address)
    if not args.json:
        print(f"{args.name}: {path}")
    return {"name": args.name, "path": str(path)}


def _show(args: argparse.Namespace) -> dict[str, Any]:
    from fedbio.encoder.checkpoint import read_encoder

    loaded = read_encoder(args.encoder, seed=args.seed, cache=args.cache)
    facts = _facts(loaded)
    if not args.json:
        config = loaded.config
        head = "it is there" if facts["head"] else "there is none"
        print(
            f"{config.name}: {'trained' if config.trained else 'untrained'}, {FORMS[loaded.form]}"
            f"{f' ({loaded.path})' if loaded.path else ''}\n"
            f"{config.layers} layers, {config.heads} heads, width {config.width}, feed-forward {config.ffn}, "
            f"{config.positions} positions, {config.activation}, alphabet {config.alphabet} "
            f"({config.vocabulary} rows)\n"
            f"{facts['parameters']:,} parameters, {facts['parameters_with_head']:,} with a language-model head "
            f"({head}); proteins of up to {config.max_residues:,} residues at once\n"
            f"SHA-256 of its weights {facts['weights_sha256']}"
        )
    return facts


def _facts(loaded: Loaded) -> dict[str, Any]:
    import math

    import msgspec

    from fedbio.weights import head_shapes, inference_shapes, weights_digest

    trunk = sum(math.prod(shape) for shape in inference_shapes(loaded.config).values())
    head = sum(math.prod(shape) for shape in head_shapes(loaded.config).values())
    return {
        "form": loaded.form,
        "path": None if loaded.path is None else str(loaded.path),
        "architecture": msgspec.to_builtins(loaded.config),
        "trained": loaded.config.trained,
        "parameters": trunk,
        "parameters_with_head": trunk + head,
        "head": "lm_head.bias" in loaded.weights,
        "max_residues": loaded.config.max_residues,
        "weights_sha256": weights_digest(loaded.weights),
    }


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    import msgspec

    from fedbio.encoder.checkpoint import read_encoder
    from fedbio.encoder.checkpoint.huggingface_save import write_huggingface
    from fedbio.weights import write_weights

    _check_output(args.output, args.to)
    loaded = read_encoder(args.encoder, seed=args.seed, cache=args.cache)
    config = loaded.config
    if args.name:
        config = msgspec.structs.replace(config, name=args.name)
    head = "lm_head.bias" in loaded.weights
    if args.to == "fedbio":
        write_weights(args.output, config, loaded.weights)
        written = head
    else:
        written = write_huggingface(args.output, config, loaded.weights)
    facts = {**_facts(loaded._replace(config=config)), "output": str(args.output), "to": args.to, "head": written}
    if not args.json:
        print(f"{args.output}: {config.name}, {FORMS[args.to]}, SHA-256 of its weights {facts['weights_sha256']}")
        if head and not written:
            print("its language-model head stayed behind: MegatronBert would compute it with another GELU")
    return facts


def _check_output(output: Path, to: str) -> None:
    """Refuse to mix two encoders in one folder."""
    from fedbio.encoder_files import look_into
    from fedbio.errors import DataError, FormatError

    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        same = output.is_dir() and look_into(output).form == to
    except FormatError:
        same = False
    if not same:
        raise DataError(f"{output}: there is something else already; give a new folder")
