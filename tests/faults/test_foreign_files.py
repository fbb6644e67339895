"""Annotation files and images from elsewhere: each one loads or is refused with an error of the library, soon, and within a
gigabyte. Five hundred malformed ones by default, ten thousand with `-m slow`; below them what was found this way."""
import base64
import gzip
import json
import os
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from cape.data.annotations import PoseDataset, read_annotations, read_image
from cape.data.crops import CropLoader
from cape.data.health import check_folder
from cape.errors import CapeError, DataError
from cape.evaluation import Report, evaluate
from cape.models.controls import Copy
from cape.photos import PhotoPoses, _searched, read_photo

from .harness import Peak, at_most, record
from .mutants import annotation_files, image_files, images, valid

SECONDS, GIGABYTE = 10, 1 << 30     # that one file may take


@pytest.fixture(autouse=True)
def no_sync(monkeypatch): monkeypatch.setattr(os, "fsync", lambda file: None)      # thousands of small files

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A data set whose annotation file, or one of whose images, is going to be replaced"
    folder = tmp_path_factory.mktemp("foreign")
    for image in valid()["images"]:
        path = folder / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images()["RGB.png"])
    (folder / "annotations").mkdir()
    (folder / "annotations" / "all.json").write_text(json.dumps(valid()))
    return folder


# ---- what is done with a file

def refusal(*steps):
    "The `CapeError` that stops these steps, if any; every other error, and every overflow, is a failure"
    with at_most(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", RuntimeWarning)
        try:
            for step in steps: step()
        except CapeError as error:
            assert str(error) and len(str(error)) <= 2000
            return error

def use(folder):
    "Everything that reads an annotation file, and what is made of it"
    file, held = folder / "annotations" / "all.json", {}
    def load(): held["data"] = PoseDataset.load(folder)
    def look():
        data = held["data"]
        data.summary(), repr(data), data.fingerprint, data.check(images=False).to_json()
        assert PoseDataset.from_dict(data.to_dict(), data.root).fingerprint == data.fingerprint
        for i in data: assert np.isfinite(i.keypoints).all() and i.clean_box is not None and i.box_side > 0
    def save(): assert PoseDataset.load(held["data"].save(folder / "copy.json"), images=False).fingerprint == held["data"].fingerprint
    def crop():
        data = held["data"]
        crops = CropLoader(data, 16).crops(range(min(2, len(data))))
        assert all(t.isfinite().all() for t in crops)
    refused = refusal(load)
    if not refused: assert not refusal(look) and not refusal(save), "what has loaded can be looked at and saved"
    if not refused and len(held["data"]): refusal(crop)
    refusal(lambda: check_folder(folder, images=False).to_json())
    refusal(lambda: [pose.visible for pose in PhotoPoses.from_coco(file, folder / "images")], lambda: PhotoPoses.from_coco(file).to_coco())
    return refused

def try_annotations(folder, count):
    tried = Counter()
    @settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    @given(annotation_files())
    def each(data):
        (folder / "annotations" / "all.json").write_bytes(data)
        tried["refused" if use(folder) else "loaded"] += 1
    try: each()
    finally: (folder / "annotations" / "all.json").write_text(json.dumps(valid()))
    return dict(tried=sum(tried.values()), **tried)

def try_images(folder, count):
    tried = Counter()
    @settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    @given(image_files())
    def each(file):
        tried["refused" if use_image(folder, *file) else "loaded"] += 1
    each()
    return dict(tried=sum(tried.values()), **tried)

def use_image(folder, suffix, data):
    "Everything that reads an image"
    path = folder / "images" / "a" / f"9{suffix}"
    coco = valid()
    coco["images"][0]["file_name"] = f"a/9{suffix}"
    path.write_bytes(data)
    pixels = []
    refused = refusal(lambda: pixels.append(read_image(path)))
    assert refused or (pixels[0].dtype == np.uint8 and pixels[0].ndim == 3 and pixels[0].shape[2] == 3)
    assert bool(refusal(lambda: read_photo(path))) == bool(refused) == bool(refusal(lambda: _searched(path, None, 0)))
    dataset = PoseDataset.from_dict(coco, folder / "images")
    assert bool(refusal(lambda: CropLoader(dataset, 16).crops([0]))) == bool(refused)
    report = None
    def check():
        nonlocal report
        report = dataset.check(workers=1)
    assert not refusal(check), "check reports what it finds, and raises nothing"
    assert not refused or report["unreadable image"] == 1
    path.unlink()
    return refused


# ---- a few, and many

def test_five_hundred_malformed_files(folder):
    peak = Peak()
    annotations, pictures = try_annotations(folder, 250), try_images(folder, 250)
    print(annotations, pictures, f"{peak.grown() / 1e6:.0f} MB")
    for counts in (annotations, pictures): assert counts["tried"] >= 250 and counts["refused"] > 50 and counts["loaded"] > 10
    assert peak.grown() < GIGABYTE

@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_malformed_files(folder):
    peak = Peak()
    annotations, pictures = try_annotations(folder, 5500), try_images(folder, 4500)
    assert annotations["tried"] + pictures["tried"] >= 10_000 and peak.grown() < GIGABYTE
    record("malformed", annotations=annotations, images=pictures, total=annotations["tried"] + pictures["tried"], other_errors=0,
           peak_megabytes=round(peak.grown() / 1e6))

def test_the_valid_ones_load(folder):
    assert use(folder) is None
    for name, data in images().items(): assert use_image(folder, name[name.rindex("."):], data) is None, name


# ---- what was found this way, or by looking for it

def changed(change):
    coco = valid()
    change(coco)
    return coco

def loaded(folder, coco, **options):
    (folder / "annotations" / "found.json").write_text(json.dumps(coco))
    try: return PoseDataset.load(folder / "annotations" / "found.json", **options)
    finally: (folder / "annotations" / "found.json").unlink()

REFUSED = {
    "names that are a number": (lambda c: c["categories"][0].update(keypoints=4), r"entry 0 of 'categories' needs .*keypoints"),
    "names that are a word": (lambda c: c["categories"][1].update(keypoints="ab"), r"entry 1 of 'categories' needs .*keypoints"),
    "parts that are true": (lambda c: c["categories"][0].update(parts=True), r"entry 0 of 'categories' needs .*parts"),
    "an endless image": (lambda c: c["images"][0].update(width=float("inf")), r"annotation 10 lies on image 1 .* of size \(inf, 24\)"),
    "a box of 400 digits": (lambda c: c["annotations"][0]["bbox"].__setitem__(2, 10**400), "annotation 10 has the box"),
    "a keypoint of 400 digits": (lambda c: c["annotations"][0]["keypoints"].__setitem__(0, 10**400), "keypoints that are not a flat list of numbers"),
    "a width of 400 digits": (lambda c: c["images"][0].update(width=10**400), "annotation 10 lies on image 1"),
}

@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder, name):
    change, says = REFUSED[name]
    with pytest.raises(DataError, match=says): loaded(folder, changed(change))

