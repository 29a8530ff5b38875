"""Pages in a real browser: they draw, complain of nothing, ask no network, and can be used by everybody."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_compared import make_run
from test_report import write

import mixturelens as ml

pytestmark = pytest.mark.browser

MISSING = "not installed: pip install 'mixturelens[dev]'"


class Opened:
    """A page in a tab of its own, and what it complained of or asked for."""

    def __init__(self, chromium: Any, path: Path, **look: Any) -> None:
        self.tab = chromium.new_context(**look).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_function("document.documentElement.dataset.ready === 'yes'", timeout=60_000)

    def violations(self) -> list[str]:
        """What axe-core finds that keeps people from using the page: serious and critical violations."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=f"axe-core is {MISSING}")
        found = axe.Axe().run(self.tab).response["violations"]
        return [
            f"{each['id']}: {each['nodes'][0]['html'][:200]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's chromium, driven by Playwright, which brings none of its own here."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no browser: install Debian's chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason=f"Playwright is {MISSING}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, whose names are hostile: they ask for all that plain ones do, and more."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(path, hostile=True, mechanism=True)
    return path


LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}},
}


@pytest.mark.parametrize("look", ["dark", *(pytest.param(look, marks=pytest.mark.slow) for look in ("light", "phone"))])
def test_a_report_draws_all_figures_and_keeps_nobody_out(chromium: Any, report: Path, look: str) -> None:
    page = Opened(chromium, report, **LOOKS[look])
    figures = page.tab.locator("figure .plot").count()
    assert page.tab.locator(".plot-container.plotly").count() == figures > 30
    assert page.tab.title() != "owned"
    assert page.tab.locator("img").count() == 0
    assert page.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.violations() == []
    arrow_keys_say_points(page)
    figures_fit_on_paper(page)
    assert page.said == []
    assert page.asked == [report.as_uri()]


def arrow_keys_say_points(page: Opened) -> None:
    """Right and left go from point to point of the figure in focus, and each is said."""
    page.tab.locator("#figure-1").focus()
    said = []
    for key in ("Home", "ArrowRight", "End", "ArrowLeft", "ArrowRight"):
        page.tab.keyboard.press(key)
        page.tab.wait_for_timeout(200)
        said.append(page.tab.locator("#live").inner_text())
    assert all(said)
    assert said[0] != said[2] == said[4]


def figures_fit_on_paper(page: Opened) -> None:
    """As the browser prepares to print, figures are drawn for paper, on white; and afterwards as before."""
    widths = "[...document.querySelectorAll('.plot')].map((each) => each._fullLayout.width)"
    before = page.tab.evaluate(widths)
    page.tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.tab.emulate_media(media="print")
    assert set(page.tab.evaluate(widths)) <= {560, 1000}
    assert page.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.tab.emulate_media(media="screen")
    page.tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.tab.evaluate(widths) == before


def test_a_comparison_keeps_nobody_out(chromium: Any, tmp_path: Path) -> None:
    _, path = ml.compare(make_run(tmp_path / "one"), make_run(tmp_path / "two", share=0.7), tmp_path / "out")
    page = Opened(chromium, path, **LOOKS["phone"])
    assert page.tab.locator(".plot-container.plotly").count() == 1
    assert page.violations() == []
    assert page.said == []
    assert page.asked == [path.as_uri()]
