"Nothing in a file that somebody else made is ever run, and no address is called that nobody asked for."
import ast
import io
import os
import pickle
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import cape
from cape.errors import CapeError
from cape.models.base import model_class
from cape.models.official import official_loaders

from .harness import ROOT


# ---- code in a file

class Act:
    "Pickled as a call of `function(*args)`"
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call

def containers(trace):
    "Suffix and bytes: a pickle that makes the folder `trace`, in everything that can hold one"
    act = Act(os.mkdir, str(trace))
    plain = pickle.dumps(act)
    out = {"plain": plain, "protocol 0": pickle.dumps(act, 0)}
    for what, options in (("zip", {}), ("legacy", dict(_use_new_zipfile_serialization=False))):
        for where, content in (("alone", act), ("beside weights", {"state_dict": {"a": torch.ones(2)}, "meta": act}), ("among weights", {"a": torch.ones(2), "b": act}),
                               ("in a state", dict(model=act, optimizer={}, step=1, config={}, about={}))):
            file = io.BytesIO()
            torch.save(content, file, **options)
            out[f"torch {what}, {where}"] = file.getvalue()
    for what, save in (("npy", np.save), ("npz", np.savez)):
        file = io.BytesIO()
        save(file, np.array([act, 1], object))
        out[what] = file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("query.npy", "archive/data.pkl", "data.pkl"): archive.writestr(name, plain)
    out["zip of pickles"] = file.getvalue()
    out["safetensors"] = len(plain).to_bytes(8, "little") + plain
    return out

def some_data(categories):
    data = cape.PoseDataset.load("posezoo", size="mini", split=1, subset="test")
    return data.select(list(data.categories)[:categories])

def readers():
    "What opens a file of somebody else"
    from cape.data.annotations import read_annotations, read_image
    from cape.data.archives import Place
    from cape.data.mp100_proofs import Need, match_frames
    from cape.evaluation import Report, evaluate
    from cape.learner import load_batch, load_state
    from cape.models.backbones import create_backbone, read_weights
    from cape.models.base import load_model, read_card
    from cape.models.controls import Copy
    from cape.photos import PhotoPoses, read_photo
    def state(path):
        os.replace(path, path.with_name("state.pt"))
        return load_state(path.parent)
    def resumed(path):
        data = some_data(1)
        done = dict(episodes=2, queries=2, size=32, progress=False, resume=path.parent / "kept")
        evaluate(Copy(), data, **done)
        [kept] = (path.parent / "kept").iterdir()
        os.replace(path, kept)
        return evaluate(Copy(), data, **done)
    out = {"load_model": load_model, "read_card": read_card, "load_state": state, "load_batch": load_batch, "Report.from_json": Report.from_json,
           "read_annotations": read_annotations, "PoseDataset.load": cape.PoseDataset.load, "PhotoPoses.from_coco": PhotoPoses.from_coco, "read_image": read_image,
           "read_photo": read_photo, "evaluate(resume=)": resumed, "read_weights": read_weights, "create_backbone": lambda p: create_backbone("resnet18", weights=str(p)),
           "graphcape": lambda p: cape.create_model("graphcape", backbone="swinv2_tiny", weights=str(p)),
           "match_frames": lambda p: match_frames(Place(p), [Need("fly_body/1.jpg", 4, 4)])}
    for name in official_loaders: out[f"load_official({name})"] = lambda p, name=name: cape.load_official(name, p)
    return out

READERS = readers()

def test_the_payloads_work(tmp_path):
    "Read the careless way, they do run"
    ran = set()
    for what, data in containers(tmp_path / "it_ran").items():
        for careless in (lambda d: pickle.loads(d), lambda d: torch.load(io.BytesIO(d), weights_only=False), lambda d: dict(np.load(io.BytesIO(d), allow_pickle=True)),
                         lambda d: np.load(io.BytesIO(d), allow_pickle=True)):
            try: careless(data)
            except Exception: pass
            if (tmp_path / "it_ran").exists():
                ran.add(what)
                (tmp_path / "it_ran").rmdir()
                break
    assert containers(tmp_path).keys() - ran <= {"safetensors", "zip of pickles"}      # these two have the wrong head

