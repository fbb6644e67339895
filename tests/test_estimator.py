"Photos of every kind in, points in the photo's own pixels out; bad input is named; a folder can be interrupted."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import cape
from cape.data.crops import to_image
from cape.errors import CheckpointError, ConfigError, DataError, MissingFileError, StorageError
from cape.estimator import PoseEstimator, default_model, find_photos, predict_folder
from cape.models.base import CapeModel, Prediction, create_model, save_model
from cape.photos import PhotoPoses, read_photo


class Brightest(CapeModel):
    "The brightest places: K of them, in the order of the support's; counts what it encodes"
    def encode(self, images, role="query"):
        self.seen = getattr(self, "seen", 0) + len(images)
        return {"map": images.sum(1)}
    def adapt(self, support, keypoints, visible, links=None):
        self.adapted = getattr(self, "adapted", 0) + 1
        return {"count": torch.zeros(len(keypoints), keypoints.shape[2])}
    def locate(self, prompt, query):
        maps = query["map"]
        value, cell = maps.flatten(2).topk(1)
        side, count = maps.shape[-1], prompt["count"].shape[1]
        place = torch.stack([cell % side, cell // side], -1) / side
        return Prediction(place.expand(-1, -1, count, -1), torch.ones(*maps.shape[:2], count))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("prototype", train="episodes").eval()


@pytest.fixture
def estimator(model): return PoseEstimator(model, size=64, progress=False)


def photo(width=60, height=40, spot=(45, 10)):
    "A dark photo with one bright spot"
    pixels = np.full((height, width, 3), 30, np.uint8)
    pixels[spot[1] - 2:spot[1] + 3, spot[0] - 2:spot[0] + 3] = 250
    return pixels


# what it finds

def test_the_answer_is_that_of_the_model_on_the_same_crops(posezoo_mini, model, estimator):
    test = cape.TestEpisodes(posezoo_mini, 2, 3, 1, size=64)
    episode, batch = test.episodes[0], test.batch([0])
    with torch.no_grad(): answer = model(batch)
    given, asked = ([posezoo_mini[i] for i in part] for part in (episode.support, episode.query))
    path = lambda m: posezoo_mini.root / m.file_name
    estimator.fit([path(m) for m in given], [m.keypoints for m in given], [m.visible for m in given], [m.box for m in given],
                  skeleton=posezoo_mini.categories[episode.category].links)
    poses = estimator.predict([path(m) for m in asked], [m.box for m in asked])
    expected = to_image(answer.keypoints[0].double(), batch.query_matrix[0], 64).numpy()
    for points, m in zip(expected, asked): points[:] = points.clip(0, [m.width - 1, m.height - 1])  # the nearest place on the photo
    shown = batch.support_visible[0].any(0).numpy()
    np.testing.assert_allclose(poses.keypoints[:, shown], expected[:, shown], atol=1e-3)
    np.testing.assert_allclose(poses.confidence[:, shown], answer.confidence[0].numpy()[:, shown], atol=1e-5)
    assert np.isnan(poses.keypoints[:, ~shown]).all() and (poses.confidence[:, ~shown] == 0).all()


def test_the_spot_is_found_in_the_photos_own_pixels():
    est = PoseEstimator(Brightest(), size=96, progress=False).fit(photo(), [[45, 10]])
    for width, height, spot in ((60, 40, (45, 10)), (40, 60, (10, 45)), (600, 400, (250, 300)), (31, 200, (20, 100))):
        scale = max(width, height) * 1.25 / 96
        found = est.predict(photo(width, height, spot) if width < 600 else np.array(
            Image.fromarray(photo(60, 40, (25, 30))).resize((600, 400))))[0]
        expected = spot if width < 600 else (254.5, 304.5)
        assert np.abs(found.keypoints[0] - expected).max() < 3 * max(scale, 1.5), (width, height, found.keypoints)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = Image.fromarray(photo())
    stored = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # what undoes the viewer's turn (Pillow's Transpose)
    for turn in stored.get(orientation, []): upright = upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_photo(tmp_path / "a.png"), photo())
    with Image.open(tmp_path / "a.png") as image: np.testing.assert_array_equal(read_photo(image), photo())
    est = PoseEstimator(Brightest(), size=96, progress=False).fit(tmp_path / "a.png", [[45, 10]])
    assert np.abs(est.predict(tmp_path / "a.png")[0].keypoints - [45, 10]).max() < 2.5


@pytest.mark.parametrize("kind", ["grey", "la", "rgba", "p", "1", "i16", "float", "uint16", "tensor", "grey tensor", "float tensor", "int64"])
def test_every_kind_of_photo(tmp_path, kind):
    pixels = photo()
    grey, tensor = pixels[..., 0], torch.from_numpy(photo()).permute(2, 0, 1)
    same = {"grey": grey, "float": pixels / 255, "uint16": pixels.astype(np.uint16) * 257, "tensor": tensor, "grey tensor": tensor[:1],
            "float tensor": tensor / 255, "int64": pixels.astype(np.int64)}
    if kind in same: given = same[kind]
    elif kind == "i16": given = Image.fromarray(grey.astype(np.uint16) * 257)
    elif kind == "p": given = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    else: given = Image.fromarray(pixels).convert(kind.upper(), dither=Image.Dither.NONE)
    np.testing.assert_array_equal(read_photo(given), (pixels > 99) * np.uint8(255) if kind == "1" else pixels)
    if isinstance(given, Image.Image):
        given.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_photo(tmp_path / "a.png"), read_photo(given))


