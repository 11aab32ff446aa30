"""The manual's pages on jobs: every job file in them is valid, and no workflow and no setting is forgotten."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
import yaml

from fedbio import settings
from fedbio.settings_jobs import FedAvgJob

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("federation.md", "jobs.md", "workflows.md", "quantization.md")
JOB_FILES = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.S))
    if block.startswith("jobs:\n")
]


def test_there_are_job_files_in_the_manual() -> None:
    assert len(JOB_FILES) >= 7


@pytest.mark.parametrize("block", JOB_FILES)
def test_job_file_of_the_manual_is_valid(block: str) -> None:
    settings.JobsFile.model_validate(yaml.safe_load(block))


def test_every_workflow_is_in_the_index() -> None:
    index = (DOCS / "workflows.md").read_text().partition("\n## ")[0]
    named = set(re.findall(r"^\| \[`(\w+)`\]\([\w.]*#[\w-]+\)", index, re.M))
    assert named == set(typing.get_args(settings.WorkflowName))


def test_every_link_within_the_page_of_workflows_leads_to_a_heading() -> None:
    page = (DOCS / "workflows.md").read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", page, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings


def test_every_setting_of_federated_averaging_is_in_its_table() -> None:
    page = (DOCS / "workflows.md").read_text()
    table = page.partition("## Federated averaging\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)
    named = {name.partition(".")[0] for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    # byzantine and trim belong to rules that have tables of their own
    assert set(FedAvgJob.model_fields) - {"name", "workflow", "byzantine", "trim"} == named - {"federation"}
