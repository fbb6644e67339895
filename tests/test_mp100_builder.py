"MP-100 from its thirteen sources: found, proved, placed, reported; archives that could do harm are refused."
import builtins
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cape.data import archives, miniature, mp100, mp100_proofs
from cape.data.annotations import PoseDataset, mp100_facts
from cape.data.archives import Place, list_archive, read_places, walk
from cape.data.miniature import make_miniature
from cape.data.mp100 import SOURCES, annotation_files, build, needed, source_of
from cape.errors import CapeError, ConfigError, DataError, MissingFileError, StorageError

ROOT = Path(__file__).resolve().parents[1]
try: import h5py
except ImportError: h5py = None
needs_h5py = pytest.mark.skipif(h5py is None, reason="h5py is not installed")
FRAMES = 2 if h5py else 0  # categories in HDF5


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    "The sources in miniature, three of them packed"
    return make_miniature(tmp_path_factory.mktemp("mini"), per=3, frames=h5py is not None)


@pytest.fixture
def home(original, tmp_path):
    "A copy of it to spoil"
    return shutil.copytree(original, tmp_path / "home")


def run(home, *parts, **options):
    "Build from some or all of the sources, on one thread"
    sources = [home / "sources" / p for p in parts] or [home / "sources"]
    return build(sources, home / "annotations", home / "mp100", workers=1, **options)


def kinds(report): return Counter(kind for kind, _ in report.problems.values())


def true_picture(name):
    "What the miniature drew under a name of MP-100"
    m = miniature
    for c in mp100_facts()["categories"].values():
        for n in range(3):
            if m._name(c, n) == name: return m._draw(c, m._size(c, n), n)
    raise KeyError(name)


# the whole

def test_every_picture_is_the_right_one(home):
    report = run(home)
    assert report.there == 294 + 3 * FRAMES and report.placed == report.there
    assert set(n.split("/")[0] for n in report.problems) == (set() if h5py else {"fly_body", "locust_body"})
    for name in needed(annotation_files(home / "annotations")):
        if name in report.problems: continue
        true, got = true_picture(name), home / "mp100/images" / name
        if source_of(name) not in ("fly", "locust"): assert got.read_bytes() == miniature._jpeg(true), name
        else:
            grey = np.asarray(true.convert("L"), float)
            apart = [np.abs(np.asarray(Image.open(got), float) - g).mean() for g in (grey, grey[::-1], grey[:, ::-1])]
            assert apart[0] < 8 < min(apart[1:]), (name, apart)


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_alone(home, source):
    if source in ("fly", "locust") and h5py is None: pytest.skip("needs h5py")
    report = run(home, source)
    folders = {c["folder"] for c in report.categories.values() if c["source"] == source}
    assert {report.categories[i]["folder"] for i in report.covers()} == folders
    assert report.there == 3 * len(folders), report
    here = {p.relative_to(home / "mp100/images").parts[0] for p in (home / "mp100/images").rglob("*.jpg")}
    assert here == folders  # and nothing of another category


@pytest.mark.parametrize("packed", ["zip", "tgz", "tar"])
def test_sources_may_be_packed(home, packed):
    for source in (home / "sources").iterdir():
        files = [p for p in source.rglob("*") if p.is_file()]
        if any(archives.is_archive(p) for p in files): continue
        if packed == "zip":
            with zipfile.ZipFile(home / f"{source.name}.zip", "w") as z:
                for p in files: z.write(p, p.relative_to(source))
        else:
            with tarfile.open(home / f"{source.name}.{packed}", "w:gz" if packed == "tgz" else "w") as t:
                t.add(source, source.name)
        shutil.rmtree(source)
        shutil.move(home / f"{source.name}.{packed}", home / "sources")
    report = run(home)
    assert report.there == 294 + 3 * FRAMES, report
    assert not list(home.joinpath("sources").rglob("0000*.json"))  # nothing was unpacked there


