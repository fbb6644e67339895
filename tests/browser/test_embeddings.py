"What a reader does with a map of keypoints: point, colour, circle, name; in JupyterLab, and on a saved page without a kernel."
import re

import nbformat
import numpy as np
import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

SIDE = 520  # of the map, as the page draws it
SETUP = """
import numpy as np
from cape.view.embeddings import KeypointTable, super_keypoints
from cape.view.maps import EmbeddingExplorer
n = np.arange(240)
part, category = n % 4, n // 8
angle = np.pi / 2 * part + np.random.default_rng(0).normal(size=240) * .12
features = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
greys = (np.arange(60) * 4).astype(np.uint8)
crops = np.tile(greys[:, None, None, None], (1, 24, 24, 3))
crops[:, 10:14, 10:14] = [250, 30, 30]
table = KeypointTable(features, np.array([f"kind {c}" for c in category]), part, np.array(["left_eye", "nose", "paw", "tail"])[part],
                      np.where(category < 20, "base", "novel"), n // 4, np.full((240, 2), .5), angle / 50 + .05, crops)
explorer = EmbeddingExplorer(super_keypoints(table), {"ring": features, "grid": np.stack([n % 16, n // 16], 1)})
"""


def table():
    "The table of `SETUP`, and its explorer"
    values = {}
    exec(SETUP, values)
    return values["explorer"]


def where(page, i):
    "Screen place of the mark `i`"
    mark = page.locator(f".cape-map svg path[data-i='{i}']")
    box = mark.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def point_at(page, i): page.mouse.move(*where(page, i))


def circle(page, low, high):
    "Drag a rectangle, given in parts of the map's side"
    box = page.locator(".cape-map svg").bounding_box()
    corners = [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]: page.mouse.move(*place, steps=3)
    page.mouse.up()


def colour_by(page, label): page.get_by_label("colour by").select_option(label=label)
def fills(page): return page.eval_on_selector_all(".cape-map svg path", "marks => marks.map(m => m.getAttribute('fill'))")


def seconds(page, act):
    "Milliseconds from a change to the next painted picture, in the page"
    return page.evaluate("""async act => {
      const began = performance.now()
      new Function(act)()
      await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
      return performance.now() - began }""", act)


@pytest.fixture
def alone(page, tmp_path):
    "The widget as a saved page, opened from the disc"
    page.goto(table().save(tmp_path / "map.html").as_uri())
    page.locator(".cape-map svg path").first.wait_for()
    return page


def test_the_mouse_shows_patch_and_names(alone):
    page, card = alone, alone.locator(".cape-map .card")
    explorer = table()
    page.get_by_label("map", exact=True).select_option(label="grid")        # where no two marks overlap
    for i in (3, 200):
        point_at(page, i)
        row = explorer.table
        for word in (row.part[i].replace("_", " "), row.category[i], row.group[i], f"{row.error[i]:.3f}"):
            expect(card).to_contain_text(word)
        expect(card.locator(".pair .patch")).to_have_count(2)
        expect(card.locator(".sheet .patch")).to_have_count(5)
        near = set(row.part[explorer.near[i]])
        assert {t.split(",")[0].replace(" ", "_") for t in
                card.locator(".sheet .patch").evaluate_all("p => p.map(x => x.title)")} == near
        assert grey(page, card.locator(".pair .patch").first) == pytest.approx(explorer.table.photo[i] * 4, abs=6)


def grey(page, patch):
    "The colour of a patch's corner, as the screen has it"
    import io
    from PIL import Image
    return Image.open(io.BytesIO(patch.screenshot())).convert("RGB").getpixel((8, 8))[0]


def test_colours_follow_the_label(alone):
    page = alone
    assert len(set(fills(page))) == 4                                       # four parts
    colour_by(page, "category")
    assert len(set(fills(page))) == 8                                       # seven, and grey
    page.get_by_label("colour kind 29").click()
    kept = fills(page)
    expect(page.locator(".cape-map li", has_text="kind 29").locator(".square")).not_to_have_css("background-color", "rgb(204, 204, 204)")
    assert len(set(kept)) == 8 and kept.count("#cccccc") == 240 - 7 * 8
    colour_by(page, "1-shot error")
    expect(page.locator(".cape-map .note")).to_contain_text("mean 1-shot error")
    colour_by(page, "super-keypoint")
    expect(page.locator(".cape-map .note")).to_contain_text("no number says anything")
    colour_by(page, "base or novel")
    assert sorted({f: fills(page).count(f) for f in fills(page)}.values()) == [80, 160]
    shapes = page.eval_on_selector_all(".cape-map svg path", "m => m.map(x => x.getAttribute('d'))")
    assert sorted({s: shapes.count(s) for s in shapes}.values()) == [80, 160]          # told apart without colour as well


