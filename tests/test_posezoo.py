"The embedded data set: the same everywhere, whole or not there, and its flags true."
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import cape
from cape.data import posezoo
from cape.data.annotations import mp100_facts
from cape.data.drawing import draw, draw_batch
from cape.data.posezoo import Size, build, member, species
from cape.errors import ConfigError, StorageError

TINY = Size(2, 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return build(TINY, tmp_path_factory.mktemp("zoo")/"tiny", workers=2)


def test_the_same_everywhere(tiny):
    assert cape.PoseDataset.load(tiny).fingerprint == "bd88bed2f20f9d4c"


def test_workers_and_process_draw_the_same(tiny, tmp_path):
    alone = build(TINY, tmp_path/"alone", workers=1)
    for name in ("zebra_body/0001.jpg", "sofa/0000.jpg", "human_face/0001.jpg"):
        assert (alone/"images"/name).read_bytes() == (tiny/"images"/name).read_bytes()
    assert cape.PoseDataset.load(alone).fingerprint == cape.PoseDataset.load(tiny).fingerprint


def test_a_member_is_the_same_in_every_size():
    kind = species()[2]
    assert np.allclose(member(kind, 5, side=64).keypoints*2, member(kind, 5, side=128).keypoints, atol=.02)


def test_loads_checks_and_splits_like_mp100(tiny):
    whole = cape.PoseDataset.load(tiny, strict=True)
    assert whole.check().ok, str(whole.check())
    facts, tests = mp100_facts(), []
    for n in range(1, 6):
        sizes = {s: set(cape.PoseDataset.load(tiny, split=n, subset=s).categories) for s in ("train", "val", "test")}
        assert {s: len(c) for s, c in sizes.items()} == dict(train=70, val=10, test=20)
        assert sizes == {s: set(c) for s, c in facts["splits"][n].items()}
        assert not sizes["train"] & sizes["val"] and not sizes["train"] & sizes["test"] and not sizes["val"] & sizes["test"]
        tests += sizes["test"]
    assert sorted(tests) == list(range(1, 101))
    for name in ("human body", "human face", "vehicle", "furniture"):
        test = cape.PoseDataset.load(tiny, split=name, subset="test")
        train = cape.PoseDataset.load(tiny, split=name, subset="train")
        assert {c.supercategory for c in test.categories.values()} == {name}
        assert len(test.categories) + len(train.categories) == 100
    assert all(len(c.parts) == c.num_keypoints for c in whole.categories.values())


def test_flags_agree_with_the_picture():
    "The flag is computed by a line of sight, the depth buffer by drawing; within a pixel of an edge they may differ."
    wrong = total = 0
    for photo in (member(species()[i], n, side=256) for i in (1, 2, 18, 24, 39, 40, 44, 51, 62, 72, 80, 94) for n in range(4)):
        depth, on = draw(photo.scene)[1], photo.visibility > 0
        x, y = np.rint(photo.keypoints[on]).astype(int).T
        at = lambda dx, dy: depth[np.clip(y + dy, 0, len(depth) - 1), np.clip(x + dx, 0, depth.shape[1] - 1)]
        behind = np.stack([at(dx, dy) > (photo.depth + photo.radius)[on] for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
        sure = behind.all(0) | ~behind.any(0)
        wrong += (behind[4] != (photo.visibility[on] == 1))[sure].sum()
        total += sure.sum()
    assert total > 500 and wrong <= 0.005*total


def test_batches_on_a_device_equal_single_pictures():
    photos = [member(species()[i], 0, side=96) for i in (94, 38, 11, 59)]
    for p in photos:
        together = draw_batch([p.scene, p.scene])
        assert (np.abs(together[1].astype(int) - draw(p.scene)[0]) > 3).any(-1).mean() < .01


def test_a_killed_build_goes_on(tiny, tmp_path):
    code = f"from cape.data.posezoo import build, Size; build(Size(2, 64), {str(tmp_path/'zoo')!r}, workers=1)"
    running = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"CAPE_PROGRESS": "off"})
    while not list((tmp_path/"zoo"/"parts").glob("[0-9]*.json")) and running.poll() is None: pass
    running.kill()
    assert running.wait() != 0 and not (tmp_path/"zoo"/"annotations").exists()
    with pytest.raises(cape.CapeError): cape.PoseDataset.load(tmp_path/"zoo")
    assert cape.PoseDataset.load(build(TINY, tmp_path/"zoo", workers=2)).fingerprint == cape.PoseDataset.load(tiny).fingerprint
    assert not (tmp_path/"zoo"/"parts").exists()


@pytest.mark.parametrize("number, says", [(errno.ENOSPC, "no room left"), (errno.EACCES, "no permission")])
def test_a_disk_that_refuses(tiny, tmp_path, monkeypatch, number, says):
    written, real = [], posezoo.write_atomic
    def write(path, data):
        if len(written) >= 30: raise OSError(number, os.strerror(number))
        written.append(path)
        return real(path, data)
    monkeypatch.setattr(posezoo, "write_atomic", write)
    with pytest.raises(StorageError, match=says) as e: build(TINY, tmp_path/"zoo", workers=1)
    assert str(tmp_path/"zoo") in str(e.value)
    assert not (tmp_path/"zoo"/"annotations").exists()
    for part in (tmp_path/"zoo"/"parts").glob("*"): json.loads(part.read_text())
    monkeypatch.setattr(posezoo, "write_atomic", real)
    assert cape.PoseDataset.load(build(TINY, tmp_path/"zoo", workers=1)).fingerprint == cape.PoseDataset.load(tiny).fingerprint


def test_a_full_disk_in_a_worker_is_told_by_the_parent(tmp_path):
    with pytest.raises(StorageError, match="no room left"): posezoo._raise_from(tmp_path, f"Traceback ...\nerrno {errno.ENOSPC}\n")


def test_a_real_full_disk(tmp_path):
    "On a file system of 300 kB, where one may be mounted."
    place = tmp_path/"small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True).returncode: pytest.skip("cannot mount a small file system")
    try:
        with pytest.raises(StorageError, match="no room left"): build(TINY, place/"zoo", workers=2)
        assert not (place/"zoo"/"annotations").exists()
        from PIL import Image
        for picture in (place/"zoo"/"images").rglob("*.jpg"): Image.open(picture).load()
    finally: subprocess.run(["umount", str(place)])


def test_a_file_in_the_way(tmp_path):
    (tmp_path/"zoo").write_text("not a folder")
    with pytest.raises(StorageError): build(TINY, tmp_path/"zoo", workers=1)


def test_another_seed_or_size_in_the_same_folder(tiny):
    with pytest.raises(ConfigError, match="was begun as"): build(TINY, tiny, seed=1)
    with pytest.raises(ConfigError, match="one of mini, default, full"): build("large")