@pytest.mark.parametrize("reader", READERS)
def test_no_pickle_is_ever_run(reader, posezoo_mini, tmp_path):
    every = 4 if reader in ("create_backbone", "graphcape") else 1         # these build a network first
    for number, (what, data) in enumerate([*containers(tmp_path / "it_ran").items()][1::every]):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "file.pth"
        path.write_bytes(data)
        with pytest.raises(CapeError) as error: READERS[reader](path)
        assert not (tmp_path / "it_ran").exists(), what
        assert len(str(error.value)) < 2000 and any(name in str(error.value) for name in ("file.pth", "state.pt", ".npz")), what

def test_nothing_in_the_library_can_run_code_from_a_file():
    "No pickle, no eval, and every loader that could unpickle is told not to"
    for path in sorted((ROOT / "cape").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & {n.split(".")[0] for n in names}, where
            if not isinstance(node, ast.Call): continue
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__"), where
            if called.endswith("torch.load") or called == "torch.load": assert given.get("weights_only") == "True", where
            if called in ("np.load", "numpy.load"): assert given.get("allow_pickle") == "False", where
            if called.startswith("subprocess."): assert given.get("shell") in (None, "False"), where

def test_a_picture_that_is_a_program_is_not_given_to_an_interpreter(tmp_path, monkeypatch):
    "Pillow hands PostScript to Ghostscript; here no process is started"
    from cape.data.annotations import read_image
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    Image.new("RGB", (9, 9)).save(tmp_path / "x.jpg", "EPS")
    with pytest.raises(Exception): Image.open(tmp_path / "x.jpg").load()
    assert started and started[0][0][0] == "gs"             # so it would be
    started.clear()
    with pytest.raises(CapeError, match="x.jpg"): read_image(tmp_path / "x.jpg")
    assert not started


# ---- the network

class Called(BaseException): "An address that nobody asked for"

@pytest.fixture
def offline(monkeypatch):
    "No socket but those of this machine, and a list of what was tried"
    tried = []
    def refuse(self, address, *rest):
        if self.family == socket.AF_UNIX: return connect(self, address, *rest)
        tried.append(address)
        raise Called(address)
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    def look_up(*name, **_):
        tried.append(name)
        raise Called(name)
    for function in ("getaddrinfo", "gethostbyname", "create_connection"): monkeypatch.setattr(socket, function, look_up)
    return tried

def test_nobody_calls_out(offline, posezoo_mini, tmp_path):
    data = some_data(2)
    for name in filter(lambda n: model_class(n).__module__.startswith("cape."), cape.list_models()):
        options = dict(base={c: k.num_keypoints for c, k in data.categories.items()}) if name == "prototype" else {}
        model = create(name, **options)
    cape.evaluate(model, data, episodes=1, queries=1, size=64, progress=False)
    from cape.estimator import PoseEstimator
    from cape.models.controls import Copy
    PoseEstimator(Copy(), size=64).fit(data.path(0), data[0].keypoints).predict([data.path(1)])
    data.check().to_json(tmp_path / "health.json")
    assert offline == []

def create(name, **options):
    "A model of that name with a small backbone where it takes one"
    import inspect
    known = inspect.signature(model_class(name).__init__).parameters
    if "backbone" in known: options["backbone"] = "small"
    if "weights" in known: options["weights"] = None
    return cape.create_model(name, **options)

def test_what_asks_for_it_does_call(offline):
    "The fixture sees it, so the test above can fail"
    from cape.models.official import fetch
    with pytest.raises(Called): fetch("https://example.org/x.pth", "/tmp/never-written.pth")
    assert offline and not os.path.exists("/tmp/never-written.pth")

def test_without_any_network_at_all(posezoo_mini):
    "In a namespace that has none, imports and subprocesses included"
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode: pytest.skip("no namespace without a network can be made here")
    code = """
import cape
data = cape.PoseDataset.load("posezoo", size="mini", split=1, subset="test")
data = data.select(list(data.categories)[0])
print(cape.evaluate(cape.create_model("protonet", backbone="small", weights=None), data, episodes=1, queries=1, size=64, progress=False).pairs)
"""
    done = subprocess.run(["unshare", "-rn", sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr[-2000:]
