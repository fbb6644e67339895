"The command `cape mp100`: codes, streams, progress, help."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cape.cli import main
from cape.data.miniature import make_miniature

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path): return make_miniature(tmp_path / "home", per=2, frames=False)


def cape(*words, **env):
    "The command as a process"
    code = "import sys; from cape.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, text=True, capture_output=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT), **env))


def test_codes_and_streams(home):
    words = ["mp100", "--annotations", home / "annotations", "--out", home / "mp100"]
    done = cape(*words, "--sources", home / "sources", "--copy", "--json", CAPE_PROGRESS="off")
    found = json.loads(done.stdout)
    assert (done.returncode, found["there"], found["needed"]) == (1, 196, 200), done.stderr
    assert not any(p.is_symlink() for p in (home / "mp100").rglob("*"))
    done = cape("mp100", "--out", home / "mp100", CAPE_PROGRESS="off")
    assert done.returncode == 1 and "196 of 200 pictures" in done.stdout and done.stderr == ""


def test_complete_is_0(home, capsys):
    for path in (home / "annotations").glob("*.json"):
        coco = json.loads(path.read_text())
        coco["categories"] = [c for c in coco["categories"] if c["id"] not in (66, 44)]
        coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] not in (66, 44)]
        coco["images"] = [i for i in coco["images"] if i["id"] // 10**6 not in (66, 44)]
        path.write_text(json.dumps(coco))
    words = ["mp100", "--annotations", home / "annotations", "--out", home / "mp100", "--sources", home / "sources"]
    assert main([str(w) for w in words]) == 0
    assert "196 of 196 pictures" in capsys.readouterr().out


def test_progress_does_not_spoil_json(home, monkeypatch, capsys):
    from cape import progress
    monkeypatch.setenv("CAPE_PROGRESS", "lines")
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (None, "", None, 0, "it", 0.0))
    words = ["mp100", "--annotations", home / "annotations", "--out", home / "mp100", "--json",
             "--sources", home / "sources/coco"]
    assert main([str(w) for w in words]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["there"] == 2
    for what in ("look through the sources", "look at candidates", "place"): assert what in err


@pytest.mark.parametrize("words, cause", [
    (["--sources", "gone"], "gone"), (["--annotations", "gone"], "gone"), (["--copy", "--link"], "not allowed"),
    (["--workers", "none"], "'none'"), (["--souces", "x"], "--souces"), (["--sources"], "--sources")])
def test_bad_input_is_one_line(home, words, cause):
    if "--annotations" not in words: words = ["--annotations", str(home / "annotations"), *words]
    done = cape("mp100", "--out", home / "new", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and cause in done.stderr
    assert "Traceback" not in done.stderr and not (home / "new").exists()


def test_no_place_to_write(home):
    (home / "file").write_text("")
    done = cape("mp100", "--annotations", home / "annotations", "--out", home / "file/mp100")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "file/mp100" in done.stderr


def test_help_names_every_source():
    done = cape("mp100", "--help")
    from cape.data.mp100 import SOURCES
    assert done.returncode == 0 and all(s.name in done.stdout for s in SOURCES.values())
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_list(home):
    done = cape("mp100", "--annotations", home / "annotations", "--list")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) == 200 and ["skirt/000101.jpg", "60", "54", "deepfashion2"] in rows
