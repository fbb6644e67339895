"Annotation files: published loading order, every fault with its message, atomic writing, MP-100."
import copy
import gzip
import importlib.util
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cape.data import annotations as module
from cape.data.annotations import (
    Category, DataWarning, Instance, PoseDataset, clean_box, data_home, mp100_facts, read_annotations,
    read_image, write_atomic)
from cape.errors import ConfigError, DataError, MissingFileError

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1]/"shared"
MP100, REALSET = SHARED/"mp100", SHARED/"realset"
needs_mp100 = pytest.mark.skipif(not (MP100/"annotations").is_dir(), reason="no MP-100 files at hand")
needs_realset = pytest.mark.skipif(not (REALSET/"annotations").is_dir(), reason="no real images at hand")


@pytest.fixture
def coco():
    "Two categories with three and two keypoints, two images each."
    images = [dict(id=10+n, file_name=f"{'ab'[n // 2]}/{n}.png", width=40, height=30) for n in range(4)]
    rows = [dict(id=n+1, image_id=10+n, category_id=1 + n//2, bbox=[2, 3, 20, 15.5], iscrowd=0, area=310.0,
                 keypoints=[3, 4, 2, 5.25, 6, 1] + [7, 8, 2]*(n < 2)) for n in range(4)]
    return dict(images=images, annotations=rows, categories=[
        dict(id=1, name="fan", supercategory="tool", keypoints=["hub", "left", "right"],
             skeleton=[[0, 1], [0, 2]], parts=["base", "tip", "tip"]),
        dict(id=2, name="rod", supercategory="toy", keypoints=["low", "high"], skeleton=[[0, 1]])])


def write(folder, coco, name="all.json", images=True):
    "The data set as files."
    (folder/"annotations").mkdir(parents=True, exist_ok=True)
    (folder/"annotations"/name).write_text(json.dumps(coco))
    for image in coco["images"] if images else ():
        path = folder/"images"/image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"]), (200, 100, 50)).save(path)
    return folder


# the published loader