def test_a_group_is_selected_and_seen(alone):
    page, note = alone, alone.locator(".cape-map .sheetOf")
    page.get_by_role("button", name="nose", exact=True).click()
    expect(note).to_contain_text("60 selected: 60 nose; 40 base, 20 novel")
    expect(note.locator(".patch")).to_have_count(48)
    assert set(note.locator(".patch").evaluate_all("p => p.map(x => x.title.split(',')[0])")) == {"nose"}
    circle(page, (.8, .3), (.999, .7))                                      # the part to the right: left_eye
    expect(note).to_contain_text("60 selected: 60 left eye")
    page.get_by_role("button", name="zoom to selection").click()
    x, y = where(page, 0)
    page.get_by_role("button", name="whole map").click()
    assert where(page, 0) != (x, y)
    page.keyboard.press("Escape")                                           # the button has the focus: nothing happens
    expect(note).to_contain_text("60 selected")
    page.locator(".cape-map svg").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".cape-map .card")).to_contain_text("left eye")
    page.keyboard.press("Escape")
    expect(note).to_contain_text("Draw around a heap")
    page.mouse.click(*where(page, 5))
    expect(note).to_contain_text("6 selected")                              # itself and five neighbours
    circle(page, (.45, .45), (.452, .452))                                  # a click on empty ground
    expect(note).to_contain_text("Draw around a heap")


def test_another_map_moves_the_points(alone):
    page = alone
    before = where(page, 0)
    page.get_by_label("map", exact=True).select_option(label="grid")
    assert where(page, 0) != before and len(set(fills(page))) == 4
    expect(page.locator(".cape-map .note")).to_contain_text("in this map")
    box = page.locator(".cape-map svg").bounding_box()
    for i in range(0, 240, 7):
        x, y = where(page, i)
        assert box["x"] < x < box["x"] + box["width"] and box["y"] < y < box["y"] + box["height"]


def test_in_jupyterlab_a_selection_reaches_python(page, lab, served):
    cells = [nbformat.v4.new_code_cell(SETUP + "explorer", id="map")]
    cells.append(nbformat.v4.new_code_cell("print('python has', len(explorer.selection), *set(explorer.selection.part))", id="ask"))
    nb = nbformat.v4.new_notebook(cells=cells)
    nb.metadata["kernelspec"] = dict(display_name="python3", language="python", name="python3")
    nbformat.write(nb, served / "map.ipynb")
    page.goto(lab("map.ipynb"), timeout=120_000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=120_000)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
    page.locator(".cape-map svg path").first.wait_for(timeout=120_000)
    page.locator(".cape-map svg").scroll_into_view_if_needed()
    page.get_by_label("map", exact=True).select_option(label="grid")
    point_at(page, 17)
    expect(page.locator(".cape-map .card")).to_contain_text("nose")
    expect(page.locator(".cape-map .card .pair .patch")).to_have_count(2)
    page.get_by_role("button", name="paw", exact=True).click()
    expect(page.locator(".cape-map .sheetOf")).to_contain_text("60 selected: 60 paw")
    page.locator(".cape-map").screenshot(path=served / "map.png")
    page.locator(".jp-CodeCell").last.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Shift+Enter")
    expect(page.get_by_text("python has 60 paw", exact=True)).to_be_visible(timeout=60_000)


def test_fifteen_hundred_points_answer_at_once(page, tmp_path):
    "Prints how long a change takes; the page is the size of the chapter's"
    explorer = table()
    rows = np.arange(1500) % 240
    from cape.view.maps import EmbeddingExplorer
    many = explorer.table.take(rows)
    spread = np.random.default_rng(0).normal(size=(1500, 2))
    page.goto(EmbeddingExplorer(many, {"a": spread, "b": -spread}).save(tmp_path / "many.html").as_uri())
    page.locator(".cape-map svg path").first.wait_for()
    pick = "const s = document.querySelector('[aria-label=\"%s\"]'); s.value = '%s'; s.dispatchEvent(new Event('change'))"
    acts = {"colour by category": pick % ("colour by", "category"), "another map": pick % ("map", "b"),
            "select a group": "document.querySelector('.cape-map .name').click()",
            "hover": """const r = document.querySelector('.cape-map svg').getBoundingClientRect()
              document.querySelector('.cape-map svg').dispatchEvent(new PointerEvent('pointermove',
                {clientX: r.left + 260, clientY: r.top + 260}))"""}
    for name, act in acts.items():
        print(f"{name}: {np.median([seconds(page, act) for _ in range(5)]):.0f} ms")
    expect(page.locator(".cape-map .sheetOf")).to_contain_text("selected")
