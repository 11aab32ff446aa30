"""Synthetic proteins for the sites of a simulated job."""

from __future__ import annotations

from pathlib import Path

from fedbio.cli.simulate import DEMO_PROTEINS, DEMO_TEST, _deal_out_demo
from fedbio.proteins import read


def test_work_of_a_site_does_not_grow_with_the_number_of_sites(tmp_path: Path) -> None:
    names = [f"site-{number}" for number in range(1, 61)]
    _deal_out_demo(names, tmp_path, tmp_path / "data")
    sites = [list(read(tmp_path / "data" / f"{name}.fasta")) for name in names]
    tests = [{each.id for each in site if each.set == "test"} for site in sites]
    assert all(each == tests[0] for each in tests)
    # whole families are taken, so the number is about that
    assert 0.9 * DEMO_TEST < len(tests[0]) < 1.1 * DEMO_TEST
    assert all(0.8 * DEMO_PROTEINS < len(site) - len(tests[0]) < 1.2 * DEMO_PROTEINS for site in sites)
