"""The page says what was found, no more, in every kind of run."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedbio.errors import MachineError
from fedbio.report import Run, collect, headline_line, study, write_page
from fedbio.report.drawing import Drawing
from fedbio.report.ledger import kinds_sent, statement
from fedbio.results import Traffic, read_party, write_party


class Outline(HTMLParser):
    """Ids, headings, references and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.text = re.sub(r"\s+", " ", self.text)
        self.references = re.findall(r'(?:href="#|url\(#)([^")]+)', page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id" and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> str:
    return write_page(study(collect(folder)), folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(whole_page: Path) -> str:
    return whole_page.read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawings out where a test is about the page's words: they take most of the time."""
    for room in ("accuracy_plates", "class_plates", "site_plates"):
        monkeypatch.setattr(f"fedbio.report.{room}.draw", lambda *_, **__: Drawing("", ""))


def test_page_opens_with_what_joining_was_worth(page: str) -> None:
    text = Outline(page).text
    assert "Joining was worth 12.7 points of accuracy: 71.7 % together against 59.0 % alone" in text
    assert "it was zero or less in 0 of 2,000 resamples" in text


def test_page_says_plainly_that_proteins_are_synthetic_and_the_encoder_untrained(page: str) -> None:
    text = Outline(page).text
    assert text.index("Untrained encoder.") < text.index("Figure 1.")
    assert text.index("Synthetic proteins.") < text.index("Figure 1.")


def test_page_names_an_untrained_encoder_as_one_from_its_first_line(page: str) -> None:
    assert "encoder esm1nv-44m, untrained" in Outline(page).text
    assert "perplexity" not in Outline(page).text.lower()


@pytest.mark.usefixtures("undrawn")
def test_page_tells_the_perplexity_beside_the_encoders_name(invent: Callable[..., Path]) -> None:
    text = Outline(page_of(invent(trained=True, perplexity=11.204))).text
    assert text.index("encoder esm1nv-44m, perplexity 11.20") < text.index("Figure 1.")
    assert "11.20 at masked residues of held-out proteins" in text
    assert "ntrained" not in text


def test_page_has_all_sections_and_figures(page: str) -> None:
    outline = Outline(page)
    sections = ["size", "sites", "compartments", "who", "rounds", "map", "left", "made"]
    assert [name for name in outline.ids if name in sections] == sections
    assert outline.tags.count("figure") == 7
    assert outline.tags.count("svg") == 14
    assert outline.tags.count("h1") == 1
    assert "script" not in outline.tags


def test_ids_are_unique_and_references_lead_somewhere(page: str) -> None:
    outline = Outline(page)
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(outline.references) <= set(outline.ids)


def test_page_stays_below_a_megabyte(page: str) -> None:
    assert len(page) < 1_000_000


@pytest.mark.slow
def test_same_run_gives_the_same_bytes(invent: Callable[..., Path]) -> None:
    folder = invent()
    assert page_of(folder) == page_of(folder)


def test_what_left_names_every_kind_and_the_map(page: str) -> None:
    text = Outline(page).text
    assert (
        "No sequence and no embedding left a site: the sites' own ledgers list model, metrics, counts, sums, " in text
    )
    assert "two coordinates of each mapped protein did leave" in text
    assert "214 MB" in text


def test_scheme_in_which_weights_left_is_named(invent: Callable[..., Path]) -> None:
    folder = invent()
    assert dict(kinds_sent(collect(folder)))["model"] == "weights of classifiers"
    for site in ("site-1", "site-2"):
        record = read_party(folder / site / "party.json")
        record.settings["quantization"] = {"to_sites": None, "to_server": "nf4", "error_feedback": False}
        write_party(folder / site, record)
    said = dict(kinds_sent(collect(folder)))["model"]
    assert said == "weights of classifiers; those of rounds as nf4, whose bytes are counted"


def test_an_unknown_kind_of_message_is_not_talked_away(invent: Callable[..., Path]) -> None:
    folder = invent()
    record = read_party(folder / "site-1" / "party.json")
    record.sent["gradients"] = Traffic(1, 5)
    write_party(folder / "site-1", record)
    said = statement(collect(folder))
    assert "No sequence" not in said
    assert "kinds of messages that this report does not know (gradients)" in said


@pytest.mark.usefixtures("undrawn")
def test_without_a_map_there_is_no_map(invent: Callable[..., Path]) -> None:
    outline = Outline(page_of(invent(with_map=False)))
    assert "map" not in outline.ids
    assert "coordinates" not in outline.text


@pytest.mark.usefixtures("undrawn")
def test_a_sites_own_report_has_no_central_model(invent: Callable[..., Path]) -> None:
    text = Outline(page_of(invent(seeds=(0, 1)) / "site-2")).text
    assert "For site-2, joining was worth" in text
    assert "the one that the site trained alone" in text
    assert "All in one place" not in text.split("Figure 1.")[0]
    assert "What this site gained" in text
    assert "site-1" not in text.split("Figure 6.")[1].split("Figure 7.")[0]


@pytest.mark.usefixtures("undrawn")
def test_a_federated_model_that_is_worse_is_called_worse(invent: Callable[..., Path]) -> None:
    folder = invent(gain=-0.25, seeds=(0, 1, 2))
    assert "Joining cost" in Outline(page_of(folder)).text


@pytest.mark.usefixtures("undrawn")
def test_a_gain_within_chance_is_called_unclear(invent: Callable[..., Path]) -> None:
    folder = invent(gain=0.0)
    assert "Joining made no clear difference" in Outline(page_of(folder)).text
    assert ": no clear difference; MLP 32; encoder " in headline_line(study(collect(folder)))


@pytest.mark.usefixtures("undrawn")
def test_a_single_seed_is_named(invent: Callable[..., Path]) -> None:
    assert "one per site; a single seed" in Outline(page_of(invent())).text


@pytest.mark.usefixtures("undrawn")
def test_a_single_site_is_named(invent: Callable[..., Path]) -> None:
    text = Outline(page_of(invent(sites=1))).text
    assert "One site only." in text
    assert "that 1 site trained together" in text


@pytest.mark.usefixtures("undrawn")
def test_a_class_without_test_proteins_has_no_score(invent: Callable[..., Path]) -> None:
    page = page_of(invent(absent="Plastid"))
    cells = re.findall(r'<th scope="row">Plastid</th>((?:<td>[^<]*</td>)+)', page)
    assert cells[0] == "<td>0</td><td>–</td><td>–</td><td>–</td><td>–</td>"


@pytest.mark.usefixtures("undrawn")
def test_a_trained_encoder_on_real_proteins_has_no_notice(invent: Callable[..., Path]) -> None:
    text = Outline(page_of(invent(trained=True, synthetic=False))).text
    assert "Untrained encoder." not in text
    assert "Synthetic proteins." not in text


@pytest.mark.usefixtures("undrawn")
def test_a_model_no_better_than_guessing_is_called_so(invent: Callable[..., Path]) -> None:
    assert "Close to guessing." in Outline(page_of(invent(alone=0.2, gain=0.05))).text


@pytest.mark.usefixtures("undrawn")
def test_a_partys_remark_is_shown(invent: Callable[..., Path]) -> None:
    folder = invent()
    record = read_party(folder / "site-1" / "party.json")
    record.remarks = ["ran out of <patience> & time"]
    write_party(folder / "site-1", record)
    page = page_of(folder)
    assert "ran out of &lt;patience&gt; &amp; time" in page


@pytest.mark.usefixtures("undrawn")
def test_many_sites_are_drawn_as_one_and_named_in_the_tables(invent: Callable[..., Path]) -> None:
    folder = invent(sites=30, proteins=2000)
    for number in range(1, 31):
        record = read_party(folder / f"site-{number}" / "party.json")
        record.remarks = [f"site-{number} was slow"]
        write_party(folder / f"site-{number}", record)
    page = page_of(folder)
    text = Outline(page).text
    assert "What each of the 30 sites gained" in text
    assert "the darker, the more; white is none" in text
    assert "Training alone is drawn for all sites together" in text
    assert "Beside all 30 sites together, the 8 with the most points are shown." in text
    # a row for each site, and one for all of them, in what can be unfolded
    assert page.count('<th scope="row">site-30</th>') >= 4
    assert '<th scope="row">all sites</th>' in page
    assert "<summary>Bytes that left each site, by kind</summary>" in page
    # what all have in common is said once
    assert re.search(r'<th scope="row">[^<]* and \d\d more</th>', page)
    assert "site-3 was slow" in text
    assert "site-4 was slow" not in text
    assert "27 further remarks" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"absent": "Plastid"},
        {"sites": 1},
        {"sites": 30, "proteins": 5000},
        {"mlps": ("16", "32", "64"), "seeds": (0, 1)},
        {"with_map": False, "central": False},
    ],
    ids=["absent class", "one site", "many sites and points", "three MLPs", "no map, no central"],
)
def test_every_kind_of_run_can_be_drawn(invent: Callable[..., Path], options: dict[str, Any]) -> None:
    outline = Outline(page_of(invent(**options)))
    assert outline.tags.count("svg") == 2 * (7 - (options.get("with_map") is False))
    assert set(outline.references) <= set(outline.ids)


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    whole_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    really_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return really_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MachineError, match=rf"need.? {library}.*pip install 'fedbio\[report\]'"):
        write_page(study(whole_run), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
