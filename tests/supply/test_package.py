"Wheel and sdist: what is in them, and that a wheel installed in a new environment does the work."
import json
import re
import time

import numpy as np
import pytest
from conftest import ROOT
from environments import CFG, build, contents, environment, faults, metadata, run

pytest.importorskip("build")
SOURCES = ["LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "settings.ini", "setup.py", "PKG-INFO", "setup.cfg"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The wheel, built with the tools that are installed, and the tree it was built from"
    (wheel,), tree = build(tmp_path_factory.mktemp("wheel"), "--wheel", "--no-isolation")
    return wheel, tree


@pytest.fixture(scope="module")
def wheel(built): return built[0]


def test_the_wheel_holds_the_package_and_nothing_else(built):
    files = contents(built[0])
    assert faults(files, built[1]) == []
    assert {"cape/weights/default.safetensors", "cape/py.typed", "cape/data/mp100_facts.json"} <= set(files)
    assert sum(map(len, files.values())) < 50e6


def test_what_the_wheel_says_of_itself(wheel):
    import cape
    files, about = contents(wheel), metadata(contents(wheel))
    assert (about["Name"], about["Version"], about["Requires-Python"]) == ("cape", cape.__version__, f">={CFG['min_python']}")
    plain = [r for r in about.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.replace(" ", "") for r in plain) == sorted(CFG["requirements"].split())
    assert "Apache" in next(b.decode() for n, b in files.items() if n.endswith("LICENSE"))
    assert "cape = cape.cli:main" in next(b.decode() for n, b in files.items() if n.endswith("entry_points.txt"))
    assert about.get_payload().startswith((ROOT / "README.md").read_text()[:200])


@pytest.mark.parametrize("change, says", [
    (lambda f: f.pop("cape/weights/default.safetensors"), "default.safetensors: missing"),
    (lambda f: f.pop("cape/cli.py"), "cape/cli.py: missing"),
    (lambda f: f.update({"tests/test_cli.py": b""}), "tests/test_cli.py: does not belong"),
    (lambda f: f.update({"cape/x.ipynb": b""}), "cape/x.ipynb: does not belong"),
    (lambda f: f.update({"cape/cli.py": f"x = {str(ROOT)!r}".encode()}), "cape/cli.py: holds a path"),
    (lambda f: f.update({"cape/errors.py": b"old"}), "cape/errors.py: not the file of the tree")])
def test_the_check_sees(built, change, says):
    files = contents(built[0])
    change(files)
    assert any(says in line for line in faults(files, built[1])), faults(files, built[1])


@pytest.mark.slow
def test_sdist_makes_the_same_wheel(wheel, tmp_path):
    "In isolation, as a package index would: only what `build-system` requires is there"
    both, tree = build(tmp_path)
    sdist, again = sorted(both, key=lambda f: f.suffix == ".whl")
    assert faults(contents(sdist), tree, SOURCES) == []
    assert faults(contents(again), tree) == []
    assert metadata(contents(again)).items() == metadata(contents(wheel)).items()


PREDICT = """
import json, sys, cape
assert not cape.__file__.startswith(sys.argv[1]), cape.__file__
labels = cape.PhotoPoses.from_coco("labels.json").given
poses = cape.PoseEstimator().fit_poses(labels).predict(["photos/b.png", "photos/c.png"])
print(json.dumps([p.keypoints.tolist() for p in poses]))
"""


@pytest.fixture
def photos(posezoo_mini, tmp_path):
    "A folder with three photos of one category, and beside it the labels of the first"
    from cape.photos import PhotoPoses
    from cape.estimator import PoseEstimator
    from PIL import Image
    category = next(c for c in posezoo_mini.categories if len(posezoo_mini.by_category[c]) >= 3)
    rows = posezoo_mini.by_category[category][:3]
    (tmp_path / "photos").mkdir()
    for name, i in zip("abc", rows): Image.fromarray(posezoo_mini.image(i)).save(tmp_path / f"photos/{name}.png")
    first = posezoo_mini[rows[0]]
    fitted = PoseEstimator().fit(tmp_path / "photos/a.png", first.keypoints, visible=first.visible)
    fitted.supports_.save(tmp_path / "labels.json")
    return tmp_path


def expected(photos):
    "What this tree finds on the two photos"
    from cape.estimator import PoseEstimator
    from cape.photos import PhotoPoses
    found = PoseEstimator().fit_poses(PhotoPoses.from_coco(photos / "labels.json").given)
    return np.array([p.keypoints for p in found.predict([photos / "photos/b.png", photos / "photos/c.png"])])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_installed_in_a_new_environment_it_predicts(wheel, photos):
    begin = time.perf_counter()
    python = environment(photos / "env")
    run(python, "-m", "pip", "install", "-q", wheel, timeout=1500)
    print(f"installed in {time.perf_counter() - begin:.0f} s")
    run(python, "-m", "pip", "check")
    run(python, "-c", "import cape; print(cape.__version__)", cwd=photos)
    wanted = expected(photos)
    found = json.loads(run(python, "-c", PREDICT, ROOT, cwd=photos))
    np.testing.assert_allclose(found, wanted, atol=0.5)             # pixels
    command = photos / "env/bin/cape"
    said = json.loads(run(command, "predict", "--labels", "labels.json", "photos", "--json", cwd=photos))
    assert said["photos"] == 3 and said["failed"] == {}
    coco = json.loads((photos / said["file"]).read_text())
    names = {i["id"]: i["file_name"] for i in coco["images"]}
    for a in coco["annotations"]:
        name = names[a["image_id"]][-5]                             # photos/b.png
        if name in "bc": np.testing.assert_allclose(np.reshape(a["keypoints"], (-1, 3))[:, :2], wanted["bc".index(name)], atol=0.5)
    assert len(list((photos / "photos-poses/pictures").iterdir())) == 3
    assert re.search(r"ProtoNet|protonet", run(command, "models", cwd=photos))