LEFT_OUT = {
    "a point beyond 32 bits": (lambda c: c["annotations"][0]["keypoints"].__setitem__(0, 1e39), "keypoint not a number"),
    "a box without an end": (lambda c: c["annotations"][0].update(bbox=[0, 0, 1e200, 1e200]), "box not a number"),
    "an image that is never read": (lambda c: c["images"][0].update(width=10**6, height=10**6), "image too large"),
}

@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.filterwarnings("ignore::cape.data.annotations.DataWarning")
def test_left_out(folder, name):
    change, kind = LEFT_OUT[name]
    data = loaded(folder, changed(change))
    assert len(data) == 4 and data.dropped[kind] == 1
    (folder / "annotations" / "all.json").write_text(json.dumps(changed(change)))
    try: assert check_folder(folder, images=False)[kind] == 1
    finally: (folder / "annotations" / "all.json").write_text(json.dumps(valid()))

@pytest.mark.parametrize("name", ["a/" + "x" * 300, "x" * 300 + "/1.png", "a\0b/1.png", "\ud800/1.png", "a/\udcff.png", "", ".", "a/1.png/1.png"])
def test_a_name_that_is_no_file_is_missing(folder, name):
    coco = changed(lambda c: c["images"][0].update(file_name=name))
    data = loaded(folder, coco, root=folder / "images")
    assert [i.id for i in data] == [11, 12, 13, 14] and data.missing["images"] == {7: 1}
    alone = loaded(folder, coco, images=False, root=folder / "images")
    with pytest.raises(CapeError): alone.image(0)
    assert PoseDataset.load(alone.save(folder / "copy.json"), images=False).fingerprint == alone.fingerprint

def test_half_a_surrogate_pair_is_saved_as_json_has_it(folder):
    data = loaded(folder, changed(lambda c: c["categories"][0].update(name="kite \ud800 é")))
    path = data.save(folder / "copy.json")
    assert "é".encode() in path.read_bytes() and json.loads(path.read_text(encoding="utf-8"))["categories"][0]["name"] == "kite \ud800 é"

def test_a_box_far_larger_than_its_picture_takes_little_memory(folder):
    "The file says 9000 x 9000, the picture has 24 x 24: the square around the box would be 380 MB"
    coco = changed(lambda c: (c["images"][0].update(width=80_000_000, height=1), c["annotations"][0].update(bbox=[0, 0, 8e7, 1.])))
    wide = loaded(folder, changed(lambda c: (c["images"][0].update(width=40_000_000, height=2), c["annotations"][0].update(bbox=[0, 0, 4e7, 2]))))
    square = loaded(folder, changed(lambda c: (c["images"][0].update(width=9000, height=9000), c["annotations"][0].update(bbox=[0, 0, 9000, 9000]))))
    peak = Peak()
    for data in (wide, square): assert CropLoader(data, 16).crops([0]).images.isfinite().all()
    assert len(loaded(folder, coco)) == 4 and peak.grown() < 300e6, peak.grown()        # a box of height 1 is no box

