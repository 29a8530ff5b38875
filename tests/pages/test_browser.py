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
from mixturelens.features.record import FeatureRecord
from mixturelens.routing.circuit import CircuitRecord

pytestmark = pytest.mark.browser

READY = "querySelector('html[data-ready], main > .circuit[data-started]')"
"""What is there once all is drawn."""
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference" / "records" / "sft--rl-A"
MISSING = "not installed: pip install '.[dev]'"


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
        self.tab.wait_for_function(f"document.{READY}", timeout=60_000)

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


@pytest.mark.slow
@pytest.mark.parametrize("look", ["dark", "light", "phone"])
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


@pytest.mark.slow
def test_a_comparison_keeps_nobody_out(chromium: Any, tmp_path: Path) -> None:
    _, path = ml.compare(make_run(tmp_path / "one"), make_run(tmp_path / "two", share=0.7), tmp_path / "out")
    page = Opened(chromium, path, **LOOKS["phone"])
    assert page.tab.locator(".plot-container.plotly").count() == 1
    assert page.violations() == []
    assert page.said == []
    assert page.asked == [path.as_uri()]


def test_a_circuit_has_a_slider_hover_and_click(chromium: Any, tmp_path: Path) -> None:
    """The reference run's: sizes, what hangs together with a node, and what is behind one."""
    record, features = (kind.load(REFERENCE / f"{kind.KIND}.json") for kind in (CircuitRecord, FeatureRecord))
    path = ml.circuit_view(record, "hint", features=features).save(tmp_path / "circuit.html")
    page = Opened(chromium, path, color_scheme="dark")
    tab = page.tab
    before, after = (tab.locator(f"[data-side={side}]") for side in ("before", "after"))
    shown, slider = ".edge[data-rank]:not([display])", tab.locator("input[type=range]")
    first = [side.locator(shown).count() for side in (before, after)]
    assert all(40 <= count < 60 for count in first), "the 40 strongest of either side, on both"

    slider.focus()
    for _ in range(37):
        tab.keyboard.press("ArrowLeft")
    assert tab.locator("output").inner_text() == "3"
    assert [side.locator(shown).count() for side in (before, after)] == [4, 4]
    drawn = {node.get_attribute("data-node") for node in after.locator(".node:not([display])").all()}
    assert drawn == {"input@1", "L0.h3@1", "L2.h0@7", "L2.h1@7", "L2.mlp@7", "logits@7"}
    slider.fill("120")
    assert before.locator(shown).count() == 120

    slider.fill("40")
    head = after.locator('[data-node="L2.h0@7"]')
    head.hover()
    assert "L2.h0 at =" in tab.locator(".tip").inner_text()
    faded = after.locator(".edge.faded:not([display])").count()
    assert 0 < faded < first[1]
    assert before.locator(".faded").count() == 0
    edge = after.locator('.edge[data-from="L2.mlp@7"][data-to="logits@7"] .line')
    edge.hover(force=True)
    assert "score 0.759 [0.753, 0.763]" in tab.locator(".tip").inner_text()
    tab.mouse.move(2, 2)
    assert tab.locator(".tip").is_hidden()
    assert tab.locator(".faded:visible").count() == 0 or tab.locator("svg.near").count() == 0

    head.click()
    panel = tab.locator(".panel")
    said = panel.inner_text()
    look = next(
        e for of in record.circuits[2:] if of.kind == "hint" for e in of.looks if (e.head, e.position) == ("L2.h0", 7)
    )
    assert "L2.h0 at = (position 7)" in said
    assert "R (after): where L2.h0 looks from =" in said
    assert f"{look.clean[1]:.2f}" in said
    assert "L2.attn_out@7 feature 60" in said
    assert "L2.h0 → L2.mlp at =; score 0.465" in said

    head.press("ArrowUp")
    tab.keyboard.press("Enter")
    assert "L2.mlp at =" in panel.inner_text()
    tab.keyboard.press("Escape")
    assert panel.is_hidden()
    head.click()
    assert page.violations() == []
    assert page.said == []
    assert page.asked == [path.as_uri()]


def test_two_circuits_of_a_notebook_leave_each_other_alone(chromium: Any, tmp_path: Path) -> None:
    record = CircuitRecord.load(REFERENCE / "circuit.json")
    frames = "".join(ml.circuit_view(record, kind)._repr_html_() for kind in ("cue", "hint"))
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><title>A notebook</title><main>{frames}</main>", encoding="utf-8")
    tab = chromium.new_page()
    tab.goto(path.as_uri())
    one, other = (tab.frame_locator("iframe").nth(i) for i in (0, 1))
    one.locator("input[type=range]").fill("2")
    assert one.locator("output").inner_text() == "2"
    assert other.locator("output").inner_text() == "40"
