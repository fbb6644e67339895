"The built site as a reader opens it, from the disk: nothing is asked of the network, links, search and widgets work."
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import docs

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(1600)]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of a site built here; $CAPE_SITE may name one that is built already"
    if os.environ.get("CAPE_SITE"): return Path(os.environ["CAPE_SITE"]).resolve()
    for need in docs.NEEDS:
        if importlib.util.find_spec(need) is None: pytest.skip(f"{need} is not installed: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, ROOT / "tools/docs.py", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return out / "html"


@pytest.fixture
def reader(page, site):
    "A page that fails the test when it asks for anything outside the site, or for what is not there"
    asked = []
    def request(r): asked.extend([] if re.match("file:|data:|blob:", r.url) else [r.url])
    def failed(r): asked.extend([] if "ABORTED" in r.failure else [f"{r.url} {r.failure}"])  # aborted: the page was left
    page.on("request", request)
    page.on("requestfailed", failed)
    page.look = lambda name: page.goto(f"{site.as_uri()}/{name}", wait_until="load")
    yield page
    assert not asked, asked


def wide(page):
    "By how many pixels the page is wider than the window"
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def pictures(page):
    "Whether every picture of the article was drawn, and how many there are"
    page.evaluate("document.querySelectorAll('article img').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.querySelectorAll('article img')].every(i => i.complete)")
    return page.evaluate("""() => {
        const all = [...document.querySelectorAll('article img')]
        return [all.every(i => i.naturalWidth > 0), all.length] }""")


def test_start_page_leads_to_a_chapter_and_its_module(reader, tmp_path):
    reader.look("index.html")
    assert pictures(reader) == [True, 2]
    expect(reader.locator("article h1")).to_contain_text("cape")
    expect(reader.locator("nav.bd-links")).to_contain_text("Knowledge of the base categories")
    reader.screenshot(path=tmp_path / "start.png")
    reader.locator("article").get_by_role("link", name="12_prototypes", exact=True).click()
    expect(reader.locator("article h1")).to_contain_text("prototypes")
    reader.locator("article").get_by_role("link", name="cape.models.prototype", exact=True).first.click()
    expect(reader.locator("article h1")).to_contain_text("cape.models.prototype")
    reader.locator("article").get_by_role("link", name="12_prototypes").click()
    expect(reader.locator("article h1")).to_contain_text("prototypes")


def test_chapter_has_figures_formulas_and_no_directives(reader, tmp_path):
    reader.look("12_prototypes.html")
    drawn, count = pictures(reader)
    assert drawn and count >= 4
    boxes = [m.bounding_box() for m in reader.locator("article math").all()]
    assert len(boxes) >= 6 and all(b["width"] > 3 and b["height"] > 5 for b in boxes)
    assert reader.evaluate("document.fonts.check('16px \"STIX Two Math\"')")
    text = reader.locator("article").inner_text()
    assert "#|" not in text and "$" not in text and "fastcore" not in text
    reader.screenshot(path=tmp_path / "chapter.png", full_page=True)


def test_api_page_says_what_the_arguments_are(reader, tmp_path):
    reader.look("api/cape.models.base.html")
    entry = reader.locator("dl.py", has=reader.locator('[id="cape.models.base.create_model"]')).first
    expect(entry).to_contain_text("A new model.")
    expect(entry.locator("table")).to_contain_text("one of list_models()")
    entry.get_by_role("link", name="ConfigError").click()
    assert reader.url.endswith("api/cape.errors.html#cape.errors.ConfigError")
    reader.go_back()
    reader.screenshot(path=tmp_path / "api.png")


def test_search_works_without_a_server(reader, tmp_path):
    reader.look("search.html?q=sinkhorn")
    expect(reader.locator("#search-results li").first).to_be_visible(timeout=30_000)
    expect(reader.locator("#search-results")).to_contain_text("sinkhorn")
    reader.screenshot(path=tmp_path / "search.png")
    reader.look("search.html?q=make_heatmaps")
    expect(reader.locator("#search-results a[href*='api/cape.data.crops']").first).to_be_visible(timeout=30_000)


def test_click_tool_is_live_without_a_kernel(reader, site, tmp_path):
    if not (site / "_static/start.js").exists(): pytest.skip("the widgets' scripts could not be fetched: no network")
    reader.look("43a_click_widget.html")
    tool = reader.locator(".cape-clicks").first
    tool.locator("img.photo").wait_for(timeout=30_000)
    tool.scroll_into_view_if_needed()
    points = tool.locator("circle")
    before = points.count()
    circle = points.first
    circle.click(button="right")                                  # takes the point away
    expect(points).to_have_count(before - 1)
    box = tool.locator("img.photo").bounding_box()
    tool.locator("img.photo").click(position=dict(x=box["width"] * .9, y=box["height"] * .9))
    expect(points).to_have_count(before)                          # the next click puts it here
    assert tool.locator("ol").bounding_box()["x"] > box["x"] + box["width"]   # beside the photo, as in JupyterLab
    placed = tool.locator("circle[data-k='0']").bounding_box()
    assert placed["x"] + placed["width"] / 2 == pytest.approx(box["x"] + box["width"] * .9, abs=1)
    assert placed["y"] + placed["height"] / 2 == pytest.approx(box["y"] + box["height"] * .9, abs=1)
    reader.screenshot(path=tmp_path / "click.png")


def test_every_widget_is_drawn(reader, site):
    view = 'type="application/vnd.jupyter.widget-view+json"'
    found = {p.name: p.read_text(encoding="utf-8").count(view) for p in site.glob("*.html")}
    for name, count in found.items():
        if not count: continue
        reader.look(name)
        expect(reader.locator(".widget-subarea > *")).to_have_count(count, timeout=30_000)
    if not any(found.values()): pytest.skip("no live widgets: their scripts could not be fetched")


def test_slider_swaps_pictures_without_a_kernel(reader, site, tmp_path):
    if not (site / "_static/start.js").exists(): pytest.skip("the widgets' scripts could not be fetched: no network")
    reader.look("20_super_keypoints.html")
    handle, shown = reader.locator(".noUi-handle").first, reader.locator(".widget-image:visible, img.widget-image:visible").first
    handle.wait_for(timeout=30_000)
    before = shown.get_attribute("src")
    handle.focus()
    handle.press("ArrowRight")
    reader.wait_for_timeout(300)
    assert shown.get_attribute("src") != before
    handle.scroll_into_view_if_needed()
    reader.screenshot(path=tmp_path / "slider.png")


@pytest.mark.parametrize("name", ["index", "12_prototypes", "30_graphs", "43a_click_widget", "api/cape.models.base"])
def test_fits_a_phone(reader, name, tmp_path):
    reader.set_viewport_size(dict(width=400, height=800))
    reader.look(f"{name}.html")
    assert wide(reader) <= 0
    reader.screenshot(path=tmp_path / "phone.png")
