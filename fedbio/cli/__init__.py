"""The command line: one thin file per command, found by its name.

A command's module defines ``EXAMPLE``, ``configure(parser)`` and
``run(args)``, which returns what ``--json`` prints. Only the module of the command that is run is imported.
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import errno
import importlib
import json
import logging
import os
import signal
import sys
import traceback
from types import FrameType, ModuleType
from typing import Any, NoReturn

from fedbio import __version__
from fedbio.cli.parsers import Parser, subparsers_of
from fedbio.cli.terminal import LogFormatter, shown
from fedbio.errors import FedbioError

COMMANDS = {
    "data": "List, fetch, check, make and split protein data sets.",
    "encoder": "List, fetch, show and convert encoders.",
    "embed": "Embed a FASTA file into an HDF5 store.",
    "embeddings": "Look into embeddings files, merge and convert them.",
    "pretrain": "Train an encoder on proteins by masked-language modelling.",
    "provision": "Make certificates and one start-up kit per party.",
    "server": "Run the federation's server until its jobs are done.",
    "site": "Take part in a federation's jobs from this site.",
    "job": "Make a job file, send it to a running server, follow it and fetch its results.",
    "simulate": "Run a server and all sites on this machine.",
    "train": "Train the classifier alone on embedded proteins.",
    "predict": "Predict locations for new proteins.",
    "report": "Write the report of a run.",
    "settings": "Check a settings file, or print its JSON schema.",
}
"""Commands in the order of the help page; the same line opens each command's own help."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code (0, 1, 2, 3, 4 or 130, see `fedbio.errors`)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _interrupt)
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name not in COMMANDS:
        _overview().parse_args(arguments)
        _overview().print_help()
        return 2
    module = importlib.import_module(f"fedbio.cli.{name}")
    args = _command_parser(name, module).parse_args(arguments[arguments.index(name) + 1 :])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.INFO, handlers=[handler])
    return _guarded(module, args)


def _guarded(module: ModuleType, args: argparse.Namespace) -> int:
    """Run a command and turn what a person can mend into one line and an exit code."""
    try:
        result: dict[str, Any] | None = module.run(args)
        if args.json:
            print(json.dumps(result or {}), flush=True)
        return 0
    except FedbioError as error:
        if args.debug:
            traceback.print_exc()
        return _fail(args, error.exit_code, "\n".join([str(error), *getattr(error, "__notes__", ())]))
    except KeyboardInterrupt:
        return _fail(args, 130, "stopped; the same command goes on from here")
    except BrokenPipeError:
        raise  # who reads our output has enough of it
    except OSError as error:
        # a missing file, a closed folder or a full disk is this machine's matter, not a bug of ours
        if args.debug or error.errno not in _MACHINE_ERRORS:
            traceback.print_exc()
            return _fail(args, 1, str(error))
        where = error.filename or "this machine"
        return _fail(args, 2, f"{where}: {error.strerror}; {_MACHINE_ERRORS[error.errno]}")
    except Exception:
        traceback.print_exc()
        return _fail(args, 1, "this is a bug of fedbio; please report it with the lines above")


def _fail(args: argparse.Namespace, code: int, reason: str) -> int:
    """Say why a command ends, to a person and perhaps to a program, and return its exit code."""
    print(f"fedbio: {shown(reason)}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": reason, "exit_code": code}), flush=True)
    return code


_MACHINE_ERRORS: dict[int | None, str] = {
    errno.ENOENT: "check the path",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "check the path",
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    # a supervisor's SIGTERM and a person's Ctrl-C leave by the same door
    raise KeyboardInterrupt


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    parser = Parser(
        prog="fedbio",
        usage="fedbio COMMAND [INPUTS] [OPTIONS]",
        description="Federated learning from protein sequences that stay where they are.",
        epilog=f"commands:\n{listing}\n\nEach command has its own --help with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedbio {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Show every default that there is, and the example as it was written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], False) else super()._get_help_string(action)


def _command_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"fedbio {name}",
        description=COMMANDS[name],
        epilog=f"example:\n  {module.EXAMPLE.strip()}",
        formatter_class=_HelpFormatter,
    )
    module.configure(parser)
    subparsers = subparsers_of(parser)
    for each in (*subparsers, *(() if subparsers else (parser,))):
        each.formatter_class = _HelpFormatter
        each.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
        each.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    return parser


def entry() -> NoReturn:
    """Console script: run `main` and leave with its exit code, also when the reader of stdout has gone."""
    try:
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 2
        sys.stdout.flush()
    except BrokenPipeError:
        code = 0
    logging.shutdown()
    # everything is written: what is left is the teardown of libraries, seconds of it for torch on a busy machine
    os._exit(code)
