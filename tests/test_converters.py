"Files of other tools: what is written is read again, what is lost is said, and bad input is named."
import base64
import json
import os
import re
import stat
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from cape.data.annotations import Category, DataWarning, Instance, PoseDataset
from cape.data.converters import FORMATS, guess_format, read_poses, write_poses
from cape.data.drawing_formats import _mirror
from cape.data.label_files import _LOSSES, _Found, _place
from cape.errors import CapeError, ConfigError, DataError, MissingFileError, StorageError

SIZES = {"a/one.png": (40, 30), "a/two.jpg": (64, 48), "three.png": (31, 57), "b/c/four.png": (20, 20)}
TARGETS = {"coco": "x.json", "coco.gz": "x.json.gz", "dlc": "CollectedData_me.csv", "dlc.h5": "CollectedData_me.h5",
           "labelme": "labels", "cvat": "x.xml", "yolo": "set"}


def picture(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    "A folder of pictures of different sizes."
    root = tmp_path_factory.mktemp("pool")
    for name, size in SIZES.items(): picture(root/name, size)
    return root


def make(points, name="a/one.png", box=(3., 4., 20., 15.), names=("nose", "left ear", "right ear"), links=((0, 1), (1, 2)),
         root=".", **more):
    "A data set of one category; `points` are objects of K rows x, y, v, all on one image."
    kind = Category(7, "mouse", more.get("super", ""), names, links, (), len(points[0]))
    out = []
    for n, rows in enumerate(points):
        rows = np.array(rows, np.float32)
        out.append(Instance(100 + n, 5, 7, name, *SIZES[name], box, rows[:, :2], rows[:, 2].astype(np.uint8)))
    return PoseDataset("mice", root, {7: kind}, out)


POINTS = [[(10.25, 11.5, 2), (12, 13, 1), (0, 0, 0)]]


def quietly(path, **options):
    "`read_poses` without its warning."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return read_poses(path, **options)


# ---- round trips ----

WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=6)


@st.composite
def datasets(draw, one=False):
    "A random small data set on the pool's pictures, as a loader could give it."
    kinds = {}
    for c in range(1 if one else draw(st.integers(1, 3))):
        k = draw(st.integers(1, 4))
        names = tuple(draw(st.lists(WORDS, min_size=k, max_size=k, unique=True))) if draw(st.booleans()) else ()
        links = draw(st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), max_size=3))
        title = draw(WORDS.filter(lambda w: w not in [x.name for x in kinds.values()]))
        parts = tuple(draw(WORDS) for _ in range(k)) if draw(st.booleans()) else ()
        kinds[c*3 + 2] = Category(c*3 + 2, title, draw(st.sampled_from(["", "animal"])), names, tuple(links), parts, k)
    objects = []
    for n in range(draw(st.integers(1, 5))):
        name = draw(st.sampled_from([*SIZES]))
        kind, (w, h) = kinds[draw(st.sampled_from([*kinds]))], SIZES[name]
        reach = st.floats(-8, 70, width=32) if draw(st.integers(0, 3)) == 0 else st.floats(0, 18, width=32)
        xy = np.array([[draw(reach), draw(reach)] for _ in range(kind.num_keypoints)], np.float32)
        v = np.array([draw(st.sampled_from([0, 1, 2, 2])) for _ in xy], np.uint8)
        box = (draw(st.floats(0, 5)), draw(st.floats(0, 5)), draw(st.floats(4, 14)), draw(st.floats(4, 14)))
        objects.append(Instance(n + 11, [*SIZES].index(name), kind.id, name, w, h, box, xy, v))
    objects.sort(key=lambda i: i.image_id)
    return PoseDataset("random", ".", kinds, objects)


def plain(data, kind, i):
    "An object's K names."
    return kind.keypoints or tuple(map(str, range(kind.num_keypoints)))


def compare(a, b, lost):
    "Assert that `b` is `a` but for what `lost` says; `a` has no object without a keypoint."
    said = {key for key, (what, _) in _LOSSES.items() if what in lost}
    def grouped(data): return {n: [i for i in data.instances if i.file_name == n] for n in {i.file_name for i in data.instances}}
    ga, gb = grouped(a), grouped(b)
    assert ga.keys() == gb.keys()
    kinds = {c.name: c for c in b.categories.values()}
    for c in a.categories.values() if "categories" not in said else ():
        other = kinds[c.name]
        assert other.num_keypoints == c.num_keypoints or not a.by_category[c.id]
        assert other.keypoints == (c.keypoints if "nameless" not in said else plain(a, c, None))
        if "links" not in said: assert other.links == c.links
        if "facts" not in said: assert (other.supercategory, other.parts) == (c.supercategory, c.parts)
        if "ids" not in said: assert other.id == c.id
    for name in ga:
        assert len(ga[name]) == len(gb[name])
        for x, y in zip(ga[name], gb[name]):
            if "categories" not in said: assert a.categories[x.category_id].name == b.categories[y.category_id].name
            if "ids" not in said: assert (x.id, x.image_id) == (y.id, y.image_id)
            assert (x.width, x.height) == (y.width, y.height)
            if "beyond" in said: continue
            seen = x.visibility > 0
            want = x.visibility if "occlusion" not in said else 2*seen
            np.testing.assert_array_equal(want, y.visibility)
            np.testing.assert_allclose(x.keypoints[seen], y.keypoints[seen], rtol=2e-7, atol=2e-6)
            if "hidden" not in said: np.testing.assert_array_equal(x.keypoints[~seen], y.keypoints[~seen])
            if "boxes" not in said: np.testing.assert_allclose(x.box, y.box, rtol=0, atol=3e-6)


def round_trip(data, pool, target):
    "Write, read, compare."
    data.root, name = pool, TARGETS[target]
    kept = PoseDataset(data.name, pool, data.categories, [i for i in data.instances if i.visible.any()])
    with tempfile.TemporaryDirectory() as tmp:
        if not len(kept):
            with pytest.raises(DataError, match="nothing to write"): write_poses(data, Path(tmp)/name, target.split(".")[0])
            assert not os.listdir(tmp)
            return
        report = write_poses(data, Path(tmp)/name, target.split(".")[0])
        assert report.instances == len(kept) and json.loads(report.to_json())["lost"] == report.lost
        beyond = _LOSSES["beyond"][0] in report.lost
        try: back = quietly(Path(tmp)/name, images=pool)
        except DataError as error:  # every keypoint was beyond its picture
            assert beyond and "expected objects" in str(error)
            return
        if not beyond: compare(kept, back, report.lost)


FEW = settings(max_examples=14, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
               phases=(Phase.explicit, Phase.generate))
MANY = settings(FEW, max_examples=100, derandomize=False)


@pytest.mark.parametrize("target", ["coco", "labelme", "cvat", "yolo"])
@FEW
@given(data=datasets())
def test_round_trip(target, data, pool): round_trip(data, pool, target)


