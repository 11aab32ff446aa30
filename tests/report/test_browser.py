"""A real browser opens the page, wide, on a phone and on paper."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def open_at(browser: Any, page: Path, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())


def test_page_asks_for_nothing_and_complains_of_nothing(browser: Any, whole_page: Path) -> None:
    open_at(browser, whole_page, 1200)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # the browser's own start page asks for things too
    urls = [each["request"]["url"] for each in asked if each["documentURL"] == whole_page.as_uri()]
    assert [url for url in urls if not url.startswith("data:")] == [whole_page.as_uri()]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_page_does_not_scroll_sideways(browser: Any, whole_page: Path, width: int) -> None:
    open_at(browser, whole_page, width)
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize(("width", "shown"), [(360, "narrow"), (1200, "wide")])
def test_one_drawing_of_each_figure_is_shown(browser: Any, whole_page: Path, width: int, shown: str) -> None:
    open_at(browser, whole_page, width)
    visible = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].filter(svg => svg.getBoundingClientRect().height > 100)"
        ".map(svg => svg.getAttribute('class'))"
    )
    assert visible == [shown] * 7


@pytest.mark.parametrize("width", [360, 1200])
def test_labels_stay_inside_their_figures(browser: Any, whole_page: Path, width: int) -> None:
    open_at(browser, whole_page, width)
    outside = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].filter(text => {"
        "  const box = text.getBoundingClientRect(), frame = text.closest('svg').getBoundingClientRect();"
        "  return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1);"
        "}).map(text => text.textContent)"
    )
    assert outside == []


def test_text_in_figures_can_be_read_on_a_phone(browser: Any, whole_page: Path) -> None:
    open_at(browser, whole_page, 360)
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('figure svg.narrow text')].map(text => "
        "parseFloat(getComputedStyle(text).fontSize) * text.closest('svg').getBoundingClientRect().width"
        " / text.closest('svg').viewBox.baseVal.width))"
    )
    assert smallest >= 7.5


def test_paper_shows_wide_figures_and_every_table(browser: Any, whole_page: Path) -> None:
    open_at(browser, whole_page, 1200)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = browser.execute_script(
        "return [...document.querySelectorAll('table')]"
        ".filter(table => table.getBoundingClientRect().height < 20).length"
    )
    paper = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert hidden == 0
    assert paper.startswith(b"%PDF")
