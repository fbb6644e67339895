"Shared fixtures: where things are, how a notebook is run, and the small data set."
import contextlib
import io
import os
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the package and the tools of this very tree


def own_methods():
    "Names of the package's own methods; tests register toys beside them"
    from cape.models.base import list_models, model_class
    return [n for n in list_models() if model_class(n).__module__.startswith("cape.")]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The chapters, which take longest, at the head of each worker's share: none is left for the end, with an idle worker beside.

    `--dist worksteal` first gives each worker as many neighbours."""
    workers, rest = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)), items[:]
    if workers == 1: return
    chapters = [item for item in rest if item.get_closest_marker("chapter")]
    others = iter([item for item in rest if not item.get_closest_marker("chapter")])
    items.clear()
    for w in range(workers):
        share, first = (len(rest) - len(items)) // (workers - w), chapters[w::workers]
        items += [*first, *islice(others, max(0, share - len(first)))]
    items += others


def run_notebook(name, out, timeout=600, **params):
    "Run `nbs/{name}.ipynb` with `params`, save it in the folder `out`; gives the executed notebook"
    from run_notebook import run
    source = ROOT / "nbs" / f"{name}.ipynb"
    return run(source, Path(out) / source.name, params, timeout)


def run_cells(notebook, **params):
    """The cells of a notebook one after the other in this process, with `params`: gives all that was printed.

    What a kernel adds (it starts, imports and shows for seconds) is for the one test of a notebook that uses `run`."""
    import nbformat
    from run_notebook import check_parameters
    checked, names, said = check_parameters(notebook, params), {"__name__": "__main__"}, io.StringIO()
    here = os.getcwd()
    os.chdir(notebook.parent)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            for cell in nbformat.read(notebook, 4).cells:
                if cell.cell_type != "code": continue
                exec(compile(cell.source, str(notebook), "exec"), names)
                if "parameters" in cell.metadata.get("tags", []): names |= checked
    finally: os.chdir(here)
    return said.getvalue()


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
