"Guards of `cape.pictures`: stable bytes, stable colours, and markers that lie where the keypoints are."
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cape import pictures as V
from cape.errors import ConfigError, DataError

GREY = np.full((60, 80, 3), 128, np.uint8)
POINTS = np.array([[20., 15], [61, 40], [33, 50]])
LINKS = [(0, 1), (1, 2)]


def centroid(fig, color):
    "Where, in the pixels of the first axes' image, the pixels of `color` are centred."
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    rgb = np.asarray(canvas.buffer_rgba())[..., :3] / 255.
    rows, columns = np.nonzero(np.abs(rgb - color).max(-1) < .02)
    assert len(rows) > 8, "the colour is nowhere"
    at = columns.mean() + .5, rgb.shape[0] - rows.mean() - .5       # measured from the lower left
    return fig.axes[0].transData.inverted().transform(at)


def figures():
    "One figure of every kind, drawn from the same numbers each time."
    rng = np.random.default_rng(0)
    poses = [V.Pose(GREY, POINTS), V.Pose(GREY, POINTS, [1, 0, 1], [0, 0, 1])]
    t = np.linspace(0, .3, 7)
    return {"pose": V.pose(GREY, POINTS, links=LINKS, names=True, title="t"),
            "panel": V.panel(poses, poses, [POINTS + 1, POINTS + 20], LINKS, titles="ab"),
            "heatmaps": V.heatmaps(GREY, rng.random((3, 6, 8)), POINTS),
            "contact_sheet": V.contact_sheet([GREY] * 5, [POINTS] * 5, links=LINKS, columns=3),
            "pck_curves": V.pck_curves({"a": (t, t * 2, t, t * 3), "b": (t, t)}),
            "category_bars": V.category_bars(["x", "y"], [.4, .6], [.3, .5], [.5, .7],
                                             {"copy": .2, "mean": [.1, .3]})}


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_same_bytes_twice(tmp_path, kind):
    one, two = figures(), figures()
    for name in one:
        first = V.save(one[name], tmp_path / "deep" / "er" / f"{name}.{kind}").read_bytes()
        assert first == V.save(two[name], tmp_path / f"{name}2.{kind}").read_bytes(), name
        assert first == V.save(one[name], tmp_path / f"{name}3.{kind}").read_bytes(), f"{name}, saved again"
        assert b"dc:date" not in first and isinstance(one[name], Figure)


def test_a_notebook_shows_what_is_saved(tmp_path):
    fig = V.pose(GREY, POINTS)
    assert fig._repr_png_() == V.save(fig, tmp_path / "a.png").read_bytes()


def test_colors_do_not_depend_on_the_count():
    every = V.keypoint_colors(100)
    for count in (0, 1, 7, 8, 21, 68): assert np.array_equal(V.keypoint_colors(count), every[:count])
    assert len(np.unique(every[:21], axis=0)) == 21 and every.min() >= 0 and every.max() <= 1
    assert V.keypoint_markers(70)[:20] == V.keypoint_markers(20)
    assert len(set(zip(map(str, every[:70]), V.keypoint_markers(70)))) == 70


@pytest.mark.parametrize("image", [GREY, GREY / 255., GREY[..., 0]])
def test_a_marker_is_where_the_keypoint_is(image):
    fig = V.pose(image, POINTS)
    for color, point in zip(V.keypoint_colors(3), POINTS):
        assert centroid(fig, color) == pytest.approx(point, abs=.3)


def test_the_image_is_where_its_pixels_are():
    "A red pixel block centred on (30, 20) is drawn centred on (30, 20): pixel centres lie at integers."
    image = GREY.copy()
    image[19:22, 29:32] = [255, 0, 0]
    fig = V.pose(image, np.zeros((0, 2)))
    assert centroid(fig, [1, 0, 0]) == pytest.approx([30, 20], abs=.2)
    assert fig.axes[0].get_xlim() == (-.5, 79.5) and fig.axes[0].get_ylim() == (59.5, -.5)


def test_a_map_cell_covers_its_pixels():
    "A 6 x 8 map on a 60 x 80 image: its cell in row 1, column 3 covers x 29.5..39.5 and y 9.5..19.5."
    maps = np.zeros((1, 6, 8)); maps[0, 1, 3] = 1
    fig = V.heatmaps(np.zeros((60, 80, 3), np.uint8), maps)
    top = .85 * np.array([.993248, .906157, .143936])               # the map's last colour over black
    assert centroid(fig, top) == pytest.approx([34.5, 14.5], abs=.5)