def test_folder_names_do_not_matter(tmp_path):
    "As long as there are a few files to judge a folder by"
    home = make_miniature(tmp_path, per=6, frames=False)
    for place in ("deepfashion2/DeepFashion2/train/image", "carfusion/CarFusion/train/car_penn1/images_jpg",
                  "keypoint5/keypoint-5/bed/images", "keypoint5/keypoint-5/bed", "ap10k/ap-10k/data", "ap10k/ap-10k",
                  "macaquepose/macaquepose_v1", "carfusion/CarFusion/train/car_penn1/gt", "onehand10k/OneHand10K/Train/source"):
        old = home / "sources" / place
        old.rename(old.with_name("x" + str(len(place))))
    shutil.move(home / "sources/300w", home / "sources/ap10k/deep")
    report = run(home)
    assert report.there == 588, report


def test_one_miniature_from_sources_to_a_score(home):
    "Built, checked, trained on and evaluated"
    from cape.evaluation import evaluate
    from cape.learner import Learner, train_config
    from cape.models.base import create_model
    from cape.data.health import check
    run(home)
    load = lambda subset: PoseDataset.load(home / "mp100", split=1, subset=subset)
    data = load("train")
    assert len(data.by_category) == 70 and len(data) + sum(data.missing["images"].values()) == 210
    health = data.check()
    assert health.ok and {f.kind for f in health.findings} <= {
        "image missing", "category name repeated", "repeated link", "category without annotations"}
    assert check(home / "mp100").ok
    model = create_model("protonet", backbone="small")
    config = train_config("tiny", "protonet", steps=3, batch=2, val_every=3, val_episodes=1, val_queries=1, workers=0)
    Learner(model, data, load("val"), config, home / "run").fit()
    report = evaluate(model, load("test"), shots=1, episodes=1, queries=1, size=64)
    assert 0 <= report.pck[.2] <= 1 and len(report.per_category) >= 18


# traps

def test_fashion_without_the_training_part(home):
    shutil.rmtree(home / "sources/deepfashion2/DeepFashion2/train")
    report = run(home, "deepfashion2")
    assert report.there == 0 and kinds(report)["other content"] == 39, report


def test_fashion_without_labels_goes_by_path(home):
    for folder in (home / "sources/deepfashion2").rglob("annos"): shutil.rmtree(folder)
    assert run(home, "deepfashion2").there == 39


def test_fashion_without_labels_and_names_is_ambiguous(home):
    root = home / "sources/deepfashion2/DeepFashion2"
    for folder in root.rglob("annos"): shutil.rmtree(folder)
    (root / "train").rename(root / "a")
    (root / "validation").rename(root / "b")
    report = run(home, "deepfashion2")
    assert report.there == 0 and kinds(report)["ambiguous"] == 39, report


def test_two_copies_of_one_picture_are_no_trouble(home):
    shutil.copytree(home / "sources/ap10k", home / "sources/again")
    assert run(home, "ap10k", "again").there == 102


def test_cars_without_labels_are_not_believed(home):
    for folder in (home / "sources/carfusion").rglob("gt"): shutil.rmtree(folder)
    shutil.rmtree(next((home / "sources/carfusion").rglob("car_butler1")))  # one picture of each name is left
    report = run(home, "carfusion")
    assert report.there == 0 and kinds(report)["unproved"] == 9
    assert "expected 96 x 54, found 96 x 54" in report.problems["bus/1500800380.jpg"][1]


def test_renamed_cars_are_not_believed(home):
    "The published renaming numbers sequences by the order of a disk's listing"
    wrong = home / "renamed/bus"
    wrong.mkdir(parents=True)
    Image.new("RGB", (96, 54)).save(wrong / "1500800380.jpg")
    report = build([home / "renamed"], home / "annotations", home / "mp100", workers=1)
    assert report.there == 0 and report.problems["bus/1500800380.jpg"][0] == "unproved"


