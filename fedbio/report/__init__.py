"""Turn what the parties of a run left behind into tables, figures and one page: result files in, a report out."""

from __future__ import annotations

__all__ = [
    "Estimate",
    "Run",
    "Study",
    "collect",
    "headline_line",
    "study",
    "summarize",
    "write_page",
    "write_summary",
]

from fedbio.report.bootstrap import Estimate
from fedbio.report.collect import Run, collect
from fedbio.report.page import write_page
from fedbio.report.study import Study, study
from fedbio.report.summary import summarize, write_summary
from fedbio.report.words import headline_line
