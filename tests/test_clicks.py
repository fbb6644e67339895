"The click tool's Python side: what a click sets, what a button asks for, files, and the picture without a kernel."
import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("anywidget")
from cape.errors import ConfigError, DataError, MissingFileError  # noqa: E402
from cape.estimator import PoseEstimator  # noqa: E402
from cape.models.base import create_model  # noqa: E402
from cape.view.clicks import ClickTool  # noqa: E402

PLACES = [[10., 10.25], [50., 12.], [30., 1 / 3]]


@pytest.fixture
def photos(tmp_path):
    for i in range(3): Image.fromarray(np.full((40, 60, 3), 60 + 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(3)]


@pytest.fixture
def tool(photos):
    "Three clicks on the first photo, one link"
    made = ClickTool(photos, PoseEstimator(create_model("copy"), size=64, progress=False), boxes=[[0, 0, 60, 40]] * 3)
    click(made, *PLACES)
    made.links = [[0, 2]]
    return made


def click(tool, *places):
    "What the page does when a person clicks"
    for x, y in places:
        tool.names = [*tool.names, f"point {len(tool.names)}"]
        tool.points = [*tool.points, [x, y]]


def ask(tool, what, file="poses.json"):
    "What the page does when a button is pressed"
    tool._handle_custom_msg({"do": what, "file": str(file)}, [])
    return tool.status


def test_clicks_become_a_label_and_predict_fills_the_rest(tool):
    assert tool.poses[0].keypoints.tolist() == PLACES and tool.poses[0].links == ((0, 2),) and tool.poses[1:] == [None, None]
    assert ask(tool, "predict").startswith("1 labelled, 2 predicted, mean confidence 1.00")
    assert tool.index == 1 and not tool.grow and tool.confidence == [1, 1, 1]
    np.testing.assert_allclose(tool.points, PLACES, atol=1e-3)
    assert [p.name for p in tool.poses] == ["0.png", "1.png", "2.png"]


def test_a_dragged_point_makes_a_second_label(tool):
    tool.predict()
    tool.points = [[20, 20], *tool.points[1:]]
    assert tool.confidence == [] and tool.poses[1].confidence is None
    tool.predict()
    assert len(tool.estimator.supports_) == 2 and tool.index == 2
    np.testing.assert_allclose(tool.points[0], np.mean([[20, 20], PLACES[0]], 0), atol=1e-3)


def test_predicting_again_encodes_the_new_label_only(photos):
    torch.manual_seed(0)
    seen = []
    model = create_model("prototype", train="episodes")
    encode = model.encode
    model.encode = lambda images, role="query": seen.append(len(images)) or encode(images, role)
    tool = ClickTool(photos, PoseEstimator(model, size=64, progress=False))
    click(tool, *PLACES)
    tool.predict()
    tool.points = [[20, 20], *tool.points[1:]]
    before = sum(seen)
    tool.predict()
    assert (before, sum(seen)) == (3, 5)                # two labels encoded; the searched photo is remembered


def test_turning_the_page_keeps_what_was_clicked(tool):
    tool.index = 2
    assert tool.points == [None] * 3 and tool.size == [60, 40]
    tool.points = [[1, 1], None, None]
    tool.index = 0
    assert tool.points == PLACES
    tool.index = 2
    assert tool.points == [[1, 1], None, None] and tool.poses[2].visible.tolist() == [True, False, False]


def test_a_new_keypoint_is_missing_on_older_labels(tool):
    tool.predict()
    click(tool, [5, 5])
    assert [len(p.keypoints) for p in tool.poses] == [4, 4, 4]
    tool.predict()
    assert tool.estimator.names_ == ("point 0", "point 1", "point 2", "point 3")
    assert tool.points[3] is not None


def test_undo_goes_back_step_by_step(tool):
    before = [p and p.keypoints.copy() for p in tool.poses]
    tool.predict()
    tool.points = [[20, 20], *tool.points[1:]]
    tool.undo()
    assert tool.index == 1 and tool.confidence == [1, 1, 1]
    np.testing.assert_allclose(tool.points, PLACES, atol=1e-3)
    tool.undo()                                          # the prediction
    assert tool.index == 0 and tool.poses[1] is None and tool.points == PLACES
    tool.undo()                                          # the link
    assert tool.links == [] and tool.poses[0].links == ()
    assert before[0].tolist() == tool.points
    for _ in range(9): tool.undo()
    assert tool.status == "nothing to take back" and tool.points == [] and tool.names == []


def test_saving_and_loading_is_exact(tool, photos, tmp_path):
    tool.names = ["head", "wing", "ß"]
    tool.predict()
    tool.points = [[20.123456789, 20], None, tool.points[2]]
    assert ask(tool, "save", tmp_path / "poses.json") == f"saved {tmp_path / 'poses.json'}"
    other = ClickTool(photos)
    assert ask(other, "load", tmp_path / "poses.json").startswith("3 poses from")
    assert (other.names, other.links) == (["head", "wing", "ß"], [[0, 2]])
    for a, b in zip(tool.poses, other.poses):
        assert a.keypoints.tobytes() == b.keypoints.tobytes() and a.names == b.names and a.links == b.links and a.box == b.box
        assert a.confidence is b.confidence is None or a.confidence.tobytes() == b.confidence.tobytes()
    ask(other, "save", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "poses.json").read_bytes()


def test_mistakes_become_the_status_line(tool, photos, tmp_path):
    assert "no such annotation file" in ask(tool, "load", tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text("{")
    assert "torn.json" in ask(tool, "load", tmp_path / "torn.json")
    assert tool.points == PLACES                         # what was there is untouched
    assert "cannot be written" in ask(tool, "save", "/proc/poses.json")
    tool.names = ["a", "a", "b"]
    assert "must differ" in ask(tool, "predict")
    bare = ClickTool(photos)
    assert "no estimator" in ask(bare, "predict") and "nothing to write" in ask(bare, "save")
    with pytest.raises(ConfigError): bare.predict()
    with pytest.raises(DataError, match="no labelled photo"): ClickTool(photos, PoseEstimator(create_model("copy"))).predict()


def test_a_file_of_other_photos_is_refused(tool, photos, tmp_path):
    tool.save(tmp_path / "poses.json")
    with pytest.raises(DataError, match="0.png is not one of the 2 photos"): ClickTool(photos[1:]).load(tmp_path / "poses.json")
    coco = json.loads((tmp_path / "poses.json").read_text())
    coco["images"][0]["width"] = 61
    (tmp_path / "poses.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match=r"\(61, 40\) there, \(60, 40\) here"): ClickTool(photos).load(tmp_path / "poses.json")


def test_bad_beginnings(photos, tmp_path):
    with pytest.raises(DataError, match="no photos"): ClickTool([])
    with pytest.raises(MissingFileError): ClickTool([tmp_path / "absent.png"])
    with pytest.raises(DataError, match="outside 0..1"): ClickTool(photos, names=["a", "b"], skeleton=[(0, 2)])
    with pytest.raises(DataError, match="3 photos but 1 boxes"): ClickTool(photos, boxes=[[1, 1, 9, 9]])


@pytest.mark.parametrize("kernel", [False, True])
def test_without_a_kernel_there_is_a_picture(tool, kernel, monkeypatch):
    monkeypatch.setattr("cape.view.clicks._has_kernel", lambda: kernel)
    tool.predict()
    bundle, _ = tool._repr_mimebundle_()
    assert ("application/vnd.jupyter.widget-view+json" in bundle) == kernel
    assert base64.b64decode(bundle["image/png"])[:4] == b"\x89PNG"
    assert "ClickTool(3 photos, 3 keypoints, 3 poses)" in bundle["text/plain"] or kernel
    assert tool.src.startswith("data:image/jpeg;base64,")
