"""``fedbio report``: what a run found, as one HTML page and as tables."""

from __future__ import annotations

__all__ = ["EXAMPLE", "configure", "run"]

import argparse
from pathlib import Path
from typing import Any

EXAMPLE = "fedbio report results/demo"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the run's folder and where the page goes."""
    parser.add_argument("run", type=Path, help="the folder of a run, or one site's own folder")
    parser.add_argument("-o", "--output", type=Path, metavar="HTML", help="the page; RUN/report.html if not given")
    parser.add_argument(
        "--job", metavar="NAME", help="a further classify job of this run; its report goes to RUN/studies/NAME/"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the tables, the summary and the page, and say what was found."""
    from fedbio.report import collect, headline_line, study, summarize, write_page, write_summary

    found = study(collect(args.run, args.job))
    summary = write_summary(found)
    page = write_page(found, args.output or found.run.folder / "report.html")
    line = headline_line(found)
    if not args.json:
        print(f"report: {page}\n{line}")
    return {"report": str(page), "summary": str(summary), "found": line, **summarize(found)}