@pytest.mark.parametrize("target", ["dlc", "dlc.h5"])
@FEW
@given(data=datasets(one=True))
def test_round_trip_of_one_category(target, data, pool): round_trip(data, pool, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["coco", "coco.gz", "labelme", "cvat", "yolo"])
@MANY
@given(data=datasets())
def test_round_trip_often(target, data, pool): round_trip(data, pool, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["dlc", "dlc.h5"])
@MANY
@given(data=datasets(one=True))
def test_round_trip_of_one_category_often(target, data, pool): round_trip(data, pool, target)


def test_losses_are_counted(pool, tmp_path):
    "Each loss is reported where the data has it, with its number, and only there."
    data = make([[(10, 11, 2), (12, 13, 1), (14, 9, 0)], [(-3, 2, 2), (1, 1, 1), (2, 2, 1)], [(0, 0, 0)]*3], root=pool,
                super="animal")
    lost = write_poses(data, tmp_path/"x.csv").lost
    assert lost == {"objects without a labelled keypoint": 1, _LOSSES["ids"][0]: 2, _LOSSES["boxes"][0]: 2,
                    _LOSSES["links"][0]: 2, _LOSSES["occlusion"][0]: 3, _LOSSES["categories"][0]: 1,
                    _LOSSES["facts"][0]: 1, _LOSSES["hidden"][0]: 1}
    assert write_poses(data, tmp_path/"y", "yolo").lost[_LOSSES["beyond"][0]] == 1
    clean = make([[(10, 11, 2), (12, 13, 2)]], names=("a", "b"), links=(), root=pool)
    assert set(write_poses(clean, tmp_path/"z", "yolo").lost) == {_LOSSES["ids"][0]}
    assert write_poses(clean, tmp_path/"x.json").lost == {}
    nameless = make([[(10, 11, 2), (12, 13, 2)]], names=(), links=(), root=pool)
    assert write_poses(nameless, tmp_path/"n.xml").lost[_LOSSES["nameless"][0]] == 1
    assert read_poses(tmp_path/"n.xml", images=pool).categories[1].keypoints == ("0", "1")


def test_offsets(pool, tmp_path):
    "The centre of the first pixel stands in each file as the format has it."
    data = make([[(0, 0, 2), (39, 29, 2), (0, 0, 0)]], root=pool)
    write_poses(data, tmp_path/"x.json")
    assert json.loads((tmp_path/"x.json").read_text())["annotations"][0]["keypoints"][:2] == [0, 0]
    write_poses(data, tmp_path/"x.csv")
    assert (tmp_path/"x.csv").read_text().splitlines()[3].startswith("labeled-data,a,one.png,0.0,0.0,39.0,29.0,,")
    write_poses(data, tmp_path/"x.xml")
    assert 'points="0.5,0.5"' in (tmp_path/"x.xml").read_text()
    write_poses(data, tmp_path/"lm", "labelme")
    assert json.loads((tmp_path/"lm/a/one.json").read_text())["shapes"][1]["points"] == [[.5, .5]]
    write_poses(data, tmp_path/"yo", "yolo")
    cells = [float(c) for c in (tmp_path/"yo/labels/a/one.txt").read_text().split()]
    np.testing.assert_allclose(cells[1:5], [13/40, 11.5/30, .5, .5], atol=1e-8)
    np.testing.assert_allclose(cells[5:11], [.5/40, .5/30, 2, 39.5/40, 29.5/30, 2], atol=1e-8)
    for name in ("x.json", "x.csv", "x.xml", "lm", "yo"):
        own = read_poses(tmp_path/name, images=pool)[0].keypoints[:2]
        np.testing.assert_allclose(own, [[0, 0], [39, 29]], atol=1e-6)
    np.testing.assert_allclose(read_poses(tmp_path/"x.xml", images=pool, offset=0)[0].keypoints[1], [39.5, 29.5])
    write_poses(data, tmp_path/"c.json", offset=.5)
    np.testing.assert_allclose(read_poses(tmp_path/"c.json", images=pool)[0].keypoints[:3], [[.5, .5], [39.5, 29.5], [0, 0]])


@pytest.mark.parametrize("target", TARGETS)
def test_copies(target, pool, tmp_path):
    "With copies the result stands on its own; a copy never replaces another picture."
    data, out = make(POINTS, root=pool), tmp_path/"new"/TARGETS[target]
    report = write_poses(data, out, target.split(".")[0], copy=True)
    files = [p for p in (tmp_path/"new").rglob("*") if p.is_file()]
    assert report.files == len(files) and not [p for p in files if p.name.startswith(".")]
    np.testing.assert_array_equal(quietly(out)[0].keypoints[:2], data[0].keypoints[:2])
    if target.split(".")[0] not in ("labelme", "yolo"):
        (copy,) = (p for p in files if p.suffix == ".png")
        picture(copy, (3, 3))
        before = out.read_bytes()
        with pytest.raises(ConfigError, match="another image has this name"): write_poses(data, out, copy=True)
        assert out.read_bytes() == before


# ---- what is not written half ----

