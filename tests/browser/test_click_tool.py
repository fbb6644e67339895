"What a reader does with the click tool: click five points, name, link, predict, drag, predict again, save, load."
import json
import re

import nbformat
import pytest
from conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

WIDTH, HEIGHT, SHOWN = 200, 150, 480  # a photo, and how wide the page shows it
CLICKS = [(40, 30), (160, 30), (100, 75), (40, 120), (160, 120)]  # photo pixels
SETUP = f"""
import numpy as np
from cape.estimator import PoseEstimator
from cape.models.base import create_model
from cape.view.clicks import ClickTool
photos = [np.full(({HEIGHT}, {WIDTH}, 3), grey, np.uint8) for grey in (90, 140, 190)]
boxes = [[0, 0, {WIDTH}, {HEIGHT}]] * 3
tool = ClickTool(photos, PoseEstimator(create_model("copy"), size=64, progress=False), boxes=boxes)
tool
"""


def run_all(page, url):
    "Open a notebook in JupyterLab's single-document view and run every cell"
    page.goto(url, timeout=120_000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=120_000)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
    page.locator(".cape-clicks img.photo").wait_for(timeout=120_000)


@pytest.fixture
def tool(page, lab, served):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SETUP, id="tool")])
    nb.metadata["kernelspec"] = dict(display_name="python3", language="python", name="python3")
    nbformat.write(nb, served / "click.ipynb")
    run_all(page, lab("click.ipynb"))
    return page


def click(page, x, y):
    "Click on the photo at its pixel (x, y), whose centre is at whole numbers"
    scale = SHOWN / WIDTH
    page.locator("img.photo").click(position=dict(x=(x + .5) * scale, y=(y + .5) * scale))


def where(page, k):
    circle = page.locator(f".cape-clicks circle[data-k='{k}']")
    return [float(circle.get_attribute(a)) for a in ("cx", "cy")]


def say(page, text): expect(page.locator(".cape-clicks .status")).to_contain_text(text, timeout=60_000)
def button(page, name): return page.locator(".cape-clicks .tools button", has_text=re.compile(f"^{name}$"))


def shoot(page, served, name):
    page.locator(".cape-clicks").screenshot(path=served / f"{name}.png")


def test_from_clicks_to_a_file(tool, served):
    page = tool
    page.locator("img.photo").scroll_into_view_if_needed()
    for n, (x, y) in enumerate(CLICKS, 1):
        click(page, x, y)
        expect(page.locator(".cape-clicks circle")).to_have_count(n)
    for k, point in enumerate(CLICKS): assert where(page, k) == pytest.approx(point, abs=.5)
    say(page, "5 keypoints on photo-0, given by you")

    name = page.get_by_label("name of keypoint 0")
    name.fill("head")
    name.press("Tab")
    button(page, "link").click()
    for k in (0, 2): page.locator(f".cape-clicks circle[data-k='{k}']").click()
    expect(page.locator(".cape-clicks line")).to_have_count(1)
    button(page, "link").click()
    shoot(page, served, "labelled")

    button(page, "predict").click()
    say(page, "1 labelled, 2 predicted, mean confidence 1.00")
    expect(page.get_by_text("photo-1 (2 of 3)")).to_be_visible()
    expect(page.locator(".cape-clicks circle")).to_have_count(5)
    for k, point in enumerate(CLICKS): assert where(page, k) == pytest.approx(point, abs=.5)
    expect(page.locator(".cape-clicks line")).to_have_count(1)
    shoot(page, served, "predicted")

    box = page.locator(".cape-clicks circle[data-k='2']").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"], steps=4)
    page.mouse.up()
    say(page, "5 keypoints on photo-1, given by you")
    moved = where(page, 2)
    assert moved[0] > 115
    button(page, "predict").click()
    say(page, "2 labelled, 1 predicted")
    expect(page.get_by_text("photo-2 (3 of 3)")).to_be_visible()
    assert where(page, 2)[0] == pytest.approx((CLICKS[2][0] + moved[0]) / 2, abs=.5)   # copy: the mean of two labels
    shoot(page, served, "corrected")

    button(page, "save").click()
    say(page, "saved")
    coco = json.loads((served / "poses.json").read_text())
    assert coco["categories"][0]["keypoints"][0] == "head" and coco["categories"][0]["skeleton"] == [[0, 2]]
    flat = coco["annotations"][0]["keypoints"]
    assert list(zip(flat[::3], flat[1::3])) == [pytest.approx(p, abs=.5) for p in CLICKS]
    assert ["confidence" in a for a in coco["annotations"]] == [False, False, True]


def test_keyboard_undo_and_load(tool, served):
    page = tool
    page.locator("img.photo").scroll_into_view_if_needed()
    click(page, *CLICKS[0])
    expect(page.locator(".cape-clicks circle")).to_have_count(1)
    x, y = where(page, 0)
    page.locator(".cape-clicks circle").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
        page.wait_for_timeout(200)
    assert where(page, 0) == pytest.approx([x + 2, y - 1], abs=.01)
    page.keyboard.press("Delete")
    expect(page.locator(".cape-clicks circle")).to_have_count(0)
    button(page, "undo").click()
    expect(page.locator(".cape-clicks circle")).to_have_count(1)
    assert where(page, 0) == pytest.approx([x + 2, y - 1], abs=.01)
    page.locator(".cape-clicks").get_by_label("file").fill("absent.json")
    button(page, "load").click()
    say(page, "absent.json: no such annotation file")
    if not (served / "poses.json").exists(): pytest.skip("the test above saved no file")
    page.locator(".cape-clicks").get_by_label("file").fill("poses.json")
    button(page, "load").click()
    say(page, "3 poses from poses.json")
    expect(page.locator(".cape-clicks circle")).to_have_count(5)