def synth():
    "The synthetic data set that the published loader was run on."
    spec = importlib.util.spec_from_file_location("synth_mp100", HERE/"golden"/"synth_mp100.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker.annotations()


def test_as_the_published_loader():
    golden = np.load(HERE/"golden"/"golden_data_pomnet.npz")
    data = PoseDataset.from_dict(synth())
    assert {str(c): rows for c, rows in data.by_category.items()} == json.loads(str(golden["cat2obj"]))
    assert list(data.by_category) == [42, 3, 7]
    assert [i.category_id for i in data.instances] == golden["db_category"].tolist()
    assert [i.file_name for i in data.instances] == json.loads(str(golden["db_file"]))
    np.testing.assert_array_equal([i.clean_box for i in data.instances], golden["db_bbox"])
    for one, joints, visible, k in zip(data.instances, golden["db_joints"], golden["db_visible"],
                                       golden["db_kpt_num"], strict=True):
        np.testing.assert_array_equal(one.keypoints, joints[:k])
        np.testing.assert_array_equal(one.visible, visible[:k])
    assert sum(data.dropped.values()) == 5 and len(data.dropped) == 5
    sides = np.array([i.box_side for i in data.instances], np.float32)
    np.testing.assert_allclose(sides/200*1.25, golden["db_scale"][:, 0], rtol=1e-6)


def test_two_categories_of_one_name():
    with pytest.raises(ConfigError, match=r"'face' stands for the categories \[3, 7\]"):
        PoseDataset.from_dict(synth()).select("face")
    assert list(PoseDataset.from_dict(synth()).select(7).categories) == [7]


def test_order_is_that_of_the_images(coco):
    coco["annotations"].reverse()
    coco["images"].reverse()
    coco["categories"].reverse()
    data = PoseDataset.from_dict(coco)
    assert [i.id for i in data.instances] == [4, 3, 2, 1] and list(data.categories) == [2, 1]


def test_clean_box_is_none_where_nothing_is_left():
    assert clean_box((5, 5, 1, 10), 20, 20) is None and clean_box((5, 5, -3, 10), 20, 20) is None
    assert clean_box((-5, -5, 100, 100), 20, 10) == (0, 0, 19, 9)


# reading and writing

def test_round_trip(coco, tmp_path):
    data = PoseDataset.from_dict(coco)
    for name in ("a.json", "a.json.gz"):
        again = PoseDataset.from_dict(read_annotations(data.save(tmp_path/name)))
        assert again.to_dict() == data.to_dict() and again.fingerprint == data.fingerprint
        assert again.categories == data.categories
        assert again.categories[1] == Category(1, "fan", "tool", ("hub", "left", "right"), ((0, 1), (0, 2)),
                                               ("base", "tip", "tip"), 3)
    assert data[0].box == (2, 3, 20, 15.5) and data[0].keypoints.dtype == np.float32
    assert data.to_dict()["annotations"][0]["keypoints"] == coco["annotations"][0]["keypoints"]


def test_same_data_same_bytes(coco, tmp_path):
    data = PoseDataset.from_dict(coco)
    first = data.save(tmp_path/"x.json.gz").read_bytes()
    os.utime(tmp_path/"x.json.gz", (1, 1))
    assert data.save(tmp_path/"y.json.gz").read_bytes() == first


def test_fingerprint_sees_content_and_not_spacing(coco):
    print_ = PoseDataset.from_dict(coco).fingerprint
    assert PoseDataset.from_dict(json.loads(json.dumps(coco, indent=3, sort_keys=True))).fingerprint == print_
    changes = [lambda c: c["annotations"][0]["keypoints"].__setitem__(0, 3.5),
               lambda c: c["annotations"][0]["keypoints"].__setitem__(2, 1),
               lambda c: c["annotations"][1]["bbox"].__setitem__(2, 21),
               lambda c: c["annotations"].pop(), lambda c: c["images"].reverse(),
               lambda c: c["categories"][0].update(name="f")]
    for change in changes:
        other = copy.deepcopy(coco)
        change(other)
        assert PoseDataset.from_dict(other).fingerprint != print_


def test_writing_is_atomic(coco, tmp_path, monkeypatch):
    path = PoseDataset.from_dict(coco).save(tmp_path/"x.json")
    before = path.read_bytes()
    coco["annotations"].pop()

    def full(*args): raise OSError(28, "No space left on device")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(module.os, name, full)
            with pytest.raises(OSError, match="No space"): PoseDataset.from_dict(coco).save(path)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert len(read_annotations(PoseDataset.from_dict(coco).save(path))["annotations"]) == 3
    assert write_atomic(tmp_path/"deep"/"er"/"x", b"1").read_bytes() == b"1"


def test_save_wants_a_json_name(coco, tmp_path):
    with pytest.raises(ConfigError, match="json.gz"): PoseDataset.from_dict(coco).save(tmp_path/"x.csv")


def test_arrays_are_read_only(coco):
    with pytest.raises(ValueError): PoseDataset.from_dict(coco)[0].keypoints[0] = 1


# files that are none

NO_FILES = [
    (b'{"images": [], "annot', "cut off"), (b"", "cut off"), (b"\xff\xfe\x00", "cut off"),
    (b"[1, 2]", "got list"),
    (b'{"images": [], "annotations": []}', r"got a dict with \['annotations', 'images'\]"),
    (gzip.compress(b'{"images": []}'*50, mtime=0)[:-20], "cut off"),
    (b'{"images":{},"annotations":[],"categories":[]}', "lists"),
    (b'{"images":[{"id":1}],"annotations":[],"categories":[]}', "entry 0 of 'images' needs id .*file_name"),
    (b'{"images":[],"annotations":[7],"categories":[]}', "entry 0 of 'annotations'"),
    (b'{"images":[],"annotations":[],"categories":[{"id":"a","name":"b"}]}', r"id \(int\), name \(str\)")]


@pytest.mark.parametrize("content, says", NO_FILES)
def test_not_an_annotation_file(content, says, tmp_path):
    path = tmp_path/"x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error: PoseDataset.load(path)
    assert str(path) in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(MissingFileError, match="expected a data set's folder or an annotation file"):
        PoseDataset.load(tmp_path/"x.json")
    with pytest.raises(MissingFileError, match="found none"): PoseDataset.load(tmp_path)
    with pytest.raises(MissingFileError, match="no such annotation file"): read_annotations(tmp_path/"x.json")


# damage: raises, strict or not

DAMAGE = [(dict(image_id=99), "unknown image", "annotation 2 names image 99"),
          (dict(image_id="11"), "unknown image", "names image '11'"),
          (dict(category_id=9), "unknown category", "annotation 2 names category 9"),
          (dict(keypoints=[1, 2, 2, 3]), "malformed keypoints", "annotation 2 has 4 keypoint values"),
          (dict(keypoints=[1, 2, None]*3), "malformed keypoints", "annotation 2 has keypoints that are not"),
          (dict(bbox=[1, 2, 3]), "malformed box", r"annotation 2 has the box \[1, 2, 3\]; expected")]


@pytest.mark.parametrize("change, kind, says", DAMAGE)
@pytest.mark.parametrize("strict", [False, True])
def test_damage(change, kind, says, strict, coco, tmp_path):
    coco["annotations"][1].update(change)
    with pytest.raises(DataError, match=says) as error:
        PoseDataset.load(write(tmp_path, coco), strict=strict)
    assert "all.json" in str(error.value)


def test_image_without_size(coco):
    del coco["images"][0]["width"]
    with pytest.raises(DataError, match=r"image 10 \(a/0.png\) of size \(None, 30\)"):
        PoseDataset.from_dict(coco)


def test_one_id_for_two_things(coco):
    for key, field in (("images", "file_name"), ("categories", "name")):
        other = copy.deepcopy(coco)
        other[key].append(dict(other[key][0], **{field: "else"}))
        with pytest.raises(DataError, match="stands for the .* 'else'; ids must be unique"):
            PoseDataset.from_dict(other)


def test_links_that_could_be_either_are_read_as_they_stand(coco):
    coco["categories"][0]["skeleton"] = [[1, 2]]
    coco["categories"][1]["skeleton"] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PoseDataset.from_dict(coco).categories[1].links == ((1, 2),)
    coco["categories"][1]["skeleton"] = [[1, 2]]  # keypoint 2 of 2: only possible when counting from 1
    with pytest.warns(DataWarning, match="count from 1"):
        assert PoseDataset.from_dict(coco).categories[1].links == ((0, 1),)
    coco["categories"][0]["skeleton"] = [[0, 1]]  # and here only when counting from 0
    with pytest.raises(DataError, match="category 2"): PoseDataset.from_dict(coco)


def test_links_out_of_range(coco):
    coco["categories"][0]["skeleton"] = [[0, 1], [1, 7]]
    with pytest.raises(DataError, match=r"category 1 \(fan\) has 3 keypoints.*\[\(1, 7\)\]"):
        PoseDataset.from_dict(coco)
    coco["categories"][0]["skeleton"] = [[0, 1, 2]]
    with pytest.raises(DataError, match="expected a list of pairs"): PoseDataset.from_dict(coco)


# single bad annotations: left out and said, or raised by strict

FAULTS = [(dict(keypoints=[1, 1, 2, 2, 2, 2]), "another K", "has 2 keypoints, its category has 3"),
          (dict(keypoints=[1, float("nan"), 2]*3), "keypoint not a number", "2 has a labelled keypoint that"),
          (dict(keypoints=[1, float("inf"), 1]*3), "keypoint not a number", "2 has a labelled keypoint that"),
          (dict(bbox=[1, float("nan"), 9, 9]), "box not a number", "annotation 2 has the box")]


@pytest.mark.parametrize("change, kind, says", FAULTS)
def test_fault(change, kind, says, coco, tmp_path):
    coco["annotations"][1].update(change)
    with pytest.raises(DataError, match=says): PoseDataset.from_dict(coco, strict=True)
    with pytest.warns(DataWarning, match=says): data = PoseDataset.load(write(tmp_path, coco))
    assert [i.id for i in data.instances] == [1, 3, 4] and data.dropped == {kind: 1}
    assert "left out" in data.summary()


def test_unlabelled_nan_is_nothing(coco):
    coco["annotations"][0]["keypoints"][:3] = [float("nan"), float("nan"), 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = PoseDataset.from_dict(coco, strict=True)
    assert data[0].keypoints[0].tolist() == [0, 0] and data[0].visibility[0] == 0
    data.to_dict()


def test_names_that_do_not_fit(coco):
    coco["categories"][1]["keypoints"] = ["a", "b", "c"]
    with pytest.warns(DataWarning, match="names 3 keypoints but its annotations have 2"):
        assert PoseDataset.from_dict(coco).categories[2].keypoints == ()


def test_links_from_one(coco, tmp_path):
    right = PoseDataset.from_dict(coco).categories
    for c in coco["categories"]: c["skeleton"] = [[a+1, b+1] for a, b in c["skeleton"]]
    with pytest.warns(DataWarning, match="count from 1"):
        assert PoseDataset.from_dict(coco).categories == right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PoseDataset.load(write(tmp_path, coco), links_from=1).categories == right
    with pytest.raises(DataError, match="links_from=0 or 1"): PoseDataset.from_dict(coco, links_from=0)
    with pytest.raises(ConfigError, match="links_from"): PoseDataset.from_dict(coco, links_from=2)


# images

def test_kinds_of_images(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    deep = rgb[..., 0].astype(np.uint16)*257
    grey = np.repeat(rgb[..., :1], 3, -1)
    cases = {"rgb.png": (Image.fromarray(rgb), rgb), "grey.png": (Image.fromarray(rgb[..., 0]), grey),
             "rgba.png": (Image.fromarray(np.dstack([rgb, rgb[..., :1]])), rgb),
             "deep.png": (Image.fromarray(deep), grey), "deep.tif": (Image.fromarray(deep), grey),
             "la.png": (Image.fromarray(rgb[..., 0]).convert("LA"), grey),
             "bit.png": (Image.fromarray(rgb[..., 0] > 127), np.where(grey > 127, 255, 0)),
             "palette.png": (Image.fromarray(grey).convert("P"), None),
             "cmyk.jpg": (Image.fromarray(rgb).convert("CMYK"), None)}
    for name, (image, expected) in cases.items():
        image.save(tmp_path/name)
        out = read_image(tmp_path/name)
        assert out.shape == (6, 9, 3) and out.dtype == np.uint8, name
        if expected is not None: np.testing.assert_array_equal(out, expected, name)
        out[0] = 0  # a copy of its own


def test_exif_turns_the_image(coco, tmp_path):
    write(tmp_path, coco)
    tall = np.zeros((40, 30, 3), np.uint8)
    tall[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(tall).save(tmp_path/"images/a/0.png", exif=exif)
    image = PoseDataset.load(tmp_path).image(0)
    assert image.shape == (30, 40, 3) and image[:, -10:].min() == 255 and image[:, :-10].max() == 0


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_torn_image(suffix, share, tmp_path):
    from PIL import ImageFile
    path = tmp_path/f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole)*share)])
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # as other packages do
    with pytest.raises(DataError, match=rf"x\.{suffix}: expected a whole image"): read_image(path)