def test_noise_of_a_large_photo_does_not_alias():
    from cape.photos import _crop, _searched
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    crop = _crop(*_searched(noise, None, 0), 64, shown=False).image[:, 24:40, 24:40].float()
    assert crop.std() < 8 < 70 < noise.std()


def test_a_point_beside_the_photo_moves_to_its_edge_and_may_be_a_label():
    class Corner(Brightest):
        def locate(self, prompt, query):
            found = super().locate(prompt, query)
            return Prediction(torch.zeros_like(found.keypoints), found.confidence)
    est = PoseEstimator(Corner(), size=64, progress=False).fit(photo(), [[45, 10]])
    pose = est.predict(photo())[0]
    assert pose.keypoints.tolist() == [[0, 0]]
    est.add_support(pose)


# several labels, corrections, what is encoded

def test_a_correction_encodes_one_crop():
    model = Brightest()
    photos = [photo(spot=(x, 20)) for x in (10, 20, 30, 40)]
    est = PoseEstimator(model, size=64, progress=False, batch_size=2).fit(photos[:1], [[[10, 20], [12, 20]]])
    poses = est.predict(photos[1:])
    assert (model.seen, model.adapted) == (4, 1)
    label = poses[2].corrected({"1": (42, 21), 0: None})
    again = est.add_support(label).predict(photos[1:])
    assert (model.seen, model.adapted) == (5, 2)
    assert label.confidence is None and np.isnan(label.keypoints[0]).all()
    assert [p.name for p in again] == [p.name for p in poses]
    est.add_support(poses[2].corrected({0: (1, 1)}))
    assert len(est.supports_) == 2 and est.supports_[1].keypoints[0].tolist() == [1, 1]


def test_a_changed_file_is_encoded_again(tmp_path):
    model, path = Brightest(), tmp_path / "a.png"
    Image.fromarray(photo()).save(path)
    est = PoseEstimator(model, size=64, progress=False).fit(photo(), [[45, 10]])
    first = est.predict(path).keypoints
    Image.fromarray(photo(spot=(10, 30))).save(path)
    os.utime(path, ns=(1, 1))
    assert np.abs(est.predict(path).keypoints - first).max() > 10
    changed = photo()
    one = est.predict(changed).keypoints
    changed[:] = photo(spot=(10, 30))                    # an array, changed in place
    assert np.abs(est.predict(changed).keypoints - one).max() > 10


def test_features_stay_within_memory():
    model = Brightest()
    est = PoseEstimator(model, size=64, progress=False, memory_mb=.04).fit(photo(), [[45, 10]])  # room for two maps
    photos = [photo(spot=(x, 20)) for x in range(5, 55, 5)]
    est.predict(photos)
    assert len(est.eyes_.kept.rows) == 2 and est.eyes_.kept.used <= 4e4
    seen = model.seen
    est.predict(photos[-1:])
    assert model.seen == seen


