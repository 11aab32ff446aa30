"""Run the command line as ``python -m fedbio``."""

from __future__ import annotations

from fedbio.cli import entry

if __name__ == "__main__":
    entry()