def test_no_image_and_too_large_an_image(tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match="no such image"): read_image(tmp_path/"x.png")
    (tmp_path/"x.png").write_text("hello")
    with pytest.raises(DataError, match="x.png: expected a whole image"): read_image(tmp_path/"x.png")
    Image.new("1", (20000, 20000)).save(tmp_path/"bomb.png")
    assert (tmp_path/"bomb.png").stat().st_size < 100_000
    with pytest.raises(DataError, match="bomb.png"): read_image(tmp_path/"bomb.png")
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    Image.new("RGB", (11, 10)).save(tmp_path/"x.png")
    with pytest.raises(DataError, match="11 x 10 pixels are more than 100"): read_image(tmp_path/"x.png")


def test_missing_images(coco, tmp_path):
    write(tmp_path, coco)
    for n in (2, 3): (tmp_path/f"images/b/{n}.png").unlink()
    data = PoseDataset.load(tmp_path)
    assert len(data) == 2 and list(data.categories) == [1, 2]
    assert data.missing == dict(images={2: 2}, categories=(2,))
    assert "images missing for 2 instances: rod (2) 2" in data.summary()
    assert "without an instance: rod (2)" in data.summary()
    assert len(PoseDataset.load(tmp_path, images=False)) == 4
    assert data.select("rod").missing == data.missing and data.select("fan").missing["images"] == {}
    assert PoseDataset.load(tmp_path, categories="fan").missing == dict(images={}, categories=())
    with pytest.raises(MissingFileError, match="2 of 4 instances"): PoseDataset.load(tmp_path, strict=True)
    with pytest.raises(MissingFileError, match="images=False"): PoseDataset.load(tmp_path, root=tmp_path/"no")


