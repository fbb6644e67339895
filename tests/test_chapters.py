"Every chapter runs top to bottom, each in a process of its own."
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CHAPTERS = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb") if p.name[0] not in "_.")


@pytest.mark.chapter
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter(chapter):
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    command = [Path(sys.executable).parent / "nbdev-test", f"nbs/{chapter}", "--n-workers", "0", "--do-print"]
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, text=True, capture_output=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert f"Starting {ROOT / 'nbs' / chapter}" in said, f"nbdev-test ran nothing:\n{said}"
