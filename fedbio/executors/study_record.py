"""Where a site says what it knows of a study: in its own record, or, of a further study, beside its results."""

from __future__ import annotations

__all__ = ["study_record"]

import contextlib
from collections.abc import Iterator

import msgspec

from fedbio.federation.executor import SiteContext
from fedbio.federation.workflows.study import study_folder
from fedbio.results import PARTY_FILE, PartyRecord, read_party, utc_now, write_party


@contextlib.contextmanager
def study_record(context: SiteContext, place: str) -> Iterator[PartyRecord]:
    """Lend the record of a study, to be changed.

    Parameters
    ----------
    context : SiteContext
    place : str
        See `fedbio.federation.workflows.study.study_folder`.
    """
    if not place:
        yield context.record
        return
    folder = study_folder(context.workspace, place)
    kept = folder / PARTY_FILE
    record = read_party(kept) if kept.exists() else PartyRecord(context.site, "site", started=utc_now())
    yield record
    # what the site has done and sent so far is of all its jobs
    whole = context.record
    record = msgspec.structs.replace(
        record, versions=whole.versions, seconds=whole.seconds, sent=whole.sent, remarks=whole.remarks
    )
    record.finished = utc_now()
    folder.mkdir(parents=True, exist_ok=True)
    write_party(folder, record)
