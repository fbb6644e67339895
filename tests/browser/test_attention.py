"What a reader does with the attention explorer: slide layers and heads, click keypoints, change episode and method."
import re
from statistics import median

import nbformat
import pytest
from cape.data.annotations import data_home

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

SETUP = """
import os
os.environ["CAPE_DATA"] = {home!r}
import torch
from cape import PoseDataset
from cape.models.base import CapeModel, Prediction, create_model
from cape.view.explorer import AttentionExplorer

class Stare(CapeModel):
    "Two heads: keypoint k looks at cell k of 4 x 4, and at the last cell"
    name = "stare"
    def encode(self, images, role="query"): return {{"map": images[:, :1, :4, :4]}}
    def adapt(self, support, keypoints, visible, links=None): return {{"at": keypoints.mean(1)}}
    def locate(self, prompt, query):
        (B, K, _), Q = prompt["at"].shape, query["map"].shape[1]
        first, last = torch.arange(K) % 15, torch.full((K,), 15)
        cells = torch.eye(16)[torch.stack([first, last])].expand(B, Q, 2, K, 16)
        points = prompt["at"][:, None].expand(B, Q, K, 2)
        return Prediction(points, points[..., 0] * 0, attention={{"layer0.cross": cells}} if self.look else {{}})

torch.manual_seed(0)
small = dict(options={{"width": 16}}, dim=16, heads=2)
models = {{"stare": Stare(), **{{n: create_model(n, **small) for n in ("capeformer", "fmmp", "sdpnet")}}}}
zoo = PoseDataset.load("posezoo", size="mini", split=1, subset="test")
explorer = AttentionExplorer(models, zoo, ["stare", "capeformer"], size=96)
explorer
"""
# a picture as a text, and the time a control takes until the page is drawn anew
PICTURE = """side => { const box = document.querySelector(`.cape-attention .side.${side}`), c = box.querySelector('canvas')
  return [box.querySelector('img').src.length, c.style.display || c.toDataURL(), box.querySelector('svg').innerHTML].join() }"""
TIMED = """([label, value]) => { const e = document.querySelector(`.cape-attention [aria-label="${label}"]`), start = performance.now()
  e.value = value; e.dispatchEvent(new Event('input'))
  document.querySelector('.cape-attention').getBoundingClientRect()
  return performance.now() - start }"""
BRIGHTEST = """() => { const c = document.querySelector('.cape-attention .left canvas'), d = c.getContext('2d').getImageData(0, 0, 4, 4).data
  const bright = [...Array(16).keys()].map(i => d[4 * i] + d[4 * i + 1])
  return bright.flatMap((b, i) => b > 300 ? [i] : []) }"""


@pytest.fixture
def page_with_explorer(page, lab, served, posezoo_mini):
    home = str(data_home().absolute())                                      # `posezoo_mini` has built it there
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SETUP.format(home=home), id="tool")])
    nb.metadata["kernelspec"] = dict(display_name="python3", language="python", name="python3")
    nbformat.write(nb, served / "attention.ipynb")
    page.goto(lab("attention.ipynb"), timeout=120_000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=120_000)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
    page.locator(".cape-attention .support circle").first.wait_for(timeout=120_000)
    page.add_style_tag(content="#jp-toasts, .Toastify { display: none }")   # JupyterLab's own news
    page.locator(".cape-attention").scroll_into_view_if_needed()
    return page


def picture(page, side): return page.evaluate(PICTURE, side)
def control(page, what): return page.locator(f".cape-attention [aria-label='{what}']")
def note(page, side): return page.locator(f".cape-attention .{side} .note")
def settled(page, key): page.wait_for_function("() => ![...document.querySelectorAll('.cape-attention .stage')].some(s => s.style.opacity == .3)")


def changed(page, side, before):
    "The picture, once it is another one"
    page.wait_for_function(f"before => ({PICTURE})('{side}') !== before", arg=before, timeout=60_000)
    settled(page, side)
    return picture(page, side)


