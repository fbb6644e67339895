"Every chapter runs top to bottom, each in a process of its own, which is forked from one that has imported the large libraries."
import contextlib
import os
import sys
from multiprocessing import get_context, get_start_method, set_start_method

import pytest
from conftest import ROOT

CHAPTERS = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb") if p.name[0] not in "_.")
LARGE = ["torch", "torchvision", "matplotlib.pyplot", "nbdev.test"]  # not cape: a chapter may define what it exports anew


def run_chapter(chapter, said, method):
    "In the child: run it as `nbdev-test` does, with all that it says in the file `said`; exit 1 if it fails"
    set_start_method(method, force=True)                           # of its own workers, as if the server were not there
    with open(said, "w", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        sys.__stdout__ = sys.__stderr__ = log                      # where nbdev writes the traceback of a cell
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        from nbdev.test import nbdev_test
        try: nbdev_test(path=f"nbs/{chapter}", n_workers=0, do_print=True)
        except SystemExit as e: os._exit(int(bool(e.code)))
    os._exit(0)


@pytest.fixture(scope="session")
def server():
    "What children are forked from"
    context = get_context("forkserver")
    context.set_forkserver_preload(LARGE)
    return context


@pytest.mark.chapter
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter(chapter, server, tmp_path):
    said = tmp_path / "said.txt"
    child = server.Process(target=run_chapter, args=(chapter, said, get_start_method()))
    child.start()
    try: child.join()
    finally: child.kill()
    text = said.read_text() if said.exists() else "nothing was said"
    assert child.exitcode == 0, text[-4000:]
    assert f"Starting {ROOT / 'nbs' / chapter}" in text, f"nothing ran:\n{text}"