@pytest.mark.parametrize("target", ["labelme", "yolo"])
def test_a_folder_in_use_is_left_alone(target, pool, tmp_path):
    (tmp_path/"out").mkdir()
    (tmp_path/"out/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="new or empty folder"): write_poses(make(POINTS, root=pool), tmp_path/"out", target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine.txt", "out"]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_left_of_a_failure(target, pool, tmp_path):
    "An image to copy that is not there stops everything, before or after other images."
    two = make(POINTS, root=pool)
    lost = make(POINTS, name="a/two.jpg", root=pool)
    two.instances.append(lost[0])
    bad = PoseDataset("bad", tmp_path/"nowhere", two.categories, two.instances)
    picture(tmp_path/"nowhere/a/one.png", SIZES["a/one.png"])
    (tmp_path/"out").mkdir()
    with pytest.raises(MissingFileError, match="two.jpg"):
        write_poses(bad, tmp_path/"out"/TARGETS[target], target.split(".")[0], copy=True)
    assert not [p for p in (tmp_path/"out").rglob("*") if p.is_file()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(pool, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StorageError): write_poses(make(POINTS, root=pool), tmp_path/"x.json")


def test_a_place_that_cannot_be(pool, tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(StorageError, match="x.json"): write_poses(make(POINTS, root=pool), tmp_path/"file/x.json")


@pytest.mark.parametrize("change, says", [
    (dict(names=("nose", "nose", "ear")), "the name 'nose' occurs 2 times"), (dict(names=("no\nse", "b", "c")), "printable")])
@pytest.mark.parametrize("target", ["dlc", "labelme", "cvat", "yolo"])
def test_names_that_cannot_be_told_apart(target, change, says, pool, tmp_path):
    with pytest.raises(DataError, match=says):
        write_poses(make(POINTS, root=pool, **change), tmp_path/TARGETS[target], target)
    assert not os.listdir(tmp_path)


def test_what_cannot_be_written(pool, tmp_path):
    data = make(POINTS, root=pool)
    for path, kind, error, says in [("x.slp", "sleap", ConfigError, "read, not written"), ("x.txt", "coco", ConfigError, "ending in"),
                                    ("x.tar", None, ConfigError, "cannot tell"), ("x.json", "via", ConfigError, "one of coco")]:
        with pytest.raises(error, match=says): write_poses(data, tmp_path/path, kind)
    data.instances[0] = replace(data[0], file_name="../one.png")
    for target in TARGETS:
        if target.startswith("coco"): continue
        with pytest.raises(DataError, match=r"without '\.\.'"): write_poses(data, tmp_path/TARGETS[target], target.split(".")[0])
    other = make(POINTS, root=pool)
    other.categories[8] = Category(8, "rat", num_keypoints=3)
    other.instances.append(Instance(9, 5, 8, "a/one.png", 40, 30, (0, 0, 9, 9), other[0].keypoints, other[0].visibility))
    other.by_category[8] = [1]
    with pytest.raises(DataError, match="holds one category"): write_poses(other, tmp_path/"x.csv")
    assert not os.listdir(tmp_path)


# ---- foreign files ----

def test_formats_are_recognised(pool, tmp_path):
    data = make(POINTS, root=pool)
    for target, name in TARGETS.items():
        write_poses(data, tmp_path/target/name, target.split(".")[0])
        assert guess_format(tmp_path/target/name) == target.split(".")[0]
    for target in ("dlc", "cvat", "labelme", "yolo"):
        assert guess_format(tmp_path/target if target in ("dlc", "cvat") else tmp_path/target/TARGETS[target]) == target
    write_poses(data, tmp_path/"dlc/more.xml")
    with pytest.raises(ConfigError, match=r"found cvat \(more.xml\), dlc \(CollectedData_me.csv\)"): guess_format(tmp_path/"dlc")
    (tmp_path/"empty").mkdir()
    with pytest.raises(ConfigError, match="nothing known"): guess_format(tmp_path/"empty")
    with pytest.raises(MissingFileError, match="no such file"): read_poses(tmp_path/"none.csv")
    with pytest.raises(ConfigError, match="cannot tell"): read_poses(__file__)


DLC = """scorer,,,Anna,Anna,Anna,Anna,Anna,Anna
bodyparts,,,snout,snout,leftear,leftear,tail base,tail base
coords,,,x,y,x,y,x,y
labeled-data,mouse1,img001.png,1.5,2.25,,,5.0,6.0
labeled-data,mouse1,img014.png,7.0,8.0,9.125,10.0,11.0,12.0
"""
DLC_OLD = "\n".join(re.sub("^(scorer|bodyparts|coords),,,", r"\1,", line).replace("labeled-data,mouse1,", "labeled-data/mouse1/")
                    for line in DLC.splitlines())
DLC_MANY = """scorer,,,Anna,Anna,Anna,Anna,Anna,Anna
individuals,,,mus1,mus1,mus2,mus2,single,single
bodyparts,,,snout,snout,snout,snout,corner,corner
coords,,,x,y,x,y,x,y
labeled-data,mouse1,img001.png,0.0,1.0,6.0,7.0,12.0,13.0
labeled-data,mouse1,img014.png,14.0,15.0,,,,
"""


@pytest.fixture
def project(tmp_path):
    "A DeepLabCut project: a folder of two images and the place of its table."
    for name in ("img001.png", "img014.png"): picture(tmp_path/"labeled-data/mouse1"/name, (64, 48))
    return tmp_path/"labeled-data/mouse1"


@pytest.mark.parametrize("text", [DLC, DLC_OLD, DLC.replace("\n", "\r\n"), "\ufeff" + DLC])
def test_deeplabcut(text, project):
    (project/"CollectedData_Anna.csv").write_text(text, encoding="utf-8", newline="")
    for place in (project/"CollectedData_Anna.csv", project.parents[1], project):
        data = read_poses(place, "dlc")
        assert data.categories[1].keypoints == ("snout", "leftear", "tail base")
        assert [i.file_name.rsplit("/")[-1] for i in data.instances] == ["img001.png", "img014.png"]
        assert (data.root/data[0].file_name).is_file()
        np.testing.assert_array_equal(data[0].keypoints, [[1.5, 2.25], [0, 0], [5, 6]])
        assert data[0].visibility.tolist() == [2, 0, 2] and (data[0].width, data[0].height) == (64, 48)


def test_deeplabcut_with_several_animals(project):
    (project/"CollectedData_Anna.csv").write_text(DLC_MANY)
    with pytest.warns(DataWarning, match="3 names of individuals"):
        data = read_poses(project/"CollectedData_Anna.csv", category="mouse")
    assert [c.name for c in data.categories.values()] == ["mouse", "mouse single"]
    assert [(i.category_id, i.keypoints.tolist()) for i in data.instances] == [
        (1, [[0, 1]]), (1, [[6, 7]]), (2, [[12, 13]]), (1, [[14, 15]])]
    assert data.dropped == {"names of individuals": 3, "objects without a keypoint": 2}


BAD_DLC = {
    "cut off": (DLC[:-30], "row 5 has [0-9]+ cells, expected 9"),
    "half a point": (DLC.replace("1.5,2.25", "1.5,"), "row 4: snout: expected x and y or neither, got x '1.5', y None"),
    "a word": (DLC.replace("2.25", "here"), "row 4: snout y: expected a number .* got 'here'"),
    "infinite": (DLC.replace("2.25", "inf"), "row 4: snout y: expected a number"),
    "no head": (DLC.split("\n", 1)[1], "expected first cells like"),
    "other coordinates": (DLC.replace("coords,,,x,y", "coords,,,x,z"), r"column 2 of the keypoints \(snout z\): expected x, y"),
    "a body part twice": (DLC.replace("leftear", "snout"), "occurs twice"),
    "climbs out": (DLC.replace("labeled-data,mouse1,img001", "..,..,img001"), "row 4: expected the name of an image inside"),
    "frames of a video": (re.sub("labeled-data,mouse1,img0", ",,", DLC).replace(".png", ""), "frame of a video"),
    "empty": ("", "expected first cells"),
    "no rows": ("\n".join(DLC.splitlines()[:3]), "expected objects with keypoints, found none"),
    "no text": (b"\xff\xfe\x00scorer", "UTF-8"),
    "a quote left open": (DLC.replace("img001", '"img001'), "comma-separated|cells"),
}


@pytest.mark.parametrize("case", BAD_DLC)
def test_bad_deeplabcut(case, project):
    text, says = BAD_DLC[case]
    (project/"CollectedData_Anna.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=says) as info: quietly(project/"CollectedData_Anna.csv")
    assert "CollectedData_Anna.csv" in str(info.value)


def test_likelihood_is_said(project):
    text = DLC.replace("x,y,x,y,x,y", "x,y,likelihood,x,y,likelihood,x,y,likelihood")
    text = text.replace("snout,snout", "snout,snout,snout").replace("leftear,leftear", "leftear,leftear,leftear")
    text = text.replace("tail base,tail base", "tail base,tail base,tail base").replace("Anna,Anna,Anna", "Anna,Anna,Anna,Anna")
    text = "\n".join([*text.splitlines()[:3], "labeled-data,mouse1,img001.png,1,2,0.9,3,4,0,5,6,0.5"])
    text = text.replace("scorer,,," + ",".join(["Anna"]*8), "scorer,,," + ",".join(["Anna"]*9))
    (project/"p.csv").write_text(text)
    with pytest.warns(DataWarning, match="these are predictions"): data = read_poses(project/"p.csv")
    assert data[0].visibility.tolist() == [2, 0, 2]


def test_tables_with_a_pickle_are_refused(tmp_path):
    "pandas' table layout keeps its head as a pickle; it is never loaded."
    import h5py
    with h5py.File(tmp_path/"p.h5", "w") as file:
        group = file.create_group("df_with_missing")
        group.attrs["pandas_type"] = np.bytes_("frame_table")
        group.attrs["non_index_axes"] = np.bytes_(b"cos\nsystem\n(S'touch boom'\ntR.")
    with pytest.raises(DataError, match="pickle.*save it as csv"): read_poses(tmp_path/"p.h5")
    (tmp_path/"q.h5").write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="q.h5: expected a whole file"): read_poses(tmp_path/"q.h5")


# written by pandas 3.1.1 and PyTables 3.11.1: DataFrame.to_hdf(key="df_with_missing") of the table DLC above, gzip
PANDAS = (
    "ABzY8000000t4+^&2!sC6qn@0RT8^RNIIk~P){jfhKWZCVKALCwV?^_Oh`PA+iAHtN~|QB*pf$*Loy5lGhE6EI8kmr=EBfpk3IHJ=#3sZ=EUR{Ea"
    "|N*t)=w`NgBbvWM;jqw{PX$_j~*Hz4ecU+Y8Cj%cG1%JkJa<<BXS%fEqb}9X(%#l7;dil=~cNkK50tp?w_Wr(#b1CA61I^Ya$>5k_d7XK|<G8A|_"
    "0D$M7LR(T)lNS~f_e!l8P<!i;<s?-(3P}EIVFLMKqI|2HN>ve)jx%zFPrhKQo*iv9-a@@fJXa8G#X%8RIe7=}pSpmLb4{p9FE#EEr_<8&9-h650&"
    "hnDYAM@~w83EoS3;feIfAK*%|JmaFN@ZcW^ku$W3F|+b5ux8?AU=5j+5zju=TIm<`7u8}_pdwUBeYH#XovdGS!k!K{hz|;Gr-3d=*^Q){d#rymQz"
    "PKZtMFwTYnc8^Y@lZo%m3j^~PSnxGPJ`w^<u4KtulhC=K;OoURdx(E1dw0zR3uX6FRpPuTnoNv%po#oTMib~`@KhA!1*U%wH%pRBHHRcm7a!u#DV"
    "FU({E^itM!O*b6=xQE{`b!FZ3jx%h(p;}ey_Pp}QCgyy4$+`23`klAOk#-eBsO(6(BAa^w?^kcuOvPvS&)efU{nVPgBi9VVxG~pXn{e7#Z2hMIpR"
    "8X$Vl8P_(<DG_80s9yv5wt$c90lbO!$BZ^cuX4#r)^r>~^pEk}s9=5BkuT+00yDdh53%L+(Dff02wA*uI$EOJqJ|=dy2-`H=lO9Er9a$*Zd5e5%P"
    "CrYz|#h^SiAv|3C_sioE=LuOe^ad!6@%W|_dX-%%l)tRbfwz}4}rXja{6Q#Z>2x6w8Zd#wjIqMTz<-=P5BJk=Czw?(<&^`_28&Ia4GItH?*P(nD%"
    "5-jk*Qa|2B}$YiQKH0x2gS0i&+lXhJnyyr+%enFHFZff8k!+jVXJrh@Lk3mw#VC6)GG4(aX;QV72y1;bByTZU)OY5_xhQ<?PsczTG8c3!1*Za`rU"
    "0m-;$0bwa+6#<FL%A-PT}(=NTPu<F3CxZu48`0Pp;S`|ag~U&7h;+fQ4MtaFz2ImZRhe+)ZcdCyBD#CiV;=KTtt_hZ4Y5Q^Us5C580-D^m?X>`On"
    "y5Sg|r>8I+`z3Z8@8t2^q<HQD&q4^EIV?`&#WPEs_iqyZo^;+%V?SQkG`(sZ$9{|?1@Fh`sTGIx#?QLp7sc1MprHWm;d=CKr0^SNpH5r9dZqC9{d"
    "eQL>pbJsi-b6@IAEMt>?_Xe*ts;<n}6=La|xn;{*XZ5jM}*qv~#eNApWIHzy1o+y9*w@v!pL+svIuAn}5=|KlbaN{6zOjqJI*cpE-C3><S@26DQ9"
    "5FOk|;@cc{~<#k{0l8;9Dl*?qkT_~rok@?U)hTMBJK11!K*G`TR{XpDKA{-as9>l}0e&DZ>vXfEs1EYsuvOh;Uw~i9^?6*XFX6b%R{keYqx!<Wj*"
    "TcE+xwCxC<BoG7@7x<&t7+@oM(DY&T_&-82fh#IU(YzUu6R6R9Ny<CW@p0J`43p<)mOUC_)T!+AENK^*9T-fx&`ISt7Ja3KR<e#%!lr^K6yXd`%A"
    "2~&emK{q;9$TH#f%29mSY4jW2Xh8^7<_mV42D4;x-WMKR^N;R(MG;x9S3e**8{4#V^uhY<#d!;tUWT}V1ThN#_*ME-ZWQx839;8&ObolMevQTKdN"
    ";n?%Pmy$I98>Rej0r;*2;}{d%Jr6uKP#)>UC%wiG<|2h_$B#S593a2yL$be;f`PvOn9PUbrH^lt`CcIZP$cv5ATRw9nJ)``t2fAe=yy<0XO7E{I~"
    "#GBlgqQ;NYe9Wl=AE$eh&x?&$AC^AB*W;?c>cz*+)dqeFgjcA$aQ6PbmcKxrjX%vFEecbGI&H@<mL(h{+c*`64D?^vDN2*pX^Y*=W}ty=V`MwY$R"
    "y@QWe*VhI0i2>+}PNB8OPJC2q90W?WE2yj3E00")


def test_h5_of_pandas(project):
    import gzip
    (project/"CollectedData_Anna.h5").write_bytes(gzip.decompress(base64.b85decode(PANDAS)))
    data = read_poses(project/"CollectedData_Anna.h5")
    assert data.categories[1].keypoints == ("snout", "leftear", "tail base")
    np.testing.assert_array_equal(data[0].keypoints, [[1.5, 2.25], [0, 0], [5, 6]])
    np.testing.assert_array_equal(data[1].keypoints, [[7, 8], [9.125, 10], [11, 12]])


def labelme(**more):
    "A LabelMe file of another person: three points of one mouse, a box, and a polygon."
    def shape(label, points, kind="point", group=None, **rest):
        return dict(label=label, points=points, group_id=group, shape_type=kind, flags={}, **rest)
    shapes = [shape("nose", [[10.5, 11.5]]), shape("tail", [[20.5, 5.5]]), shape("mouse", [[30, 20], [5, 2]], "rectangle"),
              shape("grass", [[0, 0], [1, 1], [2, 0]], "polygon")]
    return dict(dict(version="5.4.1", flags={}, shapes=shapes, imagePath="one.png", imageData="not base64!", imageHeight=30,
                     imageWidth=40), **more)


def test_labelme(pool, tmp_path):
    picture(tmp_path/"one.png", (40, 30))
    (tmp_path/"one.json").write_text(json.dumps(labelme()))
    second = labelme(imagePath="two.png", imageHeight=None, imageWidth=None)
    second["shapes"] = [dict(s, label="ear") for s in second["shapes"][:1]]
    picture(tmp_path/"two.png", (40, 30))
    (tmp_path/"two.json").write_text(json.dumps(second))
    with pytest.warns(DataWarning, match="1 shapes of type polygon"): data = read_poses(tmp_path)
    assert [c.keypoints for c in data.categories.values()] == [("nose", "tail", "ear")]
    assert data[0].keypoints.tolist() == [[10, 11], [20, 5], [0, 0]] and data[0].box == (5, 2, 25, 18)
    assert data[1].visibility.tolist() == [0, 0, 2]
    assert quietly(tmp_path, names=["ear", "nose", "tail"])[0].keypoints.tolist() == [[0, 0], [10, 11], [20, 5]]
    with pytest.raises(DataError, match="unknown keypoint 'tail'; expected one of ear, nose"):
        quietly(tmp_path, names=["ear", "nose"])


def _shapes(change):
    content = labelme()
    change(content["shapes"])
    return content


BAD_LABELME = {
    "twice": (_shapes(lambda s: s.append(dict(s[0]))), "shape 4: a second point 'nose' with group_id None"),
    "no shapes": (labelme(shapes=None), "expected a list of shapes"),
    "not finite": (_shapes(lambda s: s[0].update(points=[[float("nan"), 3]])), r"shape 0 \(nose\): expected a number .* 'nan'"),
    "a pair short": (_shapes(lambda s: s[0].update(points=[[3]])), r"shape 0 \(nose\): expected 1 x, y pairs"),
    "no label": (_shapes(lambda s: s[0].update(label=None)), "shape 0: expected a shape with label"),
    "climbs out": (labelme(imagePath="../one.png"), "imagePath: expected the name of an image inside"),
    "whole path": (labelme(imagePath="C:\\me\\one.png"), "imagePath: expected the name of an image inside"),
    "another size": (labelme(imageHeight=31), "says that one.png has 40 x 31 pixels, but .* has 40 x 30"),
    "no size": (labelme(imageHeight=-1), "expected a number from 1"),
    "gone": (labelme(imagePath="three.png"), "1 of 1 images are not in .*three.png; images= names"),
    "a list": ([1], "expected a JSON object, got a list"),
    "odd group": (_shapes(lambda s: s[0].update(group_id=[1])), "expected a number as group_id"),
    "odd extra": (labelme(cape=dict(categories=[dict(name="mouse")])), "name, keypoints and skeleton"),
    "unknown": (labelme(cape=dict(categories=[dict(name="mouse", keypoints=["nose"], skeleton=[])])),
                "unknown keypoint 'tail' of mouse; expected one of nose"),
    "bad link": (labelme(cape=dict(categories=[dict(name="mouse", keypoints=["nose", "tail"], skeleton=[[0, 9]])])), "links"),
}


@pytest.mark.parametrize("case", BAD_LABELME)
def test_bad_labelme(case, tmp_path):
    content, says = BAD_LABELME[case]
    picture(tmp_path/"one.png", (40, 30))
    (tmp_path/"one.json").write_text(json.dumps(content))
    with pytest.raises((DataError, MissingFileError), match=says) as info: quietly(tmp_path/"one.json", format="labelme")
    assert "one" in str(info.value)


SVG = ('<line x1="1" y1="1" x2="2" y2="2" data-type="edge" data-node-from="2" data-node-to="3"></line>'
       + "".join(f'<circle r="1" cx="{n}" cy="1" data-type="element node" data-element-id="{n}" data-node-id="{n}" '
                 f'data-label-name="{name}"></circle>' for n, name in ((1, "nose"), (2, "ear"), (3, "tail"))))
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels>
<label><name>mouse</name><type>skeleton</type><attributes></attributes><svg>{svg}</svg></label>
<label><name>nose</name><type>points</type><parent>mouse</parent></label>
<label><name>ear</name><type>points</type><parent>mouse</parent></label>
<label><name>tail</name><type>points</type><parent>mouse</parent></label>
</labels></task></meta>
<image id="0" name="one.png" width="40" height="30">
  <skeleton label="mouse" source="manual" z_order="0">
    <points label="tail" source="manual" outside="0" occluded="1" points="20.50,5.50"></points>
    <points label="nose" source="manual" outside="0" occluded="0" points="10.50,11.50"></points>
    <points label="ear" source="manual" outside="1" occluded="0" points="3.00,4.00"></points>
  </skeleton>
  <tag label="good" source="manual"></tag>
</image></annotations>""".format(svg=SVG.replace("<", "&lt;").replace(">", "&gt;"))


def test_cvat(tmp_path):
    picture(tmp_path/"images/one.png", (40, 30))
    (tmp_path/"annotations.xml").write_text(CVAT)
    with pytest.warns(DataWarning, match="1 shapes of type tag"): data = read_poses(tmp_path/"annotations.xml")
    assert data.categories[1].keypoints == ("nose", "ear", "tail") and data.categories[1].links == ((1, 2),)
    assert data[0].keypoints.tolist() == [[10, 11], [0, 0], [20, 5]] and data[0].visibility.tolist() == [2, 0, 1]
    assert quietly(tmp_path, images=False)[0].file_name == "one.png"


def test_cvat_points_without_skeleton(tmp_path):
    head = '<annotations><image id="0" name="one.png" width="40" height="30">{}</image></annotations>'
    single = "".join(f'<points label="{k}" occluded="0" points="{x},5.5" group_id="{g}"></points>'
                     for k, x, g in (("nose", 1.5, 1), ("ear", 2.5, 1), ("ear", 9.5, 2)))
    whole = '<points label="mouse" occluded="0" points="1.5,2.5;3.5,4.5"></points><box label="mouse" xtl="1" ytl="1" xbr="9" ybr="9"/>'
    (tmp_path/"s.xml").write_text(head.format(single))
    data = read_poses(tmp_path/"s.xml", images=False)
    assert data.categories[1].keypoints == ("nose", "ear") and [i.visibility.tolist() for i in data.instances] == [[2, 2], [0, 2]]
    (tmp_path/"w.xml").write_text(head.format(whole))
    data = quietly(tmp_path/"w.xml", images=False, names=["nose", "ear"])
    assert data[0].keypoints.tolist() == [[1, 2], [3, 4]] and data.dropped == {"boxes without keypoints": 1}
    assert data.categories[1].keypoints == ("nose", "ear") and data.categories[1].name == "mouse"
    (tmp_path/"u.xml").write_text(head.format(whole + '<points label="mouse" points="1,2;3,4;5,6"/>'))
    with pytest.raises(DataError, match="equally many keypoints, got 1 with 2, 1 with 3"): quietly(tmp_path/"u.xml", images=False)
    with pytest.raises(DataError, match="has 2 keypoints, names= has 1"): quietly(tmp_path/"w.xml", images=False, names=["nose"])


LAUGHS = '<!DOCTYPE a [<!ENTITY l "lol"><!ENTITY m "&l;&l;&l;&l;">]>'
SECRET = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>'
BAD_CVAT = {
    "laughs": (CVAT.replace("<annotations>", LAUGHS + "<annotations>").replace("good", "&m;"), "declares entities"),
    "other files": (CVAT.replace("<annotations>", SECRET + "<annotations>").replace("good", "&x;"), "declares entities"),
    "cut off": (CVAT[:-60], "expected whole XML"),
    "another file": ("<svg></svg>", "expected <annotations> with an <image>"),
    "a video": (CVAT.replace("</annotations>", "<track></track></annotations>"), "CVAT for images 1.1"),
    "unknown": (CVAT.replace('points label="tail"', 'points label="leg"'), "image one.png: skeleton 0 .mouse.: unknown keypoint 'leg'"),
    "twice": (CVAT.replace('points label="tail"', 'points label="nose"'), "two points 'nose'"),
    "not finite": (CVAT.replace("20.50,5.50", "nan,5.50"), "skeleton 0 .mouse.: tail: expected a number"),
    "no pair": (CVAT.replace("20.50,5.50", "20.50"), "tail: expected points like"),
    "two pairs": (CVAT.replace("20.50,5.50", "2,3;4,5"), "tail: expected one point, got 2"),
    "no size": (CVAT.replace('width="40"', 'width="wide"'), "size of one.png: expected a number"),
    "another size": (CVAT.replace('width="40"', 'width="41"'), "41 x 30 pixels, but .* has 40 x 30"),
    "climbs out": (CVAT.replace('name="one.png"', 'name="../../one.png"'), "image: expected the name of an image inside"),
    "a line to nowhere": (CVAT.replace('node-to="3"', 'node-to="9"'), "a line joins nodes that are none of its 3"),
    "the same name": (CVAT.replace("<name>tail<", "<name>nose<"), "the name 'nose' occurs 2 times"),
    "a box inside out": (CVAT.replace("<tag ", '<box xtl="9" ytl="1" xbr="2" ybr="5" group_id="1"/><tag '), "xtl <= xbr"),
}


@pytest.mark.parametrize("case", BAD_CVAT)
def test_bad_cvat(case, tmp_path):
    text, says = BAD_CVAT[case]
    picture(tmp_path/"images/one.png", (40, 30))
    (tmp_path/"annotations.xml").write_text(text)
    with pytest.raises(DataError, match=says) as info: quietly(tmp_path/"annotations.xml")
    assert "annotations.xml" in str(info.value)


YAML = """# as a labelling service writes it
train: ../train/images
val: ../valid/images
nc: 1
names: ['mouse']
kpt_shape: [2, 3]
flip_idx: [1, 0]
"""


@pytest.fixture
def yolo(tmp_path):
    "A folder of train/ and valid/, each with images/ and labels/."
    (tmp_path/"data.yaml").write_text(YAML)
    for part in ("train", "valid"):
        picture(tmp_path/part/"images/one.v1.jpg", (40, 30))
        (tmp_path/part/"labels").mkdir()
        (tmp_path/part/"labels/one.v1.txt").write_text("0 0.5 0.5 0.5 0.4 0.25 0.5 2 0 0 0\n")
    return tmp_path


def test_yolo(yolo):
    for place in (yolo, yolo/"data.yaml"):
        data = read_poses(place, names=["nose", "tail"])
        assert [i.file_name for i in data.instances] == ["train/images/one.v1.jpg", "valid/images/one.v1.jpg"]
        assert data[0].keypoints.tolist() == [[9.5, 14.5], [0, 0]] and data[0].visibility.tolist() == [2, 0]
        assert data[0].box == (10, 9, 20, 12) and data.categories[1].keypoints == ("nose", "tail")
    (yolo/"data.yaml").write_text(YAML.replace("[2, 3]", "[2, 2]"))
    for part in ("train", "valid"): (yolo/part/"labels/one.v1.txt").write_text("0 0.5 0.5 0.5 0.4 0.25 0.5 0 0\n")
    assert read_poses(yolo)[0].visibility.tolist() == [2, 0]
    with pytest.raises(ConfigError, match="images=False cannot work"): read_poses(yolo, images=False)


LINE = "0 0.5 0.5 0.5 0.4 0.25 0.5 2 0 0 0"
BAD_YOLO = {
    "cut off": (YAML, LINE[:-6], "one.v1.txt: line 1: expected 11 numbers .* got 8"),
    "negative class": (YAML, "-1" + LINE[1:], "line 1: expected a class number of 0 or more, got '-1'"),
    "unknown class": (YAML, "3" + LINE[1:], "line 1: class 3, but data.yaml names 1"),
    "not finite": (YAML, LINE.replace("0.25", "nan"), "line 1: keypoint 0: expected a number from -1e-06 to 1"),
    "pixels": (YAML, LINE.replace("0.25", "25"), "line 1: keypoint 0: expected a number from -1e-06 to 1"),
    "odd flag": (YAML, LINE.replace(" 2 ", " 7 "), "keypoint 0 v: expected a number from 0 to 2"),
    "a word": (YAML, LINE.replace("0.4", "wide"), "line 1: box: expected a number"),
    "no shape": (YAML.replace("[2, 3]", "[2]"), LINE, "expected kpt_shape: .K, 2 or 3., got .2."),
    "a negative shape": (YAML.replace("[2, 3]", "[-2, 3]"), LINE, "expected kpt_shape"),
    "a wrong flip": (YAML.replace("[1, 0]", "[1, 1]"), LINE, "expected flip_idx to name each of 0 to 1 once"),
    "an open list": (YAML.replace("[2, 3]", "[2, 3"), LINE, "expected YAML, but"),
    "a program": (YAML + "boom: !!python/object/apply:os.system ['touch boom']\n", LINE, "expected YAML, but"),
    "no names": (YAML.replace("names:", "titles:"), LINE, "expected names: of classes"),
    "two classes alike": (YAML.replace("['mouse']", "['mouse', 'mouse']"), LINE, "names that differ"),
    "odd names": (YAML + "kpt_names: {0: [a, b, c]}\n", LINE, "at most 2 kpt_names"),
    "a keypoint twice": (YAML + "kpt_names: {0: [a, a]}\n", LINE, "the name 'a' occurs 2 times"),
}


@pytest.mark.parametrize("case", BAD_YOLO)
def test_bad_yolo(case, yolo):
    config, line, says = BAD_YOLO[case]
    (yolo/"data.yaml").write_text(config)
    (yolo/"train/labels/one.v1.txt").write_text(line)
    with pytest.raises(DataError, match=says): read_poses(yolo, "yolo")
    assert not (Path.cwd()/"boom").exists()


def test_yolo_images(yolo):
    "One that is missing, and one that two files could be."
    (yolo/"valid/images/one.v1.png").write_bytes((yolo/"valid/images/one.v1.jpg").read_bytes())
    with pytest.raises(DataError, match="one.v1.jpg and one.v1.png both fit the labels"): read_poses(yolo)
    for file in (yolo/"valid/images").iterdir(): file.unlink()
    with pytest.raises(MissingFileError, match=r"1 of 2 images .* first valid/images/one.v1\.\*"): read_poses(yolo)


def test_mirror():
    assert _mirror(["nose", "left_eye", "right_eye"]) == [0, 2, 1]
    assert _mirror(["paw.L", "paw.R", "tail"]) == [1, 0, 2]
    assert _mirror(["nose", "tail"]) is None and _mirror(["left ear", "nose"]) is None


# ---- SLEAP ----

POINT = np.dtype([("x", "f8"), ("y", "f8"), ("visible", "?"), ("complete", "?")])
GUESS = np.dtype([*POINT.descr, ("score", "f8")])
INSTANCE = np.dtype([("instance_id", "i8"), ("instance_type", "u1"), ("frame_id", "u8"), ("skeleton", "u4"), ("track", "i4"),
                     ("from_predicted", "i8"), ("score", "f4"), ("point_id_start", "u8"), ("point_id_end", "u8"),
                     ("tracking_score", "f4")])
FRAME = np.dtype([("frame_id", "u8"), ("video", "u4"), ("frame_idx", "u8"), ("instance_id_start", "u8"), ("instance_id_end", "u8")])


def slp(path, version=1.4, video=None, name="fly", points=None, instances=None, frames=None, pictures=None):
    "A file laid out as SLEAP lays out its own: three nodes, two links and a symmetry, one labelled and one predicted fly."
    import h5py
    def edge(a, b, kind): return dict(source=a, target=b, type=kind, key=0)
    first = {"py/reduce": [{"py/type": "sleap.skeleton.EdgeType"}, {"py/tuple": [1]}]}
    mirror = {"py/reduce": [{"py/type": "sleap.skeleton.EdgeType"}, {"py/tuple": [2]}]}
    links = [edge(0, 2, first), edge(2, 1, {"py/id": 1}), edge(1, 0, mirror)]
    told = dict(version="2.0.0", skeletons=[dict(directed=True, graph=dict(name=name, num_edges_inserted=2), links=links,
                                                 nodes=[dict(id=0), dict(id=2), dict(id=1)])],
                nodes=[dict(name=n, weight=1.) for n in ("head", "wing", "thorax")])
    video = video or dict(filename=["C:/flies/a0.png", "C:/flies/a1.png"], backend=dict(
        type="ImageVideo", shape=[2, 48, 64, 3], filename="C:/flies/a0.png", filenames=["C:/flies/a0.png", "C:/flies/a1.png"]))
    points = points or [(10, 11, True, False), (np.nan, np.nan, False, False), (20, 21.5, False, False)]
    instances = instances or [(0, 0, 0, 0, -1, -1, 0, 0, 3, 0), (1, 1, 0, 0, -1, -1, .7, 0, 3, 0)]
    with h5py.File(path, "w") as file:
        meta = file.create_group("metadata")
        meta.attrs["format_id"], meta.attrs["json"] = version, np.bytes_(json.dumps(told))
        file["videos_json"] = [json.dumps(video).encode()]
        file["frames"] = np.array(frames or [(0, 0, 1, 0, 2)], FRAME)
        file["instances"], file["points"] = np.array(instances, INSTANCE), np.array(points, POINT)
        file["pred_points"] = np.array([(1, 2, True, False, .9), (3, 4, True, False, .8), (5, 6, True, False, .7)], GUESS)
        if pictures:
            rows = np.zeros((len(pictures), max(map(len, pictures.values()))), np.int8)
            for row, content in zip(rows, pictures.values()): row[:len(content)] = np.frombuffer(content, np.int8)
            kept = file.create_dataset("video0/video", data=rows)
            kept.attrs["format"], file["video0/frame_numbers"] = "png", np.array([*pictures])
    return path


def test_sleap(tmp_path):
    picture(tmp_path/"a1.png", (64, 48))
    with pytest.warns(DataWarning, match="1 predicted objects"): data = read_poses(slp(tmp_path/"flies.slp"))
    kind = data.categories[1]
    assert (kind.name, kind.keypoints, kind.links) == ("fly", ("head", "thorax", "wing"), ((0, 1), (1, 2)))
    assert data[0].file_name == "a1.png" and data[0].keypoints.tolist() == [[10, 11], [0, 0], [0, 0]] and len(data) == 1
    old = quietly(slp(tmp_path/"old.slp", version=1.0, name="Skeleton-0"), category="insect")
    assert old[0].keypoints[0].tolist() == [9.5, 10.5] and old.categories[1].name == "insect"
    bare = quietly(slp(tmp_path/"bare.slp"), images=False)
    assert (bare[0].width, bare[0].height) == (64, 48)
    guess = [(1, 1, 0, 0, -1, -1, .7, 0, 3, 0)]
    data = quietly(slp(tmp_path/"guess.slp", instances=guess, frames=[(0, 0, 1, 0, 1)]))
    assert data[0].keypoints[2].tolist() == [5, 6] and data.dropped == {"scores of predicted objects": 1}


def test_sleap_film_and_package(tmp_path):
    "A frame of a film is looked for by its number; pictures in the file are unpacked where they are asked for."
    film = dict(filename="/lab/mouse.mp4", backend=dict(type="MediaVideo", filename="/lab/mouse.mp4", shape=[9, 48, 64, 3]))
    path = slp(tmp_path/"film.slp", video=film)
    with pytest.raises(MissingFileError, match=r"first mouse_000001\.\*"): quietly(path)
    picture(tmp_path/"mouse_000001.png", (64, 48))
    assert quietly(path)[0].file_name == "mouse_000001.png"
    picture(tmp_path/"shot.png", (64, 48))
    packed = dict(filename=".", backend=dict(type="HDF5Video", filename=".", dataset="video0/video", shape=[1, 48, 64, 3]))
    path = slp(tmp_path/"p.pkg.slp", video=packed, pictures={1: (tmp_path/"shot.png").read_bytes()})
    (tmp_path/"out").mkdir()
    data = quietly(path, images=tmp_path/"out")
    assert data.image(0).shape == (48, 64, 3) and os.listdir(tmp_path/"out") == ["video0_000001.png"]
    path = slp(tmp_path/"q.pkg.slp", video=packed, pictures={4: (tmp_path/"shot.png").read_bytes()})
    (tmp_path/"none").mkdir()
    with pytest.raises(DataError, match="expected frame 1 as png or jpg"): quietly(path, images=tmp_path/"none")


BAD_SLEAP = {
    "too few points": (dict(points=[(1, 1, True, True)]), "instance 0 has 1 points, its skeleton 3"),
    "not finite": (dict(points=[(np.inf, 1, True, True)]*3), "frame 1: head x: expected a number"),
    "frame beyond": (dict(frames=[(0, 0, 7, 0, 2)]), "frame 7 of a video of 2 pictures"),
    "no such video": (dict(frames=[(0, 5, 1, 0, 2)]), "stopped with: 5"),
    "no such skeleton": (dict(instances=[(0, 0, 0, 4, -1, -1, 0, 0, 3, 0)]*2), "stopped with: list index"),
    "climbs out": (dict(video=dict(filename=["../../a.png"]*2, backend=dict(type="ImageVideo"))), "expected the name of an image inside"),
}


@pytest.mark.parametrize("case", BAD_SLEAP)
def test_bad_sleap(case, tmp_path):
    change, says = BAD_SLEAP[case]
    picture(tmp_path/"a1.png", (64, 48))
    with pytest.raises(DataError, match=says): quietly(slp(tmp_path/"x.slp", **change))


def test_sleap_analysis_is_not_labels(tmp_path):
    import h5py
    with h5py.File(tmp_path/"x.slp", "w") as file: file["tracks"] = np.zeros((1, 2, 3, 4))
    with pytest.raises(DataError, match="analysis has no names of images"): read_poses(tmp_path/"x.slp")


def test_h5py_is_asked_for(pool, tmp_path, monkeypatch):
    slp(tmp_path/"x.slp")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match="pip install h5py"): read_poses(tmp_path/"x.slp")
    with pytest.raises(ConfigError, match="pip install h5py"): write_poses(make(POINTS, root=pool), tmp_path/"x.h5")


# ---- COCO ----

def test_coco_links(pool, tmp_path):
    "Links count from 1 in the file, and come back even where no link touches the last keypoint."
    data = make(POINTS, links=((0, 1),), root=pool)
    write_poses(data, tmp_path/"x.json")
    content = json.loads((tmp_path/"x.json").read_text())
    assert content["categories"][0]["skeleton"] == [[1, 2]]
    assert read_poses(tmp_path/"x.json", images=pool).categories[7].links == ((0, 1),)
    del content["info"]
    (tmp_path/"x.json").write_text(json.dumps(content))
    assert read_poses(tmp_path/"x.json", images=pool).categories[7].links == ((1, 2),)
    assert read_poses(tmp_path/"x.json", images=pool, links_from=1).categories[7].links == ((0, 1),)


def _coco(pool, tmp_path, change):
    write_poses(make(POINTS, root=pool), tmp_path/"x.json")
    content = json.loads((tmp_path/"x.json").read_text())
    change(content)
    (tmp_path/"x.json").write_text(json.dumps(content))
    return tmp_path/"x.json"


BAD_COCO = {
    "not finite": (lambda c: c["annotations"][0]["keypoints"].__setitem__(0, float("nan")), "annotation 100 has a labelled keypoint"),
    "another K": (lambda c: c["annotations"][0]["keypoints"].pop(), "annotation 100 has 8 keypoint values"),
    "unknown image": (lambda c: c["annotations"][0].update(image_id=77), "names image 77"),
    "climbs out": (lambda c: c["images"][0].update(file_name="../one.png"), "image 5: expected the name of an image inside"),
    "another size": (lambda c: c["images"][0].update(width=41), "says that a/one.png has 41 x 30 pixels, but .* has 40 x 30"),
    "a link to nowhere": (lambda c: c["categories"][0].update(skeleton=[[1, 9]]), "has 3 keypoints, counted from 1"),
}


@pytest.mark.parametrize("case", BAD_COCO)
def test_bad_coco(case, pool, tmp_path):
    change, says = BAD_COCO[case]
    with pytest.raises(DataError, match=says): quietly(_coco(pool, tmp_path, change), images=pool)


def test_missing_images(pool, tmp_path):
    path = _coco(pool, tmp_path, lambda c: None)
    with pytest.raises(MissingFileError, match="1 of 1 images are not in .*first a/one.png; images= names"): read_poses(path)
    with pytest.raises(MissingFileError, match="no such folder of images"): read_poses(path, images=tmp_path/"none")
    assert len(read_poses(path, images=False)) == 1
    with pytest.raises(ConfigError, match="list of keypoint names"): read_poses(path, images=False, names="nose")


def test_two_images_never_become_one(tmp_path):
    "Folders of a name are dropped until every image is found, but not so far that two names are alike."
    for name in ("x.png", "mouse1/y.png", "mouse2/y.png"): picture(tmp_path/name, (4, 4))
    found = _Found("a.csv", [tmp_path])
    names = ["labeled-data/mouse1/y.png", "labeled-data/mouse2/y.png"]
    assert _place(found, names)[1][names[1]] == "mouse2/y.png"
    with pytest.raises(MissingFileError, match="2 of 2 images are not in"): _place(found, ["t/a/x.png", "t/b/x.png"])
    assert _place(found, ["t/a/x.png"])[1] == {"t/a/x.png": "x.png"}


# ---- damage ----

@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory):
    "A good file of every format, as bytes."
    root, out = tmp_path_factory.mktemp("whole"), {}
    points = [*POINTS, [(1, 2, 2), (3, 4, 2), (5, 6, 1)]]
    for target, name in TARGETS.items(): write_poses(make(points, root=pool), root/name, target.split(".")[0])
    files = {"coco": "x.json", "coco.gz": "x.json.gz", "dlc": "CollectedData_me.csv", "dlc.h5": "CollectedData_me.h5",
             "labelme": "labels/a/one.json", "cvat": "x.xml", "yolo": "set/data.yaml", "yolo.txt": "set/labels/a/one.txt"}
    for target, name in files.items(): out[target] = (name, (root/name).read_bytes())
    out["sleap"] = ("x.slp", slp(root/"x.slp").read_bytes())
    return root, out


@pytest.mark.parametrize("target", ["coco", "dlc", "dlc.h5", "labelme", "cvat", "yolo", "yolo.txt", "sleap", "coco.gz"])
@settings(FEW, max_examples=8)
@given(data=st.data())
def test_damage_is_an_error_of_ours_or_none(target, data, pool, whole):
    "A file cut off or with a few bytes changed is read, or refused with a `CapeError`: never anything else."
    name, content = whole[1][target]
    content, cut = bytearray(content), data.draw(st.booleans())
    if cut or target in ("dlc.h5", "sleap"): content = content[:data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'0-9.",:[]{}<>/ax \n\xff'))
    with tempfile.TemporaryDirectory() as tmp:
        for other, (where, good) in whole[1].items():
            if other.split(".")[0] != target.split(".")[0] and other != target: continue
            (Path(tmp)/where).parent.mkdir(parents=True, exist_ok=True)
            (Path(tmp)/where).write_bytes(bytes(content) if other == target else good)
        path = Path(tmp)/(name if not target.startswith("yolo") else "set")
        try: quietly(path, format=target.split(".")[0], images=pool)
        except CapeError as error: assert str(error)


@pytest.mark.parametrize("target", FORMATS)
def test_every_format_is_in_the_table(target):
    kind = FORMATS[target]
    assert kind.holds <= set(_LOSSES) and kind.offset in (0, .5) and (kind.write is None) == (target == "sleap")
