"""``fedbio settings``: check a settings file whole, or print the JSON schema of one."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
import json
from pathlib import Path
from typing import Any

from fedbio.files import write_whole
from fedbio.settings import FILES, check, check_party
from fedbio.settings_files import kind_of, read_settings

EXAMPLE = "fedbio settings check config/config.yaml"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs ``check`` and ``schema``."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    checking = verbs.add_parser("check", help="report every problem of a settings file at once")
    checking.add_argument("file", type=Path, help="a settings file: YAML, JSON or TOML")
    checking.add_argument("--kind", choices=FILES, help="which file it is; known by its keys if not given")
    schema = verbs.add_parser("schema", help="print the JSON schema of a settings file")
    schema.add_argument("kind", choices=FILES, help="which settings file")
    schema.add_argument("-o", "--output", type=Path, help="write to this file instead")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sub-verb."""
    if args.verb == "check":
        content = read_settings(args.file)
        kind = args.kind or kind_of(content)
        settings = check_party(content, args.file) if kind is None else check(content, FILES[kind], args.file)
        if not args.json:
            print(f"{args.file}: valid")
        return {"file": str(args.file), "settings": settings.model_dump(mode="json")}
    text = json.dumps(FILES[args.kind].model_json_schema(), indent=2) + "\n"
    if args.output:
        write_whole(args.output, text)
    elif not args.json:
        print(text, end="")
    return {"kind": args.kind}
