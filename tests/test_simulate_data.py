"""Synthetic proteins for the sites of a simulated job."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbio.cli.simulate import _deal_out_demo
from fedbio.proteins import read


# whole families are taken, so numbers are about these
@pytest.mark.parametrize(("sites", "all_of_one", "tests"), [(60, 100, 300), (400, 75, 75)])
def test_work_of_all_sites_grows_with_their_number_and_not_beyond(
    sites: int, all_of_one: int, tests: int, tmp_path: Path
) -> None:
    names = [f"site-{number}" for number in range(1, sites + 1)]
    _deal_out_demo(names, tmp_path, tmp_path / "data")
    found = [list(read(tmp_path / "data" / f"{name}.fasta")) for name in names]
    drawn = [{each.id for each in site if each.set == "test"} for site in found]
    assert all(each == drawn[0] for each in drawn)
    assert 0.8 * tests < len(drawn[0]) < 1.2 * tests
    assert all(0.75 * all_of_one < len(site) - len(drawn[0]) < 1.25 * all_of_one for site in found)
