"""``fedbio provision``: certificates and start-up kits."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = "fedbio provision config/federation.yaml -o kits"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("federation", type=Path, help="YAML file that says who takes part")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the authority and the kits")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the kits that are missing and say what to hand to whom."""
    from fedbio.provision import provision
    from fedbio.settings import FederationFile, load

    settings = load(args.federation, FederationFile)
    made = provision(settings, args.output)
    if not args.json:
        kits = 1 + len(settings.sites) + (settings.admin is not None)
        print(f"{args.output}: {len(made)} new of {kits} kits, valid {settings.valid_days} days")
        for kit in made:
            runs = {settings.server.name: "server", settings.admin: "job list"}.get(kit.name, "site")
            print(f"  {kit}  to whoever runs {kit.name} (fedbio {runs} --kit {kit.name} ...)")
        if made:
            print("Hand each kit over by a safe way: its private.key is that party's identity.")
        print(f"Keep {args.output / 'ca'} to yourself: whoever has it can make kits.")
    return {"made": [str(kit) for kit in made], "authority": str(args.output / "ca")}
