"Type hints: checked by mypy, and announced to those who use the package."
import subprocess
import sys

import pytest
from conftest import ROOT


def mypy(*files, cwd=ROOT):
    "mypy's complaints, with the settings of mypy.ini"
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", ROOT / "mypy.ini", *files], cwd=cwd,
                          capture_output=True, text=True, timeout=900)
    return [line for line in done.stdout.splitlines() if "error:" in line] + done.stderr.splitlines()


def test_the_package_says_that_it_has_hints(): assert (ROOT / "cape/py.typed").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hints_are_right():
    pytest.importorskip("mypy")
    assert mypy("cape") == []


@pytest.mark.slow
def test_the_settings_see_a_wrong_hint(tmp_path):
    "And how a user's code is checked against the package"
    pytest.importorskip("mypy")
    (tmp_path / "mine.py").write_text("from cape.errors import ConfigError\nfrom cape.data.crops import Augment\n"
                                      "def f(n: int) -> str: return n\nAugment(3, 4, 5, 6, 7, 8)\n")
    found = mypy(tmp_path / "mine.py")
    assert any("mine.py:3" in line for line in found) and any("mine.py:4" in line for line in found), found
