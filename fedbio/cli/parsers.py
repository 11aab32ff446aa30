"""Parsers of command lines that name the nearest word for one that nobody knows."""

from __future__ import annotations

__all__ = ["Parser", "subparsers_of"]

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that asks "did you mean" of misspelt commands, options and choices, which argparse learns with 3.14."""

    def __init__(self, **options: Any) -> None:
        # a shortened option would come to mean another one with the next release
        super().__init__(**options, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments, or leave with exit code 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [name for each in (self, *subparsers_of(self)) for name in each._option_string_actions]
            option = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(option, known)}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _nearest(value, map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        """Leave with the message and exit code 2; the help has the rest."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help shows what there is\n")


def subparsers_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of a command's own commands."""
    return [
        sub
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for sub in action.choices.values()
    ]


def _nearest(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6) if isinstance(word, str) else []
    return f"; did you mean {near[0]}?" if near else ""
