"`cape predict`: from one labelled photo to the poses of a folder, and what goes wrong on the way."
import json

import numpy as np
import pytest
from PIL import Image

from cape.cli import main


@pytest.fixture
def photos(tmp_path):
    "Three photos and a COCO file that labels the first"
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abc": Image.fromarray(rng.integers(0, 255, (80, 100, 3), np.uint8)).save(folder / f"{name}.png")
    coco = {"images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
            "categories": [{"id": 1, "name": "beetle", "keypoints": ["head", "tail", "side"], "skeleton": [[0, 1]]}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 80, 60], "num_keypoints": 3,
                             "keypoints": [20, 20, 2, 80, 60, 2, 50, 30, 2]}]}
    (folder / "labels.json").write_text(json.dumps(coco))
    return folder


def test_a_folder_of_photos(photos, tmp_path, capsys):
    words = ["predict", "--labels", str(photos / "labels.json"), str(photos), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr()
    written = json.loads((tmp_path / "out" / "poses.json").read_text())
    assert out.out.strip() == str(tmp_path / "out" / "poses.json") and len(written["images"]) == 3 and "3 photos" in out.err
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 3
    points = np.array([a["keypoints"] for a in written["annotations"]]).reshape(3, 3, 3)
    assert (points[..., 0] <= 99).all() and (points[..., 1] <= 79).all() and (points >= 0).all()
    assert main(words) == 0 and "(3 from before)" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (lambda p: (p / "labels.json").write_text("{"), "labels.json"), (lambda p: (p / "labels.json").unlink(), "labels.json"),
    (lambda p: [(p / f"{n}.png").unlink() for n in "abc"], "photos")])
def test_bad_input_is_one_line(photos, tmp_path, capsys, change, message):
    change(photos)
    assert main(["predict", "--labels", str(photos / "labels.json"), str(photos), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("cape predict: error: ") and message in said and "\n" not in said


def test_a_photo_that_is_none(photos, tmp_path, capsys):
    (photos / "d.png").write_bytes(b"no picture")
    assert main(["predict", "--labels", str(photos / "labels.json"), str(photos), "--out", str(tmp_path / "out"), "--no-pictures"]) == 1
    assert "1 failed" in capsys.readouterr().err and not (tmp_path / "out" / "pictures").exists()
