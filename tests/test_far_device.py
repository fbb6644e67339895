"What a GPU would stumble over, found without one: `far_device.py` runs once in a process of its own, its findings are looked at here."
import json
import os
import subprocess
import sys

import pytest
import torch.utils.backend_registration as registration
from conftest import ROOT, own_methods

pytestmark = pytest.mark.skipif(not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="this torch cannot simulate a device")
METHODS = [n for n in own_methods() if n not in ("copy", "meanpose")]


@pytest.fixture(scope="module")
def found(posezoo_mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("far")
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "far_device.py"), str(folder)], capture_output=True, text=True, timeout=500,
                          cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CAPE_PROGRESS": "off"})
    rows = dict(json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND "))
    assert done.returncode == 0 and "control" in rows, done.stderr[-3000:]
    return lambda name: rows[name] if "error" not in rows[name] else pytest.fail(rows[name]["error"] + "\n" + rows[name]["where"])


def test_the_simulation_finds_what_it_should(found):
    control = found("control")
    assert "two devices" in control["said"] and control["fine"] == [3, 3, 3] and control["device"] == "far:0"


def test_a_training_there_ends_in_the_same_weights_and_points(found):
    "With validation and a score; dropout aside, the same operations in the same order"
    assert found("training") == {"weights": pytest.approx(0, abs=1e-6), "points": pytest.approx(0, abs=1e-2)}


def test_escape_reads_the_base_categories_there(found):
    assert found("recipe")["answer"] == "far" and {*found("recipe")["features"]} == {"far"}


def test_crops_quick_copies_and_the_estimator(found):
    using = found("using")
    assert using["crops"] < 1e-5 and using["quick"] < 1e-4 and using["estimator"] < 1e-2


@pytest.mark.parametrize("name", METHODS)
def test_answers_losses_and_gradients(name, found):
    "Made there, every one, and equal to the processor's"
    assert found(name)["gap"] < 1e-3 and found(name)["gradients"] > 40


@pytest.mark.parametrize("name", ["copy", "meanpose"])
def test_controls(name, found): assert found(name) == {"gap": 0, "gradients": 0}
