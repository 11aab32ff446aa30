"""``fedbio encoder``: list the known encoders, fetch public checkpoints, look into encoders, convert them."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbio.weights_file import WEIGHT_FORMS

if TYPE_CHECKING:
    from fedbio.encoder.checkpoint import Loaded

EXAMPLE = """fedbio encoder fetch facebook/esm2_t6_8M_UR50D
  fedbio encoder show facebook/esm2_t6_8M_UR50D
  fedbio encoder convert esm1nv.nemo -o esm1nv/ --to fedbio
  fedbio encoder convert my-run/ -o my-encoder/ --weights float16"""

_OWN = "comes with fedbio"

FORMS = {
    "built in": "built in, random weights from a seed",
    "fedbio": "folder of fedbio",
    "huggingface": "folder of Hugging Face",
    "fair-esm": "file of fair-esm",
    "nemo": "archive of BioNeMo",
}

SOURCE_HELP = "name (see fedbio encoder list), encoder folder, .pt file or .nemo archive"


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
    convert.add_argument(
        "--weights",
        choices=WEIGHT_FORMS,
        default="float32",
        help="as what a folder of fedbio keeps its matrices; float16 and int8 round",
    )
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
    from fedbio.encoder_names import DEFAULT_ENCODER, KNOWN, cache_folder, cached_path, packaged_encoders

    rows = [_packaged(name) for name in packaged_encoders()]
    rows += [
        {"name": name, "summary": "architecture without trained weights", "origin": "built in", "path": None}
        for name in BUILT_IN
        if name not in packaged_encoders()
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
            own = row["origin"] in (_OWN, "built in")
            place = row["origin"] if own else "here" if row["path"] else "not fetched"
            default = ", the default" if row["name"] == DEFAULT_ENCODER else ""
            print(f"{row['name']:<{width}}  {row['summary']} [{place}{default}]")
        print(f"cache: {cache}")
    return {"cache": str(cache), "default": DEFAULT_ENCODER, "encoders": rows}


def _packaged(name: str) -> dict[str, Any]:
    """Describe an encoder that comes with fedbio by its account; its weights are not looked at."""
    from fedbio.encoder_names import PACKAGED
    from fedbio.errors import FormatError
    from fedbio.training_account import read_account

    row: dict[str, Any] = {
        "name": name,
        "origin": _OWN,
        "path": str(PACKAGED / name),
        "perplexity": None,
        "tokens": None,
    }
    try:
        account = read_account(PACKAGED / name)
    except FormatError as error:
        return {**row, "summary": f"damaged, install fedbio again: {error}"}
    if account is None:
        return {**row, "summary": "trained"}
    perplexity = "" if account.perplexity is None else f", perplexity {account.perplexity:.2f}"
    summary = f"{account.parameters:,} parameters, trained on {account.tokens:,} tokens{perplexity}"
    return {**row, "summary": summary, "perplexity": account.perplexity, "tokens": account.tokens}


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
            f"SHA-256 of its weights {facts['weights_sha256']}{_kept(facts)}"
        )
    return facts


def _kept(facts: dict[str, Any]) -> str:
    """Say how the weights lie on the disk, and how well the encoder has learnt, as far as both are known."""
    lines = []
    if facts["weights"] is not None:
        lines.append(f"kept as {facts['weights']}, {facts['bytes'] / 1e6:.1f} MB")
    if facts["tokens"] is not None:
        perplexity = facts["perplexity"]
        measured = "not measured" if perplexity is None else f"{perplexity:.2f} (masked residues of held-out proteins)"
        lines.append(f"trained on {facts['tokens']:,} tokens, perplexity {measured}")
    return "".join(f"\n{line}" for line in lines)


def _facts(loaded: Loaded) -> dict[str, Any]:
    import math

    import msgspec

    from fedbio.weights import WEIGHTS_FILE, head_shapes, inference_shapes
    from fedbio.weights_file import file_weight_form

    trunk = sum(math.prod(shape) for shape in inference_shapes(loaded.config).values())
    head = sum(math.prod(shape) for shape in head_shapes(loaded.config).values())
    own = loaded.path / WEIGHTS_FILE if loaded.form == "fedbio" and loaded.path is not None else None
    account = loaded.account
    return {
        "form": loaded.form,
        "path": None if loaded.path is None else str(loaded.path),
        "architecture": msgspec.to_builtins(loaded.config),
        "trained": loaded.config.trained,
        "parameters": trunk,
        "parameters_with_head": trunk + head,
        "head": "lm_head.bias" in loaded.weights,
        "max_residues": loaded.config.max_residues,
        "weights_sha256": loaded.sha256,
        "weights": None if own is None else file_weight_form(own),
        "bytes": None if own is None else own.stat().st_size,
        "tokens": None if account is None else account.tokens,
        "perplexity": None if account is None else account.perplexity,
    }


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    import msgspec

    from fedbio.encoder.checkpoint import read_encoder
    from fedbio.encoder.checkpoint.huggingface_save import write_huggingface
    from fedbio.encoder.checkpoint.own_save import write_own
    from fedbio.errors import SettingsError

    if args.to != "fedbio" and args.weights != "float32":
        raise SettingsError(f"--weights {args.weights}: folders of Hugging Face are written as float32; leave it out")
    _check_output(args.output, args.to)
    loaded = read_encoder(args.encoder, seed=args.seed, cache=args.cache)
    config = loaded.config
    if args.name:
        config = msgspec.structs.replace(config, name=args.name)
    facts = {**_facts(loaded._replace(config=config)), "output": str(args.output), "to": args.to}
    if args.to == "fedbio":
        written = write_own(args.output, loaded, config, args.weights)
        facts |= {"weights_sha256": written.sha256, "weights": args.weights, "bytes": written.bytes}
        size = f", {args.weights}, {written.bytes:,} bytes"
    else:
        had_head = facts["head"]
        facts |= {"head": write_huggingface(args.output, config, loaded.weights), "weights": None, "bytes": None}
        size = ""
    if not args.json:
        print(f"{args.output}: {config.name}, {FORMS[args.to]}{size}, SHA-256 of its weights {facts['weights_sha256']}")
        if args.to != "fedbio" and had_head and not facts["head"]:
            print("its language-model head stayed behind: MegatronBert would compute it with another GELU")
        _say_what_is_unwritten(args.output)
    return facts


def _say_what_is_unwritten(folder: Path) -> None:
    from fedbio.model_card import CARD_FILE, UNWRITTEN, is_card

    card = folder / CARD_FILE
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        if is_card(text) and UNWRITTEN in text:
            print(f"{card}: a model card; where it says {UNWRITTEN!r}, only you can")


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
