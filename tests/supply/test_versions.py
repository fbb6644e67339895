"The oldest versions that settings.ini allows are installed and tried; those in use are the newest."
import sys

import pytest
from conftest import ROOT
from environments import CFG, environment, lowest, pythons, run

CHOSEN = ["contract", "crops", "episodes", "metrics", "estimator", "learner", "evaluation", "cli", "backbones", "converters", "export"]
EXTRAS = ["timm", "mp100", "onnx"]
REQUIRED = "\n".join(CFG[key] for key in ["requirements", *(f"{extra}_requirements" for extra in EXTRAS)])


def test_every_requirement_has_a_lower_bound():
    for line in lowest(REQUIRED): assert line.split(";")[0].count("==") == 1 and "," not in line, line


@pytest.mark.slow
@pytest.mark.timeout(3900)
def test_the_lowest_versions_work(posezoo_mini, tmp_path):
    least = tuple(map(int, CFG["min_python"].split(".")))
    python = environment(tmp_path / "env", pythons().get(least, sys.executable))
    pins = tmp_path / "lowest.txt"
    pins.write_text("\n".join(lowest(REQUIRED)))
    run(python, "-m", "pip", "install", "-q", "-r", pins, "pytest", "pytest-timeout", "hypothesis", timeout=1800)
    print(run(python, "-m", "pip", "list"))
    run(python, "-m", "pip", "check")
    files = [ROOT / "tests" / f"test_{name}.py" for name in CHOSEN]
    print(run(python, "-m", "pytest", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *files, cwd=ROOT,
              timeout=1800, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")[-1500:])
