"""Bring files to sites: one deadline for all of them, and one that is away holds up no other."""

from __future__ import annotations

__all__ = ["stream_files"]

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedbio.errors import TransportError
from fedbio.federation.controller import Controller
from fedbio.federation.messages import FileHeader

RETRY_S = 1.0
"""Seconds between two attempts to send a file to a site whose connection broke."""


def stream_files(
    controller: Controller, files: Mapping[str, Sequence[tuple[Path, FileHeader]]], kind: str
) -> dict[str, str]:
    """Send each site its files; return the sites that have not taken theirs until the round's deadline, and why.

    Parameters
    ----------
    controller : Controller
        Whose job it is.
    files : mapping of str to sequence of (Path, FileHeader)
        By site, in the order in which they are sent.
    kind : str
        What they are in the ledger of what the server sends.

    Raises
    ------
    FedbioError
        What the job was interrupted with.
    """
    runtime = controller.runtime
    deadline = time.monotonic() + runtime.limits.round_deadline_s
    left = {site: list(each) for site, each in files.items() if each}
    while left:
        why: dict[str, str] = {}
        for site, waiting in list(left.items()):
            try:
                while waiting:
                    path, header = waiting[0]
                    runtime.send_file(site, path, header, kind)
                    runtime.events.write("file sent", site=site, file=header.name, sha256=header.sha256)
                    del waiting[0]
                del left[site]
            except TransportError as error:
                why[site] = str(error)
        if left and time.monotonic() >= deadline:
            for site, reason in why.items():
                runtime.events.write("file not sent", site=site, file=left[site][0][1].name, reason=reason)
            return why
        if left:
            runtime.desk.check()
            time.sleep(RETRY_S)
    return {}
