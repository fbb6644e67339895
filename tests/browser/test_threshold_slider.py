"The slider of the chapter on super-keypoints: every threshold has its picture, and it moves without a kernel."
import re

import nbformat
import pytest
from conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

THRESHOLDS = ["0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.5"]


def chapter():
    nb = nbformat.read(ROOT / "nbs" / "20_super_keypoints.ipynb", as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = []
    return nb


def short_chapter():
    "The chapter up to its toy data, and its slider on them: nothing is trained."
    nb, text = chapter(), lambda c: c.source
    trained = next(i for i, c in enumerate(nb.cells) if text(c).startswith("## A table to cluster"))
    first = next(i for i, c in enumerate(nb.cells) if text(c).startswith("## The threshold as a slider"))
    last = next(i for i, c in enumerate(nb.cells) if "display(slider)" in text(c))
    toy = nbformat.v4.new_code_cell("means, category = plane, owner", id="toy")
    nb.cells = nb.cells[:trained] + [toy] + nb.cells[first:last + 1]
    return nb


def open_slider(page, url):
    "Run all cells of a notebook in JupyterLab, and go to the slider."
    page.goto(url, timeout=120_000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=120_000)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
    handle = page.locator(".noUi-handle")
    for _ in range(600):                       # the Lab makes an output only when it comes into view
        if handle.count(): break
        page.keyboard.press("Control+End")
        page.wait_for_timeout(500)
    handle.wait_for(timeout=10_000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=300_000)
    handle.scroll_into_view_if_needed()
    return handle


def look(page, threshold):
    "The picture that is shown, once it is that of `threshold`; there must be one and no other."
    label = page.locator(".widget-html-content").filter(has_text=re.compile(f"threshold {re.escape(threshold)}\\s*$"))
    expect(label.first).to_be_visible(timeout=20_000)
    shown = [i for i in page.locator("img.widget-image").all() if i.is_visible()]
    assert len(shown) == 1, f"{len(shown)} pictures are shown at threshold {threshold}"
    assert shown[0].evaluate("i => i.complete && i.naturalWidth > 300 && i.naturalHeight > 100")
    return shown[0].screenshot()


def play(page, served, handle, name):
    "Every threshold in turn, by the keyboard; gives the pictures."
    pictures = [look(page, THRESHOLDS[0])]
    handle.focus()
    for threshold in THRESHOLDS[1:]:
        page.keyboard.press("ArrowRight")
        pictures.append(look(page, threshold))
    page.keyboard.press("ArrowRight")          # nothing beyond the last
    assert look(page, THRESHOLDS[-1]) == pictures[-1]
    assert len(set(pictures)) == len(THRESHOLDS), "two thresholds show the same picture"
    (served / f"{name}.png").write_bytes(pictures[3])
    page.screenshot(path=served / f"{name}-page.png")
    return pictures


def test_every_threshold_has_its_picture_and_no_kernel_is_needed(page, lab, served):
    nbformat.write(short_chapter(), served / "threshold.ipynb")
    handle = open_slider(page, lab("threshold.ipynb"))
    pictures = play(page, served, handle, "threshold")
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Shut Down Kernel")).click()
    expect(page.locator(".jp-Notebook-ExecutionIndicator")).not_to_have_attribute("data-status", "busy")
    page.wait_for_timeout(1000)
    handle.focus()
    for threshold, picture in list(zip(THRESHOLDS, pictures))[-2::-1]:
        page.keyboard.press("ArrowLeft")
        assert look(page, threshold) == picture


@pytest.mark.slow
def test_the_whole_chapter_in_the_lab(page, lab, served):
    nbformat.write(chapter(), served / "20_super_keypoints.ipynb")
    handle = open_slider(page, lab("20_super_keypoints.ipynb"))
    play(page, served, handle, "chapter-20")
    expect(page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']")).to_have_count(0)
