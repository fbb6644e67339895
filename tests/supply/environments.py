"Helpers of these tests: what the package requires, a copy of the tree, wheels and new environments."
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

from check_notebooks import tracked
from conftest import ROOT

INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini")
CFG = INI["DEFAULT"]


def run(*words, cwd=None, timeout=600, **env):
    "Run a command apart from the repository; its output, or an error that shows it"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CAPE_DATA", "VIRTUAL_ENV")}
    done = subprocess.run([str(w) for w in words], cwd=cwd, env={**kept, **env}, text=True, capture_output=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(map(str, words))} gave {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(folder, *options):
    "Wheel or sdist or both, built from a copy of the tree, so that nothing old gets in and nothing is left behind: files, copy"
    copy = folder / "source"
    for f in tracked(ROOT):
        if not f.startswith(("nbs/", "figures/", "data/")):
            (copy / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / f, copy / f)
    run(sys.executable, "-m", "build", "-o", folder / "dist", *options, copy)
    return sorted((folder / "dist").iterdir()), copy


def contents(archive):
    "Name -> bytes of a wheel or an sdist (there without the first folder)"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as z: return {n: z.read(n) for n in z.namelist() if not n.endswith("/")}
    with tarfile.open(archive) as t:
        return {m.name.split("/", 1)[1]: t.extractfile(m).read() for m in t.getmembers() if m.isfile()}


def faults(files, tree, extra=()):
    "What is wrong with a wheel built from `tree`, or with an sdist, which has the files `extra` too; one line each"
    whole = {f for f in tracked(tree) if f.startswith("cape/") and "__pycache__" not in f}
    own = {n for n in files if not re.search(r"(^|/)[\w.-]+\.(dist|egg)-info/", n)}
    bad = [f"{n}: missing" for n in {*whole, *extra} - own] + [f"{n}: does not belong" for n in own - {*whole, *extra}]
    homes = [os.fsencode(p) for p in (ROOT, f"{tree}", f"{Path.home()}/")]
    bad += [f"{n}: holds a path of this machine" for n, b in files.items() if any(h in b for h in homes)]
    bad += [f"{n}: not the file of the tree" for n in own & whole if files[n] != (tree / n).read_bytes()]
    return sorted(bad)


def metadata(files):
    "The METADATA of a wheel"
    return email.message_from_bytes(next(b for n, b in files.items() if n.endswith(".dist-info/METADATA")))


def environment(folder, python=sys.executable):
    "A new virtual environment with nothing in it but pip; its Python"
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def pythons():
    "Pythons on this machine: (major, minor) -> executable"
    places = [*os.environ.get("PATH", "").split(os.pathsep), *Path.home().glob(".pyenv/versions/*/bin")]
    found = {}
    for minor in range(10, 20):
        for place in places:
            file = Path(place) / f"python3.{minor}"
            if file.is_file() and subprocess.run([file, "-c", "import venv"], capture_output=True).returncode == 0:
                found.setdefault((3, minor), file)
    return found


def lowest(requirements):
    "The lower bound of each requirement as the only version allowed; a condition on the Python stays"
    return [re.sub(r">=", "==", r, count=1) for r in requirements.split()]