def test_files_are_not_asked_for_one_by_one(coco, tmp_path, monkeypatch):
    write(tmp_path, coco)
    listed = []
    monkeypatch.setattr(module.os, "listdir", lambda p, f=os.listdir: (listed.append(str(p)), f(p))[1])
    PoseDataset.load(tmp_path, root=tmp_path/"images")
    assert sorted(Path(p).name for p in listed) == ["a", "b"]


# layouts, splits, choices

@pytest.mark.parametrize("place", ["", "images"])
@pytest.mark.parametrize("source", ["", "annotations", "annotations/all.json"])
def test_image_folder_is_found(place, source, coco, tmp_path):
    write(tmp_path, coco)
    if not place:
        for child in (tmp_path/"images").iterdir(): child.rename(tmp_path/child.name)
        (tmp_path/"images").rmdir()
    data = PoseDataset.load(tmp_path/source)
    assert len(data) == 4 and data.root == tmp_path/place and data.image(0).shape == (30, 40, 3)


def test_files_of_a_split(coco, tmp_path):
    for name, keep in (("train", [1]), ("val", [2]), ("test", [2])):
        part = dict(coco, categories=[c for c in coco["categories"] if c["id"] in keep],
                    annotations=[a for a in coco["annotations"] if a["category_id"] in keep])
        write(tmp_path, part, f"mine_split2_{name}.json")
    assert list(PoseDataset.load(tmp_path, split=2, subset="train").categories) == [1]
    assert PoseDataset.load(tmp_path, 2, "test").name.endswith("-2-test")
    assert len(PoseDataset.load(tmp_path, split=2)) == 4 and len(PoseDataset.load(tmp_path)) == 4
    assert list(PoseDataset.load(tmp_path, subset="val").categories) == [2]
    for wrong in (dict(split=3), dict(split=3, subset="test"), dict(split=0)):
        with pytest.raises(MissingFileError, match="mine_split2_test.json"):
            PoseDataset.load(tmp_path, **wrong)
    with pytest.raises(ConfigError, match="subset"): PoseDataset.load(tmp_path, subset="trian")
    write(tmp_path, coco, "mine_split1_test.json")
    with pytest.raises(ConfigError, match="fits 2 files"): PoseDataset.load(tmp_path, subset="test")