def test_hidden_and_unlabelled_points():
    nobody = V.pose(GREY, POINTS, visible=[0, 0, 0], links=LINKS, names=True)
    assert not nobody.axes[0].lines and not nobody.axes[0].texts
    assert len(V.pose(GREY, POINTS, visible=[1, 1, 0], links=LINKS).axes[0].lines) == 2 * 2 + 1
    assert len(V.pose(GREY, np.vstack([POINTS, [np.nan, 1]])).axes[0].lines) == 2 * 3
    hollow = V.pose(GREY, POINTS[:1], occluded=[1]).axes[0].lines
    assert all(line.get_markerfacecolor() == "none" for line in hollow)
    assert len(V.pose(GREY, np.zeros((0, 2))).axes) == len(V.pose(None, POINTS[:1]).axes) == 1


def test_misses_are_circled_and_hits_are_not():
    pose = V.Pose(GREY, POINTS)
    off = POINTS + [[4.9, 0], [5., 0], [0, 30]]
    fig = V.panel([pose], [pose], [off], norms=[50], threshold=.1)
    circles = fig.axes[2].patches
    assert [tuple(c.center) for c in circles] == [tuple(p) for p in POINTS[1:]]  # at the radius is a miss
    assert all(c.radius == 5 for c in circles)


def test_large_and_odd_inputs():
    many = np.random.default_rng(0).uniform(0, 60, (68, 2))
    crowd = V.pose(GREY, many, names=True).axes[0]
    few = V.pose(GREY, POINTS).axes[0]
    assert len(crowd.texts) == 68 and crowd.lines[0].get_markersize() < few.lines[0].get_markersize()
    V.contact_sheet([GREY, GREY[:20], GREY[:, :10]])
    V.pose(GREY - 128., POINTS * np.nan)
    V.heatmaps(GREY, np.zeros((2, 3, 3)))._repr_png_()              # constant maps: no division by nothing
    nobody = [V.Pose(GREY, POINTS, [0, 0, 0])] * 2
    V.panel(nobody, nobody, [POINTS] * 2)._repr_png_()
    V.category_bars(["one"], [.5])._repr_png_()


@pytest.mark.parametrize("call, error, words", [
    (lambda: V.pose(GREY * 1., POINTS), DataError, "must lie in 0..1"),
    (lambda: V.pose(GREY[None], POINTS), DataError, "expected (height, width, 3)"),
    (lambda: V.pose(GREY, POINTS[0]), DataError, "expected (K, 2)"),
    (lambda: V.pose(GREY, POINTS, links=[(0, 3)]), DataError, "link (0, 3)"),
    (lambda: V.pose(GREY, POINTS, links=[(-1, 0)]), DataError, "link (-1, 0)"),
    (lambda: V.pose(GREY, POINTS, names=["a"]), DataError, "1 names for 3 keypoints"),
    (lambda: V.heatmaps(GREY, np.zeros((2, 3, 3)), POINTS), DataError, "3 keypoints, 2 maps"),
    (lambda: V.heatmaps(GREY, np.zeros((3, 3))), DataError, "expected (K, h, w)"),
    (lambda: V.pck_curves({"a": ([0, 1], [0])}), DataError, "a: "),
    (lambda: V.category_bars(["a"], [1, 2]), DataError, "1 names"),
    (lambda: V.panel([], [], []), DataError, "expected one of each"),
    (lambda: V.save(V.pose(GREY, POINTS), "x.jpg"), ConfigError, ".png or .svg"),
])
def test_clear_errors(call, error, words):
    with pytest.raises(error) as e: call()
    assert words in str(e.value)


def test_nothing_global_is_touched():
    "In a fresh process: no matplotlib at import, no pyplot and no changed setting after drawing."
    code = """
import sys, numpy, cape.pictures as V
print('matplotlib' in sys.modules)
import matplotlib; look = lambda: [matplotlib.rcParams[k] for k in V._STYLE]; before = look()
V.pose(None, numpy.ones((2, 2)), title='t')._repr_png_()
print('matplotlib.pyplot' in sys.modules, look() != before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"] * 3, done.stderr