def slides_and_clicks(page, served, capsys):
    shoot = lambda name: page.locator(".cape-attention").screenshot(path=served / f"attention-{name}.png")
    left, right = picture(page, "left"), picture(page, "right")
    assert page.evaluate(BRIGHTEST) == [0, 15]                              # keypoint 0: its own cell and the last one
    expect(note(page, "left")).to_have_text("strongest cell 0.50, 100% on the image")
    shoot("opened")

    control(page, "head, left").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".cape-attention .left .head")).to_have_text("head 1 of 2")
    assert page.evaluate(BRIGHTEST) == [0] and picture(page, "right") == right
    left = picture(page, "left")

    page.locator(".cape-attention .support circle[data-k='2']").click()     # a keypoint: both pictures are its own
    left, right = changed(page, "left", left), changed(page, "right", right)
    assert page.evaluate(BRIGHTEST) == [2]
    expect(page.locator(".cape-attention .support circle[data-k='2']")).to_have_attribute("aria-pressed", "true")

    spot = page.locator(".cape-attention .support circle[data-k='4']").bounding_box()  # beside a keypoint: the nearest
    page.mouse.click(spot["x"] - 1, spot["y"] + spot["height"] / 2)
    left, right = changed(page, "left", left), changed(page, "right", right)
    assert page.evaluate(BRIGHTEST) == [4]

    layer = page.locator(".cape-attention .right .layer")
    seen = {right}
    for name in ("refinement", "decoder 3: image", "decoder 3: keypoints", "decoder 2: image"):
        control(page, "layer, right").focus()
        page.keyboard.press("ArrowRight" if name == "refinement" else "ArrowLeft")
        expect(layer).to_have_text(name)
        seen.add(picture(page, "right"))
        if name == "refinement": shoot("refinement")
    assert len(seen) == 4 and picture(page, "left") == left                 # decoder 3 twice


def compares(page, served, capsys):
    page.locator(".cape-attention .support circle[data-k='1']").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".cape-attention .support circle[data-k='1']")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".cape-attention .support circle[data-k='1']")).to_be_focused()
    left, right = picture(page, "left"), picture(page, "right")
    control(page, "method, left").select_option(label="fmmp")
    expect(page.locator(".cape-attention .left .layer")).to_have_text("query 3: places")
    left = changed(page, "left", left)
    assert picture(page, "right") == right
    control(page, "method, right").select_option(label="sdpnet")
    right = changed(page, "right", right)
    page.locator(".cape-attention").screenshot(path=served / "attention-samples.png")


def goes_on_and_takes_times(page, served, capsys):
    left, right = picture(page, "left"), picture(page, "right")
    support = page.locator(".cape-attention .support img").get_attribute("src")
    control(page, "episode").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".cape-attention .title")).to_contain_text("(2 of ")
    changed(page, "left", left), changed(page, "right", right)
    assert page.locator(".cape-attention .support img").get_attribute("src") != support
    page.evaluate(TIMED, ["layer, right", 99])                              # the last: the graph, on the support
    expect(page.locator(".cape-attention .right .layer")).to_have_text("graph")
    assert page.locator(".cape-attention .right img").get_attribute("src") == page.locator(".cape-attention .support img").get_attribute("src")
    page.locator(".cape-attention").screenshot(path=served / "attention-graph.png")

    drawn = [page.evaluate(TIMED, ["layer, left", n % 9]) for n in range(20)]
    waited = []
    for n in range(3, 8):
        before = page.locator(".cape-attention .support img").get_attribute("src")
        page.evaluate(TIMED, ["episode", n])
        waited.append(page.evaluate("""async before => { const start = performance.now(), all = [...document.querySelectorAll('.cape-attention .stage')]
          while (document.querySelector('.cape-attention .support img').src === before || all.some(s => s.style.opacity == .3))
            await new Promise(requestAnimationFrame)
          return performance.now() - start }""", before))
    with capsys.disabled():
        print(f"\nattention: layer or head drawn in {median(drawn):.0f} ms ({max(drawn):.0f} at most), a new episode of two "
              f"methods in {median(waited) / 1000:.2f} s ({max(waited) / 1000:.2f} at most)")


def test_a_reader_slides_clicks_and_compares(page_with_explorer, served, capsys):
    "One page for all of it: opening it takes longer than the rest"
    for step in (slides_and_clicks, compares, goes_on_and_takes_times): step(page_with_explorer, served, capsys)