def test_leaving_out_a_supercategory(coco, tmp_path):
    write(tmp_path, coco)
    assert list(PoseDataset.load(tmp_path, split="toy", subset="test").categories) == [2]
    assert list(PoseDataset.load(tmp_path, split="TOY", subset="train").categories) == [1]
    with pytest.raises(ConfigError, match="no val"): PoseDataset.load(tmp_path, split="toy", subset="val")
    with pytest.raises(ConfigError, match="there are: tool, toy"): PoseDataset.load(tmp_path, split="boat")
    write(tmp_path, dict(coco, annotations=coco["annotations"][:1]), "fewshot_train_toy.json")
    assert len(PoseDataset.load(tmp_path, split="toy", subset="train")) == 1


def test_select(coco):
    data = PoseDataset.from_dict(coco)
    assert [i.id for i in data.select(["rod", 1]).instances] == [1, 2, 3, 4]
    assert list(data.select(supercategories=["tool"]).categories) == [1]
    assert len(data.select([])) == 0
    for wrong in ("fann", 17, ["fan", "boat"]):
        with pytest.raises(ConfigError, match="no category"): data.select(wrong)
    with pytest.raises(ConfigError, match="such as fan"): data.select("fann")
    with pytest.raises(ConfigError, match="super-category"): data.select(supercategories="boats")


