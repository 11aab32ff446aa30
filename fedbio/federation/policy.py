"""What a site's operator lets the server's jobs do there, beyond the kinds of task."""

from __future__ import annotations

__all__ = ["ANY", "Policy"]

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fedbio.errors import SettingsError
from fedbio.files import sha256_file

ANY = "any"
"""Instead of a digest or a file: whatever the server sends may run."""

_DIGEST_LETTERS = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one site.

    Parameters
    ----------
    workflows : tuple of str or None
        Workflows that the site takes part in; None means all.
    max_rounds : int or None
        The most rounds of a job that it takes part in.
    code : frozenset of str
        SHA-256 digests of the files that may run here, or `ANY`; nothing runs by default.
    min_count : int
        No count below it leaves the site with a job of statistics.
    last_lines : int
        How many of the last lines that a failed script has written go to the server.
    files : mapping of str to str
        SHA-256 digests in `code` by the name of the file that they were taken from.
    """

    workflows: tuple[str, ...] | None = None
    max_rounds: int | None = None
    code: frozenset[str] = frozenset()
    min_count: int = 1
    last_lines: int = 0
    files: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def read(
        cls,
        folder: Path,
        *,
        workflows: Iterable[str] | None,
        max_rounds: int | None,
        code: Iterable[str],
        min_count: int = 1,
        last_lines: int = 0,
        files: Mapping[str, str] | None = None,
    ) -> Self:
        """Return the rules of a site's settings; a file in `folder` that they name stands for its present content.

        `files` names the digests in `code` that were taken from files elsewhere.

        Raises
        ------
        SettingsError
            If there is no such file.
        """
        digests = set()
        known = dict(files or {})
        for entry in code:
            if entry == ANY or (len(entry) == 64 and set(entry) <= _DIGEST_LETTERS):
                digests.add(entry)
            elif (folder / entry).is_file():
                digests.add(digest := sha256_file(folder / entry))
                known[entry] = digest
            else:
                raise SettingsError(
                    f"code: there is no file {entry} in {folder}; give the name of a file there, a SHA-256 of 64 "
                    f"hexadecimal digits, or {ANY}"
                )
        return cls(
            workflows=None if workflows is None else tuple(workflows),
            max_rounds=max_rounds,
            code=frozenset(digests),
            min_count=min_count,
            last_lines=last_lines,
            files=known,
        )

    def allows_code(self, sha256: str, name: str) -> bool:
        """Whether a file may run here; `name` is only what the server calls it, its content decides."""
        return ANY in self.code or sha256 in self.code

    def problem(self, workflow: str, rounds: int) -> str:
        """Return why this site takes no part in a job of a workflow with so many rounds; empty if it does."""
        if self.workflows is not None and workflow not in self.workflows:
            return f"takes no part in workflow {workflow!r} (takes part in: {', '.join(self.workflows) or 'none'})"
        if self.max_rounds is not None and rounds > self.max_rounds:
            return f"takes part in at most {self.max_rounds} rounds, this job has {rounds}"
        return ""