def test_a_wide_box_shows_what_it_showed():
    "Reducing first changes no pixel of a smooth picture by more than a level or two"
    import cape.data.crops as crops
    y, x = np.mgrid[:900, :1200]
    image = np.stack([x / 6, y / 6, (x + y) / 12], -1).astype(np.uint8)
    whole, matrix = crops.cut_patch(image, (0, 0, 1199, 899), 64, 64)
    before, crops.WIDEST = crops.WIDEST, 500
    try: reduced, same = crops.cut_patch(image, (0, 0, 1199, 899), 64, 64)
    finally: crops.WIDEST = before
    assert np.abs(whole.astype(int) - reduced)[9:-9, 1:-1].max() <= 2 and (matrix == same).all()

def test_a_gzip_bomb_of_spaces_is_not_unpacked(tmp_path):
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b" " * (100 << 20), 1))
    peak = Peak()
    with pytest.raises(DataError, match="x.json.gz.*bytes that unpack to more than"): read_annotations(tmp_path / "x.json.gz")
    assert peak.grown() < 150e6

@pytest.mark.parametrize("name", ["all.json", "1.png"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    read = read_annotations if name == "all.json" else read_image
    with at_most(5), pytest.raises(DataError, match=f"{name}.*a pipe"): read(tmp_path / name)
    with at_most(5), pytest.raises(DataError, match="/dev/zero.*a device"): read("/dev/zero")

@pytest.mark.parametrize("mode,kind", [("1", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("I;16", "PNG"), ("L", "JPEG")])
@pytest.mark.slow
def test_the_largest_image_that_is_read_takes_a_gigabyte(tmp_path, mode, kind):
    "89 million pixels, hardly a file; its size in memory is what it is, and copies are few"
    path = tmp_path / f"x.{kind.lower()}"
    Image.new(mode, (9459, 9459)).save(path)
    assert path.stat().st_size < 2e6
    peak = Peak()
    assert read_image(path).shape == (9459, 9459, 3)
    print(mode, f"{peak.grown() / 1e6:.0f} MB")
    assert peak.grown() < 1.3e9

@pytest.mark.parametrize("side,says", [(9460, "pixels"), (20000, "pixels"), (60000, "pixels")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_only_announces_many_pixels(tmp_path, side, says):
    "A PNG head of any size is 100 bytes; nothing is allocated for it"
    data = bytearray(images()["L.png"])
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(data)
    peak = Peak()
    for read in (read_image, read_photo):
        with pytest.raises(DataError, match=f"x.png.*{says}"): read(tmp_path / "x.png")
    assert peak.grown() < 50e6

@pytest.mark.parametrize("value", ["x", [1], [1, 2], [.5, "x", .5, .5], [.5] * 5, [2.] * 4, [None] * 4, {"a": 1}, 10**400])
def test_confidence_that_is_none(value):
    coco = changed(lambda c: c["annotations"][0].update(confidence=value))
    with pytest.raises(DataError, match="annotation 10: expected confidence in 0..1 for 4 keypoints"): PhotoPoses.from_coco(coco, category=7)

def test_damaged_reports_are_refused(folder, tmp_path):
    report = evaluate(Copy(), PoseDataset.load(folder), episodes=2, queries=1, size=16, progress=False).to_json(tmp_path / "x.json")
    whole = json.loads(report.read_text())
    bomb = dict(dtype="<i4", shape=[4], zip=base64.b64encode(zlib.compress(bytes(1 << 27), 1)).decode())
    def harmed(**arrays): return whole | dict(arrays=whole["arrays"] | arrays)
    peak = Peak()
    for content in (None, [], {}, 3, whole | dict(arrays=[]), whole | dict(arrays=None), whole | dict(edges=None), whole | dict(categories=3),
                    harmed(bins=3), harmed(bins=bomb), harmed(query=bomb), harmed(query=bomb | dict(shape=[1 << 40])), harmed(query=bomb | dict(shape=[-4])),
                    harmed(query=bomb | dict(dtype="O")), harmed(query=bomb | dict(dtype="x")), harmed(errors=bomb | dict(zip="@")), harmed(errors=bomb | dict(shape=["a"]))):
        report.write_text(json.dumps(content))
        with pytest.raises(DataError, match="x.json: not a report"): Report.from_json(report)
    assert peak.grown() < 100e6
    report.write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match="x.json: not a json file"): Report.from_json(report)

@pytest.mark.parametrize("cut", [0, 1, 30, -1, -30])
def test_a_damaged_part_of_an_evaluation_is_named(folder, tmp_path, cut):
    data, options = PoseDataset.load(folder), dict(episodes=2, queries=1, size=16, progress=False, resume=tmp_path)
    evaluate(Copy(), data, **options)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"{path.name} cannot be read .*delete it"): evaluate(Copy(), data, **options)
    path.unlink()
    assert evaluate(Copy(), data, **options).pairs == 4
