"The health report: every fault is found, counted and named; it agrees with the loader; MP-100."
import copy
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_annotations import (
    DAMAGE, FAULTS, MP100, NO_FILES, REALSET, coco, needs_mp100, needs_realset, write)  # noqa: F401

from cape.data.annotations import PoseDataset
from cape.data.health import check, check_folder
from cape.errors import ConfigError, MissingFileError


def test_loading_leaves_the_report_alone():
    "Neither module needs the other to be imported first, and a data set is read without the report."
    late = ("import sys, cape.data.annotations; assert 'cape.data.health' not in sys.modules; "
            "import cape.data.health")
    for code in ("import cape.data.health", late):
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("content, says", NO_FILES)
def test_not_an_annotation_file(content, says, tmp_path):
    (tmp_path/"x.json").write_bytes(content)
    report = check_folder(tmp_path/"x.json")
    assert report["unreadable file"] == 1 and not report.ok and report.counts["files"] == 0


def test_no_such_file(tmp_path):
    with pytest.raises(MissingFileError, match="found none"): check_folder(tmp_path)


@pytest.mark.parametrize("change, kind, says", DAMAGE + FAULTS)
def test_damage_and_faults(change, kind, says, coco, tmp_path):
    coco["annotations"][1].update(change)
    report = check(write(tmp_path, coco))
    assert report[kind] == 1 and report.counts["usable"] == 3 and not report.ok
    assert "annotation 2" in next(f for f in report.findings if f.kind == kind).examples[0]


def test_image_without_size(coco, tmp_path):
    del coco["images"][0]["width"]
    assert check(write(tmp_path, coco, images=False), images=False)["no image size"] == 1


def test_one_id_for_two_things(coco, tmp_path):
    for key, field in (("images", "file_name"), ("categories", "name")):
        other = copy.deepcopy(coco)
        other[key].append(dict(other[key][0], **{field: "else"}))
        assert check(write(tmp_path/key, other, images=False), images=False)["id clash"] >= 1


def test_links(coco, tmp_path):
    for skeleton in ([[0, 1], [1, 7]], [[0, 1, 2]]):
        coco["categories"][0]["skeleton"] = skeleton
        assert check(write(tmp_path, coco))["link out of range"] == 1
    for c in coco["categories"]: c["skeleton"] = [[1, 2]]
    report = check(write(tmp_path, coco))
    assert report["links count from 1"] == 2 and report.ok


def test_names_that_do_not_fit(coco, tmp_path):
    coco["categories"][1]["keypoints"] = ["a", "b", "c"]
    assert check(write(tmp_path, coco))["names do not fit"] == 1


def test_exif(coco, tmp_path):
    write(tmp_path, coco)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path/"images/a/0.png", exif=exif)
    assert check(tmp_path)["image turned by EXIF"] == 1
    coco["images"][0].update(width=30, height=40)
    report = check(write(tmp_path, coco, images=False))
    assert report["image lies on its side"] == 1 and report["image size differs"] == 0


def test_missing_images(coco, tmp_path):
    write(tmp_path, coco)
    for n in (2, 3): (tmp_path/f"images/b/{n}.png").unlink()
    report = check(tmp_path)
    assert report["image missing"] == 2 and report.ok and report.counts["images read"] == 2
    assert check(tmp_path, root=tmp_path/"no")["no image found"] == 4


def test_findings(coco, tmp_path):
    rows = coco["annotations"]
    rows.append(dict(rows[0]))
    rows[2]["keypoints"][0] = 42.5
    rows[3]["keypoints"][0] = -1.5
    rows[3]["keypoints"][2] = 3
    rows[1]["keypoints"] = [1, 1, 0]*3
    rows.append(dict(rows[0], id=50, iscrowd=1))
    coco["images"].append(dict(coco["images"][0], id=77))
    coco["categories"] += [dict(id=5, name="rod", skeleton=[[0, 1], [1, 0]], keypoints=["a", "b"])]
    report = check(write(tmp_path, coco))
    found = {f.kind: f.count for f in report.findings}
    assert found == {"keypoint outside": 1, "odd visibility": 1, "duplicate annotation id": 1,
                     "duplicate annotation": 2, "category without annotations": 1,
                     "category name repeated": 1, "nothing labelled": 1, "crowd": 1,
                     "repeated link": 1, "image without annotations": 1}
    assert report.ok and report.to_json(tmp_path/"r.json") == (tmp_path/"r.json").read_text()
    assert json.loads(report.to_json())["counts"]["usable"] == 5
    assert "keypoint 0 at (42.5, 4.0) of 40 x 30" in str(report) and "<table>" in report._repr_html_()
    with pytest.raises(ConfigError, match="no finding"): report["hat"]


def test_image_findings(coco, tmp_path):
    write(tmp_path, coco)
    Image.new("RGB", (41, 30)).save(tmp_path/"images/a/0.png")
    (tmp_path/"images/a/1.png").write_bytes(b"no")
    report = check(tmp_path, workers=2)
    assert report["image size differs"] == 1 and report["unreadable image"] == 1 and not report.ok
    assert check(tmp_path, images=False).ok


def test_check_of_a_loaded_part_reads_its_files(coco, tmp_path):
    coco["annotations"][1]["iscrowd"] = 1
    data = PoseDataset.load(write(tmp_path, coco))
    assert data.check()["crowd"] == 1 and data.check()["category too small"] == 1
    part = data.select("rod").check()
    assert part["crowd"] == 0 and part.counts["categories"] == 1 and part.counts["images read"] == 2
    assert PoseDataset.from_dict(coco, tmp_path/"images").check().counts["annotations"] == 3


def test_html_is_escaped(coco, tmp_path):
    coco["categories"][0]["name"] = "<script>x</script>"
    coco["annotations"] = coco["annotations"][2:]
    assert "<script>" not in check(write(tmp_path, coco))._repr_html_()


@needs_mp100
def test_mp100():
    union = PoseDataset.load(MP100/"annotations"/"mp100_union_valtest.json.gz", images=False)
    report = union.check(images=False)
    assert report.counts == dict(files=1, categories=100, images=13412, annotations=14175, usable=14169)
    assert report["keypoint outside"] == 31 and report["box empty or outside the image"] == 6 and report.ok


@needs_realset
def test_realset():
    assert PoseDataset.load(REALSET).check(images=False).findings == ()
