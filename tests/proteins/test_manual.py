"""docs/data.md says what the tables and the example in the code say."""

from __future__ import annotations

import re
from pathlib import Path

from fedbio.proteins import COMPARTMENTS, datasets
from fedbio.proteins.labels import SYNONYMS

MANUAL = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_plugin_example_is_the_one_that_is_tested() -> None:
    example = re.search(r"```python\n(.*?)```", MANUAL, re.DOTALL)
    assert example is not None
    assert datasets.__doc__ is not None
    lines = [line.strip() for line in datasets.__doc__.splitlines()]
    assert all(line.strip() in lines for line in example.group(1).splitlines())


def test_the_table_of_labels_is_the_one_in_the_code() -> None:
    section = MANUAL[MANUAL.index("## Labels") : MANUAL.index("## UniProt's locations")]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)[1:]
    assert [name for name, _ in rows if name in COMPARTMENTS] == list(COMPARTMENTS)
    written = {name.lower(): label for label, names in rows if label in COMPARTMENTS for name in names.split(", ")}
    assert written == SYNONYMS


def test_every_data_set_is_described() -> None:
    assert all(f"`{name}`" in MANUAL for name in datasets.DATASETS)
