"""Write an untrained encoder of the shape of a trained one: ``python benchmarks/untrained.py ENCODER -o DIR``.

What training was worth is seen beside it. ENCODER is a path or a name, as everywhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from fedbio.encoder import load_encoder_weights, untrained_weights
from fedbio.weights import write_weights


def main() -> int:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", help="a folder, a file or a name")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    args = parser.parse_args()
    config, _ = load_encoder_weights(args.encoder)
    config = msgspec.structs.replace(config, name=f"untrained-{config.name}", trained=False)
    write_weights(args.output, config, untrained_weights(config, args.seed), "float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
