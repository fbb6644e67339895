"Shared fixtures: where things are, how a notebook is run, and the small data set."
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the package and the tools of this very tree


def run_notebook(name, out, timeout=600, **params):
    "Run `nbs/{name}.ipynb` with `params`, save it in the folder `out`; gives the executed notebook"
    from run_notebook import run
    source = ROOT / "nbs" / f"{name}.ipynb"
    return run(source, Path(out) / source.name, params, timeout)


@pytest.fixture
def notebook(tmp_path):
    "`run_notebook` into this test's own folder"
    return lambda name, **params: run_notebook(name, tmp_path, **params)


@pytest.fixture(scope="session")
def posezoo_mini():
    "PoseZoo at size mini, built on first use into the data folder"
    from cape.data.annotations import PoseDataset
    return PoseDataset.load("posezoo", size="mini")


@pytest.fixture(scope="session")
def shared():
    "The optional folder of reference material beside the repository"
    folder = ROOT.parent / "shared"
    if not folder.is_dir(): pytest.skip("no reference material beside the repository")
    return folder