def test_car_frames_with_leading_zeros(home):
    for path in [*(home / "sources/carfusion").rglob("8_*")]:
        path.rename(path.with_name(f"08_{int(path.stem[2:]):05d}{path.suffix}"))
    assert run(home, "carfusion").there == 9


def test_animals_are_not_taken_from_coco(home):
    report = run(home, "coco")
    assert report.covers() == [72] and kinds(report)["stray"] == 12


def test_few_files_under_numbers_prove_nothing(home):
    "Three beds in a folder of any name could be any furniture"
    root = home / "sources/keypoint5/keypoint-5"
    (root / "bed").rename(root / "x")
    report = run(home, "keypoint5")
    assert report.there == 12 and {k for n, (k, _) in report.problems.items() if n.startswith("bed/")} == {"stray"}


def test_later_gaps_are_judged_by_what_is_there(home):
    "Only pictures are missing that COCO has a namesake of in their size: AP-10K's others tell that it is no home"
    strays = [n for n, (kind, _) in run(home, "coco").problems.items() if kind == "stray"]
    run(home, "ap10k")
    for name in strays: (home / "mp100/images" / name).unlink()
    report = run(home, "coco")
    assert len(strays) == 12 and {report.problems[name][0] for name in strays} == {"stray"}


def test_tiger_folder_is_the_face(home):
    run(home, "aflw")
    data = PoseDataset.load(home / "mp100", split=1).select("human_face_aflw")
    assert data[0].file_name.startswith("amur_tiger_body/flickr/") and data.categories[18].num_keypoints == 19
    assert source_of("amur_tiger_body/flickr/0/image00012.jpg") == "aflw"


def test_a_mask_is_not_its_picture(home):
    picture = next((home / "sources/onehand10k").rglob("source/1.jpg"))
    for mask in (home / "sources/onehand10k").rglob("mask/*.png"):
        shutil.copy(picture.with_name(mask.stem + ".jpg"), mask)
    picture.unlink()
    report = run(home, "onehand10k")
    assert report.there == 2 and "human_hand/Train/source/1.jpg" in report.problems


# mismatches

def test_other_size_and_torn_are_named(home):
    sofas = sorted((home / "sources/keypoint5").rglob("sofa/images/*.jpg"))
    Image.open(sofas[0]).resize((30, 20)).save(sofas[0])
    sofas[1].write_bytes(sofas[1].read_bytes()[:-200])
    sofas[2].write_bytes(b"")
    report = run(home, "keypoint5")
    kind, text = report.problems["sofa/00000000.jpg"]
    assert kind == "another size" and "expected 50 x 57, found 30 x 20 in" in text and "sofa/images/00000000.jpg" in text
    assert [report.problems[f"sofa/0000000{n}.jpg"][0] for n in (1, 2)] == ["torn", "torn"]
    assert report.there == 12 and report.categories[49]["mismatched"] == 3
    assert "sofa 0/3" in str(report) and "<table>" in report._repr_html_()
    assert not (home / "mp100/images/sofa").exists()


