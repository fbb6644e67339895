"""`kill -9` at random moments of building, training and evaluating: nothing torn, nothing lost beyond the last interval, and
what is gone on with ends as if nobody had disturbed it. A few kills by default, fifty with `-m slow`."""
import hashlib
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cape.data.annotations import PoseDataset
from cape.evaluation import Report, evaluate
from cape.learner import load_state, read_log
from cape.models.base import read_card
from cape.models.controls import Copy

from .harness import record, survive

EVERY = 5       # steps between the states of `jobs.train`


def visible(folder): return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))

def hidden(folder): return [p for p in folder.rglob(".*")]

def content(folder): return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in visible(folder)}


# ---- what a kill may leave, and what must come out

class Building:
    "Every picture whole, every category that was finished still there and untouched"
    def __init__(self): self.done = {}
    def check(self, folder):
        for path in visible(folder):
            if path.suffix == ".jpg":
                with Image.open(path) as picture: picture.load()
            else: json.loads(path.read_text())
        parts = {p.name: p.stat().st_mtime_ns for p in (folder / "parts").glob("[0-9]*.json")}
        known = self.done.setdefault(folder, {})
        if not (folder / "annotations").exists(): assert parts.items() >= known.items(), "a finished category was lost or made again"
        known.update(parts)
    def compare(self, whole, folder):
        assert content(whole) == content(folder) and len(content(whole)) > 100
        assert not hidden(folder) and PoseDataset.load(folder).fingerprint == PoseDataset.load(whole).fingerprint


class Training:
    "State and weights whole, and at most `EVERY` steps behind the log"
    def check(self, folder):
        state, log = load_state(folder), read_log(folder)
        reached = max((line["step"] for line in log), default=0)
        assert (state["step"] if state else 0) >= (reached - 1) // EVERY * EVERY
        text = (folder / "log.jsonl").read_text() if log else ""
        assert len(text.splitlines()) - len(log) <= 1                   # only the last line may be torn
        for path in folder.glob("*.safetensors"): load_file(path), read_card(path)
    def compare(self, whole, folder):
        a, b = load_state(whole), load_state(folder)
        for part in ("model", "optimizer"):
            x, y = (dict(walk(state[part])) for state in (a, b))
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k] for k in x)
        for name in ("last", "best"):
            x, y = (load_file(f / f"{name}.safetensors") for f in (whole, folder))
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        assert logged(whole) == logged(folder) and not hidden(folder)
        x, y = (json.loads((f / "result.json").read_text()) for f in (whole, folder))
        assert [x[k] for k in ("step", "images", "best", "stopped")] == [y[k] for k in ("step", "images", "best", "stopped")]

def walk(tree, path=()):
    "(path, leaf) of nested dicts and lists"
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None: yield path, tree
    else:
        for key, value in items: yield from walk(value, (*path, key))

def logged(folder): return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "utilisation")} for line in read_log(folder)]


class Evaluating:
    "Every kept category whole and untouched; the report there or not"
    def __init__(self): self.done = {}
    def check(self, folder):
        files = {p: p.stat().st_mtime_ns for p in (folder / "finished").glob("*.npz")}
        for path in files:
            with np.load(path, allow_pickle=False) as rows: assert len(rows["query"]) == 24
        known = self.done.setdefault(folder, {})
        assert files.items() >= known.items(), "a scored category was lost or scored again"
        known.update(files)
        if (folder / "report.json").exists(): Report.from_json(folder / "report.json")
    def compare(self, whole, folder):
        self.check(folder)
        a, b = (json.loads((f / "report.json").read_text()) for f in (whole, folder))
        for settings in (a["settings"], b["settings"]): settings.pop("seconds"), settings.pop("encoded")
        assert a == b and len(a["per_category"]) == 20
        x, y = (sorted(f.glob("finished/*.npz")) for f in (whole, folder))
        assert [p.read_bytes() for p in x] == [p.read_bytes() for p in y] and len(x) == 20


KINDS = {"build": Building, "train": Training, "evaluate": Evaluating}
FEW, MANY = {"build": 2, "train": 3, "evaluate": 2}, {"build": 17, "train": 17, "evaluate": 16}

@pytest.mark.parametrize("kind", KINDS)
def test_a_few_kills(kind, jobs, posezoo_mini, tmp_path):
    look = KINDS[kind]()
    print(survive(jobs, kind, [], tmp_path, FEW[kind], look.check, look.compare))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills(jobs, posezoo_mini, tmp_path):
    counts = {}
    for kind, kills in MANY.items():
        look, folder = KINDS[kind](), tmp_path / kind
        folder.mkdir()
        counts[kind] = survive(jobs, kind, [], folder, kills, look.check, look.compare)
    assert sum(c["killed"] for c in counts.values()) == 50
    record("kills", **counts, total=50)


def test_what_is_kept_is_not_scored_again(posezoo_mini, tmp_path):
    class Counts(Copy):
        scored = 0
        def forward(self, batch):
            self.scored += len(batch)
            return super().forward(batch)
    first, second, other = Counts(), Counts(), Counts()
    data, options = posezoo_mini.select(list(posezoo_mini.categories)[:5]), dict(episodes=3, queries=2, size=32, progress=False, resume=tmp_path)
    whole = evaluate(first, data, **options)
    for path in sorted(tmp_path.iterdir())[:2]: path.unlink()
    again = evaluate(second, data, **options)
    assert (first.scored, second.scored) == (15, 6) and np.array_equal(whole.distances, again.distances, equal_nan=True)
    evaluate(other, data, **options | dict(queries=1))
    assert other.scored == 15 and len(list(tmp_path.iterdir())) == 10     # other episodes share nothing with these

def test_a_killed_parent_takes_its_workers_along(jobs, tmp_path):
    "As when memory runs out: the builder dies, its two workers stop by themselves, and a new one goes on"
    pid = jobs.start("build", tmp_path / "said.txt", tmp_path / "zoo", 2)
    while not list((tmp_path / "zoo" / "parts").glob("[0-9]*.json")): time.sleep(.02)
    os.kill(pid, signal.SIGKILL)
    assert jobs.wait() == -signal.SIGKILL
    end = time.time() + 20
    while alive(pid) and time.time() < end: time.sleep(.05)
    assert not alive(pid)
    code, _ = jobs.run("build", tmp_path / "said.txt", tmp_path / "zoo")
    assert code == 0 and len(list((tmp_path / "zoo" / "images").rglob("*.jpg"))) == 100 and not hidden(tmp_path / "zoo")

def alive(group):
    "Whether any process of the group is at work"
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True