def test_predictions_are_streamed():
    model = Brightest()
    est = PoseEstimator(model, size=64, progress=False, batch_size=2).fit(photo(), [[45, 10]])
    stream = est.predict_iter([photo(spot=(x, 20)) for x in (10, 20, 30, 40)])
    next(stream)
    assert model.seen == 3                                # the label and one batch


def test_the_model_keeps_its_mode(model):
    model.train()
    try:
        PoseEstimator(model, size=64).fit(photo(), [[45, 10]]).predict(photo())
        assert model.training
    finally: model.eval()


@pytest.mark.slow
def test_thirty_large_photos_in_bounded_memory(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)).save(tmp_path / "0.jpg", quality=50)
    for i in range(1, 30): os.link(tmp_path / "0.jpg", tmp_path / f"{i}.jpg")
    code = f"""
import resource, sys
from pathlib import Path
from cape.estimator import PoseEstimator
from cape.models.base import create_model
photos = sorted(Path({str(tmp_path)!r}).glob("*.jpg"))
est = PoseEstimator(create_model("prototype", train="episodes"), size=64, progress=False).fit(photos[0], [[100, 100], [900, 900]])
est.predict(photos[1:3])
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
est.predict(photos)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, CAPE_PROGRESS="off"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100, f"{done.stdout} MB more for 30 photos than for 2; one decoded photo is 36 MB"


# scikit-learn's ways

def test_it_behaves_like_an_estimator(model):
    from sklearn.base import clone
    est = PoseEstimator(model, size=64, batch_size=3)
    assert est.get_params() == dict(model=model, size=64, batch_size=3, device=None, memory_mb=256, progress=True)
    assert est.set_params(batch_size=4) is est and est.batch_size == 4
    with pytest.raises(ConfigError, match="no parameter shots; it has model"): est.set_params(shots=2)
    with pytest.raises(ConfigError, match="call fit"): est.predict(photo())
    with pytest.raises(ConfigError, match="call fit"): est.add_support(photo(), [[1, 1]])
    assert est.fit(photo(), [[45, 10]]) is est and "fitted to 1 photos" in repr(est)
    copied = clone(est)
    assert copied.batch_size == 4 and not hasattr(copied, "rows_")


@pytest.mark.parametrize("name", ["copy", "protonet", "prototype", "capeformer"])
def test_methods_of_every_kind(name):
    options = {} if name == "copy" else {"backbone": "small"}
    est = PoseEstimator(create_model(name, **options), size=64, progress=False)
    poses = est.fit([photo(), photo()], [[[45, 10], [5, 5]]] * 2, skeleton=[(0, 1)]).predict([photo(), photo(50, 50)])
    assert poses.keypoints.shape == (2, 2, 2) and np.isfinite(poses.keypoints).all()
    assert (poses.confidence >= 0).all() and (poses.confidence <= 1).all()


def test_weights_by_path_and_by_default(tmp_path, model, monkeypatch):
    path = save_model(model, tmp_path / "weights/mine.safetensors", size=64)
    est = PoseEstimator(path).fit(photo(), [[45, 10]])
    assert est.eyes_.size == 64
    assert default_model([tmp_path, tmp_path / "weights"]).name == "prototype"
    monkeypatch.setattr("cape.estimator.__file__", str(tmp_path / "elsewhere/estimator.py"))
    monkeypatch.setenv("CAPE_DATA", str(tmp_path))
    assert PoseEstimator().fit(photo(), [[45, 10]]).eyes_.model.meta["size"] == 64
    save_model(create_model("copy"), tmp_path / "weights/default.safetensors")
    assert default_model([tmp_path / "weights"]).name == "copy"
    with pytest.raises(MissingFileError, match="make demo"): default_model([tmp_path])
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError): PoseEstimator(tmp_path / "torn.safetensors").fit(photo(), [[45, 10]])
    with pytest.raises(ConfigError, match="expected a CapeModel"): PoseEstimator(3).fit(photo(), [[45, 10]])


# bad input

nan, two = float("nan"), [[1, 2], [3, 4]]
BAD = {
    "no photo": (dict(images=[], keypoints=[]), "no labelled photo"),
    "zero points": (dict(keypoints=np.zeros((0, 2))), "at least 1"),
    "half a NaN": (dict(keypoints=[[1, nan], [3, 4]]), "keypoint 0 is at"),
    "infinite": (dict(keypoints=[[1, float("inf")], [3, 4]]), "keypoint 0 is at"),
    "all NaN": (dict(keypoints=[[nan, nan]] * 2), "no keypoint is visible"),
    "visible NaN": (dict(keypoints=[[nan, nan], [3, 4]], visible=[1, 1]), "keypoint 0 is at"),
    "words": (dict(keypoints=[["a", "b"]]), "no numbers"),
    "ragged": (dict(keypoints=[[1, 2], [3]]), "no numbers"),
    "three columns": (dict(keypoints=[[1, 2, 2]]), "got (1, 3)"),
    "outside": (dict(keypoints=[[1, 2], [60, 4]]), "keypoint 1 at (60, 4) lies outside the photo of 60 x 40"),
    "box of no size": (dict(boxes=[1, 1, 0, 9]), "positive sides"),
    "box outside": (dict(boxes=[100, 100, 9, 9]), "inside the photo of 60 x 40"),
    "NaN box": (dict(boxes=[1, 1, nan, 9]), "positive sides"),
    "link to nothing": (dict(skeleton=[(0, 2)]), "link (0, 2) names a keypoint outside 0..1"),
    "link from 1": (dict(skeleton=[(-1, 1)]), "outside 0..1"),
    "odd skeleton": (dict(skeleton=[0, 1, 1]), "expected pairs"),
    "too few names": (dict(names=["a"]), "1 names for 2 keypoints"),
    "one name twice": (dict(names=["a", "a"]), "must differ"),
    "another number": (dict(images=[photo(), photo()], keypoints=[two, two[:1]]), "photo-1 has 1 keypoints, the first labelled photo has 2"),
    "more labels": (dict(images=[photo()], keypoints=[two, two]), "1 photos but 2 sets"),
    "flags": (dict(visible=[1]), "2 keypoints but visible is (1,)"),
    "no image": (dict(images="absent.jpg"), "absent.jpg: no such image"),
    "array of another shape": (dict(images=np.zeros((9, 9, 5))), "shape (H,W)"),
    "empty array": (dict(images=np.zeros((0, 9, 3))), "shape (H,W)"),
    "float above 1": (dict(images=photo() * 1.), "must lie in 0..1"),
    "float NaN": (dict(images=np.full((9, 9), nan)), "must lie in 0..1"),
    "one pixel": (dict(images=np.zeros((1, 1)), keypoints=[[0, 0]]), "nothing can be cropped"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, said = BAD[case]
    with pytest.raises(DataError if case != "no image" else MissingFileError) as error:
        PoseEstimator(create_model("copy"), size=64).fit(**{**dict(images=photo(), keypoints=two), **change})
    assert said in str(error.value), str(error.value)


@pytest.mark.parametrize("points", [[[30, 20]], [[30, 20], [30, 20]], [[30, 20], [31, 22]], [[30, 20], [nan, nan]]])
def test_points_that_show_no_size_take_the_whole_photo(points):
    est = PoseEstimator(create_model("copy"), size=64, progress=False).fit(photo(), points)
    seen = np.isfinite(points).all(1)
    np.testing.assert_allclose(est.predict(photo()).keypoints[0][seen], np.array(points)[seen], atol=1e-3)


def test_bad_photos_are_named(tmp_path, estimator):
    estimator.fit(photo(), two)
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(DataError, match="notes.jpg: expected a whole image"): estimator.predict(tmp_path / "notes.jpg")
    with pytest.raises(DataError, match="predict_folder takes folders"): estimator.predict(tmp_path)
    with pytest.raises(DataError, match="photo-1: .*shape"): estimator.predict([photo(), np.zeros((3, 3, 9))])
    with pytest.raises(DataError, match="2 photos but 1 boxes"): estimator.predict([photo(), photo()], [[1, 1, 9, 9]])
    with pytest.raises(DataError, match="inside the photo"): estimator.predict(photo(), [90, 90, 9, 9])


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (10000, 9000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 1e5
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError, match="90000000|10000 x 9000"):
        PoseEstimator(create_model("copy")).fit(tmp_path / "bomb.png", two)
    with pytest.raises(DataError, match="10000 x 9000"): read_photo(Image.new("1", (10000, 9000)))


# files

def test_coco_round_trip_is_exact(tmp_path, estimator):
    paths = [tmp_path / f"{n}.png" for n in ("a", "b")]
    for p in paths: Image.fromarray(photo()).save(p)
    estimator.fit(paths[0], [[1 / 3, 2], [nan, nan], [20.1, 30.7]], names=["head", "ööö", "tail"], skeleton=[(0, 2), (1, 2)], boxes=[.1, .2, 44.4, 33.3])
    poses = PhotoPoses([*estimator.supports_, *estimator.predict(paths)], "beetle")
    back = PhotoPoses.from_coco(poses.save(tmp_path / "poses.json"))
    assert back.category == "beetle" and len(back) == 3
    for a, b in zip(poses, back):
        assert a.keypoints.tobytes() == b.keypoints.tobytes()
        assert (a.confidence is None) == (b.confidence is None)
        assert a.confidence is None or a.confidence.tobytes() == b.confidence.tobytes()
        assert (a.photo, a.name, a.size, a.names, a.links, a.box) == (b.photo, b.name, tuple(b.size), b.names, b.links, b.box)
    assert back.to_coco(tmp_path) == poses.to_coco(tmp_path) == json.loads((tmp_path / "poses.json").read_text())
    assert len(back.given) == 1
    assert [i["file_name"] for i in back.to_coco(tmp_path)["images"]] == ["a.png", "b.png"]


def test_the_file_is_a_data_set(tmp_path, estimator):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    estimator.fit(tmp_path / "a.png", [[5, 6], [40, 30]], skeleton=[(0, 1)]).supports_.save(tmp_path / "labels.json")
    data = cape.PoseDataset.load(tmp_path / "labels.json", strict=True)
    assert data[0].keypoints.tolist() == [[5, 6], [40, 30]] and data.categories[1].links == ((0, 1),)
    again = PoseEstimator(create_model("copy"), size=64).fit_poses(PhotoPoses.from_coco(tmp_path / "labels.json"))
    assert again.names_ == ("0", "1") and again.links_ == ((0, 1),)


def test_files_that_are_no_labels(tmp_path):
    with pytest.raises(MissingFileError): PhotoPoses.from_coco(tmp_path / "absent.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="a.json"): PhotoPoses.from_coco(tmp_path / "a.json")
    kinds = [dict(id=i, name=f"kind {i}") for i in (1, 2)]
    with pytest.raises(DataError, match="expected one category; the file has: kind 1"):
        PhotoPoses.from_coco(dict(images=[], annotations=[], categories=kinds))
    assert PhotoPoses.from_coco(dict(images=[], annotations=[], categories=kinds), category="kind 2").category == "kind 2"
    with pytest.raises(DataError, match="nothing to write"): PhotoPoses().save(tmp_path / "b.json")


def test_two_arrays_of_one_name_stay_apart(estimator):
    small, large = photo(), photo(80, 80)
    poses = PhotoPoses([*estimator.fit(small, two).supports_, *estimator.predict(large)])
    assert [p.name for p in poses] == ["photo-0"] * 2
    assert [(i["file_name"], i["width"]) for i in poses.to_coco()["images"]] == [("photo-0", 60), ("photo-0-2", 80)]


# folders

@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "photos"
    (place / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.JPG", "more/c.png")): Image.fromarray(photo(spot=(10 + 10 * i, 20))).save(place / name)
    (place / ".hidden.png").write_text("x")
    (place / "notes.txt").write_text("x")
    return place


def test_a_folder_is_done_once_and_goes_on(folder, capsys):
    model = Brightest()
    est = PoseEstimator(model, size=64, progress=False).fit(photo(), [[45, 10]])
    first = predict_folder(folder, est)
    assert str(first.file.parent) in capsys.readouterr().out and first.file == folder.parent / "photos-poses/poses.json"
    assert [p.name for p in first.poses] == ["a.png", "b.JPG", "c.png"] and not first.failed
    for name in ("a.png.jpg", "b.JPG.jpg", "more/c.png.jpg"): read_photo(first.file.parent / "pictures" / name)
    seen = model.seen
    assert predict_folder(folder, est).before == 3 and model.seen == seen
    (folder / "broken.png").write_text("x")
    Image.fromarray(photo(spot=(50, 30))).save(folder / "new.png")
    third = predict_folder(folder, est)
    assert (third.before, len(third.poses), [os.path.basename(f) for f in third.failed]) == (3, 4, ["broken.png"])
    back = PhotoPoses.from_coco(third.file)
    assert back.keypoints.tobytes() == third.poses.keypoints.tobytes()
    assert predict_folder(folder, est.add_support(photo(spot=(5, 5)), [[5, 5]])).before == 0     # other labels


def test_an_interrupted_folder_goes_on(folder):
    class Stops(Brightest):
        def locate(self, prompt, query):
            if self.seen == 3 and not getattr(self, "stopped", False):
                self.stopped = True
                raise KeyboardInterrupt
            return super().locate(prompt, query)
    model = Stops()
    est = PoseEstimator(model, size=64, progress=False, batch_size=1).fit(photo(), [[45, 10]])
    with pytest.raises(KeyboardInterrupt): predict_folder(folder, est, draw=False)
    log = folder.parent / "photos-poses/poses.jsonl"
    assert len(log.read_text().splitlines()) == 2
    log.write_text(log.read_text() + '[["b.JPG", 1')                                           # cut off in the middle
    done = predict_folder(folder, est, draw=False)
    assert done.before == 1 and len(done.poses) == 3 and not (folder.parent / "photos-poses/pictures").exists()
    fresh = PoseEstimator(Brightest(), size=64, progress=False).fit(photo(), [[45, 10]])
    assert done.poses.keypoints.tobytes() == fresh.predict([p.photo for p in done.poses]).keypoints.tobytes()


def test_boxes_of_a_folder(folder):
    est = PoseEstimator(Brightest(), size=64, progress=False).fit(photo(), [[45, 10]])
    done = predict_folder(folder, est, boxes={"more/c.png": [20, 10, 20, 20]}, draw=False)
    assert [p.box for p in done.poses] == [None, None, (20., 10., 20., 20.)]


def test_folders_that_cannot_be_used(tmp_path, folder, estimator):
    with pytest.raises(ConfigError, match="call fit"): predict_folder(folder, PoseEstimator())
    estimator.fit(photo(), two)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no photo in it"): predict_folder(tmp_path / "empty", estimator)
    with pytest.raises(MissingFileError, match="found nothing"): predict_folder(tmp_path / "absent", estimator)
    with pytest.raises(MissingFileError, match="found a file"): find_photos(folder / "a.png")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"): predict_folder(folder, estimator, tmp_path / "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_text("x")
    with pytest.raises(DataError, match="no photo could be read"): predict_folder(tmp_path / "bad", estimator)


def test_drawing_is_small(estimator):
    from cape.photos import small_photo
    pixels, scale = small_photo(np.zeros((3000, 4000), np.uint8), 400)
    assert pixels.shape == (300, 400, 3) and scale.tolist() == [.1, .1]
    est = estimator.fit(photo(), two, names=["a", "b"], skeleton=[(0, 1)])
    poses = est.predict([photo(), photo(500, 900)])
    assert len(poses.draw()._repr_png_()) > 3000 and len(poses[0].draw(names=True)._repr_png_()) > 3000


def test_a_keypoint_that_no_label_shows_is_not_guessed():
    est = PoseEstimator(Brightest(), size=64, progress=False).fit([photo(), photo()], [[[45, 10], [nan, nan]]] * 2)
    pose = est.predict(photo())[0]
    assert np.isnan(pose.keypoints[1]).all() and pose.confidence.tolist() == [1, 0]
    assert PhotoPoses([pose]).to_coco()["annotations"][0]["keypoints"][3:] == [0, 0, 0]


def test_a_trained_model_comes_with_the_package(posezoo_mini):
    data = posezoo_mini.select(list(posezoo_mini.categories)[:4])
    scores = [cape.evaluate(m, data, shots=1, episodes=5, queries=3, progress=False, size=96).pck[0.2]
              for m in (default_model(), create_model("copy"))]
    assert scores[0] > scores[1] + .1                                        # base or novel, it has learned something
    told = json.loads((Path(cape.__file__).parent / "weights/default.json").read_text())
    assert told["provenance"]["commit"] and told["novel"][0]["method"] == default_model().name