def test_posezoo_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPE_DATA", str(tmp_path))
    assert data_home() == tmp_path
    with pytest.raises(ConfigError, match="mini, default or full"): PoseDataset.load("posezoo", size="huge")
    with pytest.raises(MissingFileError, match="build=False"):
        PoseDataset.load("posezoo", size="mini", build=False)


# MP-100

def test_facts():
    facts = mp100_facts()
    assert list(facts["categories"]) == list(range(1, 101))
    assert len({c.name for c in facts["categories"].values()}) == 100
    for split in facts["splits"].values():
        assert {k: len(v) for k, v in split.items()} == dict(train=70, val=10, test=20)
        assert sorted(sum(split.values(), [])) == list(range(1, 101))
    assert sorted(c for s in facts["splits"].values() for c in s["test"]) == list(range(1, 101))
    for c in facts["categories"].values():
        assert len(c.keypoints) in (0, c.num_keypoints)
        assert all(0 <= k < c.num_keypoints for pair in c.links for k in pair)
    assert facts["cross"]["human face"]["test"] == [18, 40] and len(facts["cross"]["vehicle"]["train"]) == 97


def test_facts_are_for_mp100_alone(coco):
    skirt = dict(coco, categories=[dict(id=1, name="skirt"), dict(id=72, name="person")], annotations=[])
    assert PoseDataset.from_dict(skirt).categories[72].name == "human_body"
    assert PoseDataset.from_dict(skirt).categories[1] == mp100_facts()["categories"][1]
    for change in (dict(name="kilt"), dict(id=101), dict(keypoints=["a"]*7), dict(parts=["hem"]*8)):
        other = copy.deepcopy(skirt)
        other["categories"][0].update(change)
        assert PoseDataset.from_dict(other).categories[72].name == "person", change


@needs_mp100
def test_mp100_files():
    union = PoseDataset.load(MP100/"annotations"/"mp100_union_valtest.json.gz", images=False)
    raw = read_annotations(union.files[0])
    v = np.concatenate([np.array(a["keypoints"][2::3]) for a in raw["annotations"]])
    assert np.bincount(v.astype(int)).tolist() == [29664, 23310, 171405]
    facts = mp100_facts()
    for c in union.categories.values():
        known = facts["categories"][c.id]
        assert (c.links, c.keypoints, c.num_keypoints) == (known.links, known.keypoints, known.num_keypoints)
        assert all(union[i].file_name.startswith(c.folder + "/") for i in union.by_category[c.id])
    assert len({c.supercategory for c in union.categories.values()}) == 8
    with pytest.raises(ConfigError, match=r"'face' stands for the categories"): union.select("face")
    assert list(union.select(["human_face", "person", 18]).categories) == [18, 40, 72]
    again = PoseDataset.from_dict(union.to_dict())
    assert again.fingerprint == union.fingerprint and again.categories == union.categories


@needs_mp100
@pytest.mark.parametrize("split", [1, 2, 3, 4, 5])
def test_mp100_splits(split):
    facts = mp100_facts()["splits"][split]
    for subset, lost in (("val", {4: 6}), ("test", {5: 2})):
        data = PoseDataset.load(MP100, split=split, subset=subset, images=False)
        assert sorted(data.categories) == facts[subset]
        assert len(data) == 2000 - lost.get(split, 0)
    with pytest.raises(MissingFileError, match="no annotation file for split"):
        PoseDataset.load(MP100, split=split, subset="train", images=False)


@needs_mp100
def test_mp100_from_one_file_of_the_whole():
    whole = MP100/"annotations"/"mp100_union_valtest.json.gz"
    data = PoseDataset.load(whole, split=3, subset="test", images=False)
    assert sorted(data.categories) == mp100_facts()["splits"][3]["test"]
    assert len(PoseDataset.load(whole, split="vehicle", subset="test", images=False).categories) == 3
    with pytest.raises(MissingFileError, match="images=False"): PoseDataset.load(whole)


@needs_realset
def test_realset():
    data = PoseDataset.load(REALSET)
    assert len(data) == 1517 and len(data.categories) == 24 and not data.missing["images"]
    assert isinstance(data[0], Instance) and data.image(0).shape[:2] == (data[0].height, data[0].width)