def test_turned_by_exif(home):
    "A camera that lay on its side: the annotation's size is that after turning"
    path = next((home / "sources/animalweb").rglob("alpaca_0.jpg"))
    image = Image.open(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert "alpaca_face/alpaca_0.jpg" not in run(home, "animalweb").problems


def test_report_counts_and_json(home):
    report = run(home, "cub", "coco")
    saved = json.loads((home / "mp100/report.json").read_text())
    assert saved == json.loads(report.to_json())
    assert saved["there"] == 27 and len(saved["problems"]) == 273 and not saved["complete"]
    part = saved["parts"]["mp100_split1_test"]
    facts = mp100_facts()["splits"][1]["test"]
    there = {72, *(i for i in facts if mp100_facts()["categories"][i].num_keypoints == 15)}
    assert set(part["whole"]) == set(report.covers("mp100_split1_test")) == there & set(facts)
    assert part["needed"] == 60 and part["categories"] == 20
    with pytest.raises(ConfigError, match="no annotation file 'x'; there are: mp100_split1_test"): report.covers("x")


# how, resume, kill

@pytest.mark.parametrize("how", ["link", "hardlink", "copy"])
def test_how(home, how):
    run(home, "ap10k", how=how)
    target = home / "mp100/images/dog_body/000000000301.jpg"
    source = next((home / "sources/ap10k").rglob("000000000301.jpg"))
    assert target.is_symlink() == (how == "link")
    assert os.path.samefile(target, source) == (how != "copy")
    assert target.read_bytes() == source.read_bytes()
    assert run(home, "ap10k", how=how).placed == 0


def test_no_links_there(home, monkeypatch):
    def refuse(*_): raise OSError(95, "Operation not supported")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(StorageError, match="cannot link .*--copy"): run(home, "ap10k")


def test_going_on(home):
    first = run(home, "ap10k")
    second = run(home)
    assert (first.there, second.there) == (102, 294 + 3 * FRAMES) and second.placed == second.there - 102
    assert run(home).placed == 0
    seen = []
    original = mp100._look_all
    try:
        mp100._look_all = lambda places, workers: (seen.extend(places), original(places, workers))[1]
        build([], out=home / "mp100", workers=1)
    finally: mp100._look_all = original
    assert not seen  # all believed by the journal


def test_what_changed_is_looked_at_again(home):
    run(home, "ap10k", how="copy")
    target = home / "mp100/images/dog_body/000000000301.jpg"
    target.write_bytes(target.read_bytes()[:300])
    assert build([], out=home / "mp100", workers=1).problems["dog_body/000000000301.jpg"][0] == "torn"
    assert run(home, "ap10k").placed == 1 and "dog_body/000000000301.jpg" not in run(home, "ap10k").problems


def test_torn_journal(home):
    run(home, "ap10k")
    journal = home / "mp100/built.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    report = run(home, "ap10k")
    assert report.there == 102 and report.placed == 0
    assert run(home, "ap10k").placed == 0


def test_set_made_by_hand_is_verified(home):
    target = home / "mp100/images/macaque_body"
    target.mkdir(parents=True)
    for path in (home / "sources/macaquepose").rglob("*.jpg"): shutil.copy(path, target)
    assert build([], home / "annotations", home / "mp100", workers=1).there == 3


KILL = """
import os, shutil, sys, time
from pathlib import Path
from cape.data import mp100
replace = os.replace
def pause():
    print("now", flush=True)
    time.sleep(.01)
def slow_replace(old, new):
    pause()
    replace(old, new)
def slow_copy(old, new):
    data = Path(old).read_bytes()
    with open(new, "wb") as file:
        file.write(data[:len(data)//2])
        file.flush()
        pause()
        file.write(data[len(data)//2:])
os.replace, shutil.copyfile = slow_replace, slow_copy
home = Path(sys.argv[1])
mp100.build([home/"sources"], home/"annotations", home/"mp100", how=sys.argv[2], workers=1)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["link", "copy"])
def test_killed_and_gone_on(home, how):
    "kill -9 in the middle of writing; afterwards nothing is torn, what is there is usable, and the next run goes on"
    env = dict(os.environ, PYTHONPATH=str(ROOT), CAPE_PROGRESS="off")
    before = 0
    for after in (6, 61, 90):
        process = subprocess.Popen([sys.executable, "-c", KILL, str(home), how], stdout=subprocess.PIPE, env=env)
        for _ in range(after): assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        whole = [p for p in (home / "mp100/images").rglob("*") if p.is_file() and not p.name.startswith(".")]
        for p in whole: Image.open(p).load()
        assert len(whole) >= max(before, after//2 - 5)
        before = len(whole)
        if before: assert len(PoseDataset.load(home / "mp100", split=1)) == before
    for half in (".alpaca_0.jpg.part", ".alpaca_0.jpg.x1y2z3_9"):
        (home / "mp100/images/alpaca_face").mkdir(exist_ok=True)
        (home / "mp100/images/alpaca_face" / half).write_bytes(b"half")
    (home / "mp100/.keep").write_text("mine")
    report = run(home, how=how)
    assert report.there == 294 + 3 * FRAMES and 0 < report.placed <= report.there - before
    assert [p.name for p in (home / "mp100").rglob(".*")] == [".keep"]


# annotation files

def test_names_that_would_leave_the_folder(home):
    path = home / "annotations/mp100_split1_val.json"
    for name in ("../x/1.jpg", "/etc/x.jpg", "a/../../b.jpg", "a\\b.jpg", "C:/a.jpg", "x.jpg"):
        coco = json.loads(path.read_text())
        coco["images"][0]["file_name"] = name
        path.write_text(json.dumps(coco))
        with pytest.raises(DataError, match="mp100_split1_val.json: expected file names such as"): run(home, "coco")
    assert not (home / "mp100").exists()


def test_test_dev_is_test(home):
    path = home / "annotations/mp100_split1_test.json"
    path.rename(path.with_name("mp100_split1_test-dev-2017.json"))
    report = run(home, "ap10k")
    assert set(report.parts) == {"mp100_split1_train", "mp100_split1_val", "mp100_split1_test"}
    assert len(PoseDataset.load(home / "mp100", split=1, subset="test").categories) == 20


def test_bad_input(home, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere: expected a folder or an archive"): run(home, "nowhere")
    with pytest.raises(MissingFileError, match="nowhere"): build([], tmp_path / "nowhere", home / "mp100")
    with pytest.raises(ConfigError, match="link, hardlink, copy, got 'move'"): run(home, how="move")
    (home / "annotations/mp100_split1_val.json").write_text("{")
    with pytest.raises(DataError, match="split1_val.json: expected a whole JSON file"): run(home)
    (home / "file").write_text("")
    shutil.copy(home / "annotations/mp100_split1_test.json", home / "one.json")
    with pytest.raises(StorageError, match="cannot be written"): build([], home / "one.json", home / "file")


# HDF5

@needs_h5py
def test_frames_by_their_points(home):
    path = next((home / "sources/fly").rglob("*.h5"))
    needs = [n for n in needed(annotation_files(home / "annotations")).values() if n.source == "fly"]
    found = mp100.match_frames(Place(path), needs)
    assert {n: p.frame for n, p in found.items()} == {f"fly_body/{n}.jpg": (n + 1) % 3 for n in range(3)}
    with h5py.File(path, "r+") as file: file["annotations"][1, 4, 0] += 1
    assert set(mp100.match_frames(Place(path), needs)) == {"fly_body/1.jpg", "fly_body/2.jpg"}
    report = run(home, "fly")
    assert report.problems["fly_body/0.jpg"][0] == "missing"


@needs_h5py
def test_frames_written_out_in_order_are_not_believed(home):
    "fly_body/0.jpg is not frame 0"
    path = next((home / "sources/fly").rglob("*.h5"))
    (home / "frames/fly_body").mkdir(parents=True)
    with h5py.File(path) as file:
        for n in range(3): Image.fromarray(file["images"][n, ..., 0]).save(home / f"frames/fly_body/{n}.jpg")
    report = build([home / "frames"], home / "annotations", home / "mp100", workers=1)
    assert report.there == 0 and report.problems["fly_body/0.jpg"][0] == "unproved"


@needs_h5py
def test_other_hdf5_files_are_passed_over(home):
    folder = next((home / "sources/fly").rglob("*.h5")).parent
    with h5py.File(folder / "best_model.h5", "w") as file: file["weights"] = np.zeros(3)
    (folder / "torn.h5").write_bytes(b"\x89HDF half")
    report = run(home, "fly")
    assert report.there == 3 and len(report.refused) == 1 and "torn.h5: expected a whole HDF5 file" in report.refused[0]


def test_without_h5py(home, monkeypatch):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name == "h5py": raise ImportError("No module named 'h5py'")
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    file = home / "sources/fly/x.h5"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"any")
    with pytest.raises(ConfigError, match="x.h5: reading HDF5 files needs the package h5py"):
        mp100.match_frames(Place(file), [])
    report = run(home, "fly", "coco")
    assert report.there == 3 and any("pip install h5py" in line for line in report.refused)


# archives

def tar(path, *infos, mode="w"):
    with tarfile.open(path, mode) as archive:
        for info in infos: archive.addfile(info, io.BytesIO(bytes(info.size)) if info.isfile() else None)
    return path


def member(name, **values):
    info = tarfile.TarInfo(name)
    for key, value in values.items(): setattr(info, key, value)
    return info


EVIL = {"up": member("../1.jpg", size=3), "deep up": member("a/b/../../../1.jpg"), "absolute": member("/tmp/1.jpg"),
        "drive": member("C:/1.jpg"), "backslash": member("a\\..\\..\\1.jpg"),
        "link": member("1.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard link": member("1.jpg", type=tarfile.LNKTYPE, linkname="x"),
        "character device": member("1.jpg", type=tarfile.CHRTYPE), "block device": member("1.jpg", type=tarfile.BLKTYPE),
        "pipe": member("1.jpg", type=tarfile.FIFOTYPE)}


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_evil_tar(tmp_path, name, mode):
    path = tar(tmp_path / ("x.tar.gz" if mode == "w:gz" else "x.tar"), member("ok.jpg", size=5), EVIL[name], mode=mode)
    with pytest.raises(DataError, match="refused, since its member"): list_archive(path)
    refused = []
    assert list(walk([tmp_path], refused)) == [] and len(refused) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("name", ["../1.jpg", "/tmp/1.jpg", "a/../../1.jpg", "C:/1.jpg", "a\\..\\1.jpg"])
def test_evil_zip(tmp_path, name):
    info = zipfile.ZipInfo("1.jpg")
    info.filename = info.orig_filename = name
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive: archive.writestr(info, b"1")
    with pytest.raises(DataError, match="refused, since its member"): list_archive(tmp_path / "x.zip")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFBLK])
def test_zip_with_a_link_or_device(tmp_path, kind):
    info = zipfile.ZipInfo("1.jpg")
    info.external_attr, info.create_system = (kind | 0o777) << 16, 3
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive: archive.writestr(info, b"/etc/passwd")
    with pytest.raises(DataError, match="a link or a device"): list_archive(tmp_path / "x.zip")


def test_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE", 10_000)
    monkeypatch.setattr(archives, "RATIO", 20)
    with zipfile.ZipFile(tmp_path / "one.zip", "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("1.jpg", bytes(500_000))
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_BZIP2) as archive:
        for n in range(50): archive.writestr(f"{n}.jpg", bytes(9_000))
    tar(tmp_path / "x.tgz", member("1.jpg", size=500_000), mode="w:gz")
    tar(tmp_path / "y.tar.xz", *(member(f"{n}.jpg", size=9_000) for n in range(60)), mode="w:xz")
    (tmp_path / "claim.tar").write_bytes(member("1.jpg", size=1 << 44).tobuf() + bytes(1024))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError, match="that unpack to"): list_archive(path)


def test_zip_that_lies_about_a_size(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("1.jpg", bytes(1_000_000))
    data = path.read_bytes().replace((1_000_000).to_bytes(4, "little"), (1_000).to_bytes(4, "little"))
    path.write_bytes(data)
    [(place, got)] = read_places(list_archive(path))
    assert isinstance(got, DataError) or len(got) <= 1_001


def test_encrypted_member_is_said(tmp_path):
    path = tmp_path / "train.zip"
    with zipfile.ZipFile(path, "w") as archive: archive.writestr("1.jpg", b"12345")
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    [(_, got)] = read_places(list_archive(path))
    assert isinstance(got, DataError) and "password" in str(got)


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.xz"])
def test_torn_archives(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an archive at all" * 40)
    with pytest.raises(DataError, match="expected a whole archive"): list_archive(tmp_path / name)


def test_archive_cut_in_the_middle(home):
    path = home / "sources/cub/CUB_200_2011.tgz"
    path.write_bytes(path.read_bytes()[:-2000])
    report = run(home, "cub", "coco")
    assert report.there == 3 and "CUB_200_2011.tgz: expected a whole archive" in report.refused[0]


def test_only_what_is_needed_is_written(home):
    run(home)
    names = {p.relative_to(home / "mp100/images").as_posix() for p in (home / "mp100/images").rglob("*") if not p.is_dir()}
    assert names <= set(needed(annotation_files(home / "annotations")))


def test_one_evil_archive_does_not_stop_the_others(home):
    tar(home / "sources/evil.tar", EVIL["link"])
    (home / "sources/animals.rar").write_bytes(b"Rar!")
    report = run(home, "coco", "evil.tar", "animals.rar")
    assert report.there == 3 and len(report.refused) == 2
    assert "not used:" in str(report) and "unpack it first" in str(report)


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/1.jpg").write_bytes(b"1")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "far").symlink_to(tmp_path / "a/b")
    assert 1 <= len([p for p in walk([tmp_path / "a"], []) if p.name == "1.jpg"]) <= 2


def test_out_inside_a_source(home):
    report = build([home], home / "annotations", home / "sources/mp100", workers=1)
    assert build([home], out=home / "sources/mp100", workers=1).placed == 0
    assert report.there == 294 + 3 * FRAMES


def test_layers():
    "cape.data knows no model"
    code = "import sys, cape.data.mp100, cape.data.miniature; print([m for m in sys.modules if m.startswith('cape.m') or m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# the real annotation files

@pytest.fixture(scope="session")
def real(shared):
    files = annotation_files(shared / "mp100/annotations")
    return files, needed(files)


def test_real_files(real):
    files, needs = real
    assert len(files) == 10 and len(needs) == 13_412
    assert Counter(n.source for n in needs.values()) == {key: s.pictures for key, s in SOURCES.items()}
    for source in ("deepfashion2", "carfusion"):  # the labels hold whole numbers, and so do these
        assert all((p == p.round()).all() for n in needs.values() if n.source == source for p in n.points)
    cars = [n for n in needs.values() if n.source == "carfusion"]
    assert {(n.width, n.height) for n in cars} == {(1920, 1080)}
    assert mp100_proofs._car_key(next(n for n in cars if n.file_name == "bus/200402361.jpg")) == "4_2361.jpg"


def test_real_names_from_a_few_sources(real, tmp_path):
    "Pictures of the annotated sizes under the real names, in the real layouts, with the real collisions of names"
    _, needs = real
    small = [n for n in needs.values() if n.width * n.height < 400_000]
    layout = {"coco": "train2017", "ap10k": "ap-10k/data", "animalweb": "web", "macaquepose": "macaquepose_v1/images", "cub": "CUB/images/x"}
    chosen = {}
    for n in small:
        place = layout.get(n.source) or (f"keypoint-5/{n.folder}/images" if n.source == "keypoint5" else None)
        if place and len([x for x in chosen if x.split("/")[0] == n.folder]) < 4: chosen[n.file_name] = (n, place)
    for k, (name, (n, place)) in enumerate(chosen.items()):
        path = tmp_path / "all" / place / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (n.width, n.height), k % 256).save(path)
    report = build([tmp_path / "all"], annotation_files(real[0][0].parent)[0].parent, tmp_path / "mp100", workers=1)
    wrong = {n: report.problems[n] for n in chosen if n in report.problems}
    assert not wrong and report.there == len(chosen) > 150
    for k, name in enumerate(chosen):
        assert abs(np.asarray(Image.open(tmp_path / "mp100/images" / name)).mean() - k % 256) < 2, name
