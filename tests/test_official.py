"Foreign checkpoints: only whole, safe and right ones become models; downloads survive what networks do."
import errno
import hashlib
import importlib.util
import json
import os
import pickle
import socket
import struct
import threading
import time
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import cape
from cape.errors import CheckpointError, ConfigError, MissingFileError, StorageError
from cape.models import official
from cape.models.official import (check_hash, download_official, fetch, hash_in_name, load_official, looks_like,
                                  official_checkpoints, official_loaders, official_tensors)
from cape.models.prototype import PrototypeBaseline, official_prefixes
from cape.progress import Lines


class Act:
    "Pickled as a call of `function(*args)`"
    def __init__(self, function, *args): self.what = function, args
    def __reduce__(self): return self.what


def legacy(data, path):
    "A `.pth` in PyTorch's old format, whose instructions are plain text"
    torch.save(data, path, _use_new_zipfile_serialization=False)
    return path


def sha(data): return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def baseline():
    "The prototype baseline's tensors under their official names"
    torch.manual_seed(0)
    back = {new: old for old, new in official_prefixes.items()}
    own = PrototypeBaseline("resnet50", base={0: 5}, official=True).state_dict()
    return {next(old + n[len(new):] for new, old in back.items() if n.startswith(new)): t for n, t in own.items()}


# what is in a file

@pytest.mark.parametrize("save", [torch.save, legacy])
@pytest.mark.parametrize("where", ["meta", "state_dict"])
@pytest.mark.parametrize("function", [os.mkdir, exec, eval])
def test_code_in_a_file_does_not_run(tmp_path, save, where, function):
    trace = tmp_path / "it_ran"
    args = (str(trace),) if function is os.mkdir else (f"__import__('os').mkdir({str(trace)!r})",)
    pickle.loads(pickle.dumps(Act(function, *args)))      # the payload works,
    trace.rmdir()
    save({"state_dict": {"a": torch.ones(1)}, "meta": {}} | {where: {"x": Act(function, *args)}}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"m\.pth: not read, for it calls for \S*(mkdir|exec|eval)") as e:
        load_official("prototype", tmp_path / "m.pth")    # and here it does not
    assert not trace.exists() and "weights_only" not in str(e.value)


@pytest.mark.parametrize("save", [torch.save, legacy])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
@pytest.mark.parametrize("note", [np.float64(.8), np.float32(.8), np.int64(3), np.bool_(True), np.array([1., 2.]),
                                  np.dtype("float32")])
def test_numpy_in_the_notes_is_read_over(tmp_path, save, module, note):
    data, path = {"meta": {"best": note}, "state_dict": {"a": torch.arange(3.)}}, tmp_path / "m.pth"
    save(data, path)
    if save is legacy:    # NumPy 1 and 2 name the module differently
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                         .replace(b"numpy.core.multiarray", module))
    with pytest.raises(pickle.UnpicklingError): torch.load(path, weights_only=True)
    assert official_tensors(path)["a"].tolist() == [0, 1, 2]
    with pytest.raises(pickle.UnpicklingError): torch.load(path, weights_only=True)   # nothing stays allowed


def test_the_names_allowed_are_not_numpys_own():
    assert all(c.__mro__[1] is official._Forgotten for c in official._ignored)
    assert "numpy.core.multiarray.scalar" in {f"{c.__module__}.{c.__name__}" for c in official._ignored}


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -100])
def test_truncated_file(tmp_path, cut):
    torch.save({"state_dict": {"a": torch.ones(1000)}}, tmp_path / "m.pth")
    (tmp_path / "m.pth").write_bytes((tmp_path / "m.pth").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"m\.pth: torn, or not a file of weights"):
        load_official("prototype", tmp_path / "m.pth")


@pytest.mark.parametrize("content,word", [(b"hello", "torn"), (b"\n<!DOCTYPE html><html>", "a web page"),
                                          (b"<html>", "a web page"), (b"", "torn")])
def test_not_a_file_of_weights(tmp_path, content, word):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"m\.pth: {word}"): load_official("prototype", tmp_path / "m.pth")


@pytest.mark.parametrize("data,word", [([1], "list"), (torch.ones(1), "Tensor"), ({}, "no tensors"), (3, "int"),
                                       ({"state_dict": [1]}, "list"), ({"epoch": 3}, "no tensors"),
                                       ({"state_dict": {}}, "no tensors")])
def test_not_tensors_by_name(tmp_path, data, word):
    torch.save(data, tmp_path / "m.pth")
    for source in (data, tmp_path / "m.pth"):
        with pytest.raises(CheckpointError, match=word): load_official("prototype", source)


def test_no_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.pth: no such file"):
        load_official("prototype", str(tmp_path / "none.pth"))
    with pytest.raises(MissingFileError, match="a folder; expected a file"): load_official("prototype", tmp_path)


@pytest.mark.parametrize("name", ["resnet", "capformer", "sdpnet", None, 3])
def test_unknown_method(name):
    with pytest.raises(ConfigError, match="Known: prototype, pomnet, capeformer, escape") as e: load_official(name, {})
    assert ("did you mean 'capeformer'?" in str(e.value)) == (name == "capformer")


def test_unknown_option(baseline):
    with pytest.raises(ConfigError, match="prototype has no option bass; its options: base"):
        load_official("prototype", baseline, bass={})


# names

def test_prefix_of_parallel_training():
    one = torch.ones(1)
    assert list(official_tensors({"module.a": one, "module.module.b": one})) == ["a", "module.b"]
    assert list(official_tensors({"module.a": one, "b": one})) == ["module.a", "b"]
    assert list(official_tensors(OrderedDict(state_dict={"module.a": one}, meta={}))) == ["a"]


def test_a_whole_baseline_comes_back(tmp_path, baseline):
    parallel = OrderedDict((f"module.{n}", t) for n, t in baseline.items())
    torch.save({"meta": {"best": np.float64(1)}, "state_dict": parallel, "optimizer": {"state": {}}}, tmp_path / "m")
    path = (tmp_path / "m").rename(tmp_path / f"b-{sha((tmp_path / 'm').read_bytes())[:8]}_20240101.pth")
    model = cape.load_official("prototype", path, base={7: 5})
    assert not model.training and model.base == {7: 5}
    assert torch.equal(model.table, baseline["keypoint_head.keypoints"])
    assert torch.equal(model.backbone.layer4[2].conv3.weight, baseline["backbone.layer4.2.conv3.weight"])


def test_every_tensor_is_accounted_for(tmp_path, baseline):
    name = "backbone.layer3.4.bn2.running_var"
    cases = {"unexpected.*spare": baseline | {"backbone.spare": torch.ones(1)},
             f"missing.*{name}": {n: t for n, t in baseline.items() if n != name},
             rf"wrong shape.*{name} \(3,\) instead of \(256,\)": baseline | {name: torch.ones(3)},
             "unexpected head.new": baseline | {"head.new": torch.ones(1)},
             "no keypoint_head.keypoints": {n: t for n, t in baseline.items() if "keypoint" not in n}}
    for message, state in cases.items():
        with pytest.raises(CheckpointError, match=message): load_official("prototype", state)
    torch.save(cases["unexpected head.new"], tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"m\.pth: .*head\.new"): load_official("prototype", tmp_path / "m.pth")


def described(folder, method):
    "Official names and shapes, and which tensors are doubles, as the official code was found to have them"
    name = "escape_baseline" if method == "prototype" else method
    found = next(folder.glob(f"golden/*/state_dict_{name}.json"), None)
    if found is None: pytest.skip(f"no list of {method}'s tensors")
    text = json.loads(found.read_text())
    return next(v for v in text.values() if isinstance(v, (dict, list)) and len(v) > 100)


def zeros(folder, method):
    "The official state dict of `method`, zeros under each name"
    listed = described(folder, method)
    pairs = listed.items() if isinstance(listed, dict) else ((e["name"], e) for e in listed)
    return {n: torch.zeros(tuple(e["shape"] if isinstance(e, dict) else e)) for n, e in pairs}


@pytest.mark.parametrize("method", ["prototype", "pomnet", "capeformer", "escape", "fmmp"])
def test_methods_are_told_apart(shared, method):
    state = zeros(shared, method)
    assert looks_like(state) == method
    for other in set(official._readable()) - {method}:
        with pytest.raises(CheckpointError, match=f"not weights of {other}; by their names they belong to {method}"):
            load_official(other, state)


def test_a_method_whose_module_is_not_there_is_not_known(monkeypatch, baseline):
    monkeypatch.setitem(official_loaders, "newcape", ("cape.models.newcape", "from_official_newcape"))
    assert set(official._readable()) == {n for n in official_loaders if n != "newcape"} - absent()
    with pytest.raises(ConfigError, match="no published weights of 'newcape' can be read"): load_official("newcape", {})
    monkeypatch.setattr(official, "official_signs", {"newcape": r"backbone\.new", **official.official_signs})
    with pytest.raises(CheckpointError, match="belong to newcape: they cannot be read here"):
        load_official("prototype", baseline | {"backbone.new": torch.ones(1)})


def absent(): return {n for n, (m, _) in official_loaders.items() if not importlib.util.find_spec(m)}


@pytest.mark.parametrize("method", sorted(official_loaders))
def test_real_names_and_shapes_load(shared, method, tmp_path):
    if method in absent(): pytest.skip(f"{method} is not there yet")
    state = zeros(shared, method)
    torch.save({"meta": {}, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "m.pth")
    model = load_official(method, tmp_path / "m.pth")
    assert model.name == method and not model.training
    assert not any(t.any() for t in model.state_dict().values())
    gone = sorted(n for n in state if not n.startswith("encoder_"))[0]
    with pytest.raises(CheckpointError, match="missing"):
        load_official(method, {n: t for n, t in state.items() if n != gone})
    with pytest.raises(CheckpointError, match="unexpected"): load_official(method, state | {"new": torch.ones(1)})
    with pytest.raises(CheckpointError, match="wrong shape"): load_official(method, state | {gone: torch.ones(1, 3)})


@pytest.mark.parametrize("kept", ["encoder_query.", "encoder_sample."])
def test_capeformers_backbone_under_one_name(shared, kept):
    other = {"encoder_query.": "encoder_sample.", "encoder_sample.": "encoder_query."}[kept]
    state = {n: t for n, t in zeros(shared, "capeformer").items() if not n.startswith(other)}
    state[kept + "conv1.weight"] += 1
    model = load_official("capeformer", state)
    assert (model.state_dict()["backbone.conv1.weight"] == 1).all()
    with pytest.raises(CheckpointError, match="different values"):
        load_official("capeformer", state | {other + "conv1.weight": torch.zeros(64, 3, 7, 7)})


def test_signs():
    decoder = "keypoint_head.transformer.decoder.layers.1."
    assert looks_like({decoder + "ffn1.weight": 0}) == "graphcape"
    assert looks_like({decoder + "linear1.weight": 0}) == "capeformer"
    assert looks_like({"keypoint_head.superkeypoints": 0}) == "escape"
    assert looks_like({"layer1.0.conv1.weight": 0, "fc.weight": 0}) == "a bare ResNet"
    assert looks_like({"something": 0}) is None
    with pytest.raises(CheckpointError, match="belong to a bare ResNet: they cannot be read here"):
        load_official("capeformer", {"layer1.0.conv1.weight": torch.ones(1)})


# hashes and the table

def test_hash_in_name(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "m")
    digits = sha((tmp_path / "m").read_bytes())
    for name in (f"m-{digits[:8]}_20230713.pth", f"m-{digits[:12]}_20230713.pt"):
        (tmp_path / name).write_bytes((tmp_path / "m").read_bytes())
        assert list(official_tensors(tmp_path / name)) == ["a"]
    wrong = (tmp_path / "m").rename(tmp_path / "m-00000000_20230713.pth")
    with pytest.raises(CheckpointError, match=f"begins with {digits[:8]}, not 00000000.*download it again"):
        load_official("prototype", wrong)
    assert hash_in_name("a-12345678.pth") is None and hash_in_name("a-1234567_20230713.pth") is None
    check_hash(wrong, digits.upper())


def test_table():
    entries = official_checkpoints()
    assert list(entries[0]) == ["method", "variant", "split", "shots", "pck", "file", "address", "sha256", "note"]
    scored = [e for e in entries if e["pck"]]
    assert len(scored) == 60 and len({(e["method"], e["variant"], e["split"], e["shots"]) for e in entries}) == 63
    for e in entries:
        if e["file"]: assert e["address"].endswith("/" + e["file"]) and "{" not in e["address"]
        assert e["sha256"] is None or f"-{e['sha256']}_" in e["file"]
    assert {e["method"] for e in entries if e["sha256"]} == {"capeformer"}
    of = {(e["method"], e["variant"], e["split"], e["shots"]): e for e in entries}
    assert of["capeformer", "", 1, 1]["file"] == "capeformer-split1-1shot-4c40dfd2_20230713.pth"
    assert of["escape", "", 3, 5]["file"] == "escape_split3.pth" and of["escape", "", 3, 5]["pck"] == 85.46
    assert of["prototype", "finetune", 2, 1]["file"] == "finetune_split2.pth"
    assert "validation" in of["capeformer", "", 2, 5]["note"] and "83.53" in of["capeformer", "", 4, 1]["note"]
    with pytest.raises(ConfigError, match="known: capeformer, prototype"): official_checkpoints("scape")
    entries[0]["pck"] = 0
    assert official_checkpoints()[0]["pck"] == 89.45


# downloads, all from this machine

BODY = np.random.default_rng(0).bytes(2_500_000)


class Handler(BaseHTTPRequestHandler):
    "Answers as the switches of its server say"
    def do_GET(self):
        s = self.server
        s.asked.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved", ""))
            return self.end_headers()
        if self.path != "/m.pth": return self.send_error(404)
        first = int(self.headers["Range"][6:-1]) if s.ranges and self.headers.get("Range") else 0
        if first >= len(BODY): return self.send_error(416)
        self.send_response(206 if first else 200)
        if first: self.send_header("Content-Range", f"bytes {first + s.shift}-{len(BODY) - 1}/{len(BODY)}")
        if s.length: self.send_header("Content-Length", str(len(BODY) - first))
        self.end_headers()
        self.wfile.write(BODY[first:first + s.cut if s.cut else None])
        if s.reset:
            time.sleep(.3)      # what was sent arrives; then the close is a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_): pass


@pytest.fixture
def server(monkeypatch):
    "A server of `BODY` with switches, and `asked`: paths and ranges of its requests"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.asked, s.ranges, s.cut, s.length, s.shift, s.reset = [], True, None, True, 0, False
    s.url = f"http://127.0.0.1:{s.server_port}"
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .01})
    thread.start()
    yield s
    s.shutdown()
    thread.join()
    s.server_close()


@pytest.fixture
def entry(monkeypatch, server):
    "A table of one checkpoint, on the server; change it to change the table"
    e = dict(method="capeformer", variant="", split=1, shots=1, pck=1., file="m.pth", address=f"{server.url}/m.pth",
             sha256=sha(BODY)[:8], note=None)
    monkeypatch.setattr(official, "official_checkpoints", lambda method=None: [e])
    return e


def left(folder): return sorted(p.name for p in folder.iterdir())


def test_download(server, entry, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPE_DATA", str(tmp_path))
    path = cape.download_official("capeformer", split=1, shots=1)
    assert path == tmp_path / "weights/m.pth" and path.read_bytes() == BODY
    assert server.asked == [("/m.pth", None)] and left(tmp_path / "weights") == ["m.pth"]
    assert download_official("capeformer") == path and len(server.asked) == 1          # no second request
    assert download_official("capeformer", folder=tmp_path / "other").read_bytes() == BODY
    path.write_bytes(BODY[:-1])
    with pytest.raises(CheckpointError, match="Delete it and download it again"): download_official("capeformer")
    assert path.exists()


@pytest.mark.parametrize("reset", [False, True])
def test_torn_and_resumed(server, entry, tmp_path, reset):
    server.cut, server.reset = 1_200_000, reset
    with pytest.raises(MissingFileError, match="broke.* call again, and it goes on"):
        download_official("capeformer", folder=tmp_path)
    assert left(tmp_path) == ["m.pth.part"]
    have = (tmp_path / "m.pth.part").stat().st_size
    assert 1_000_000 <= have <= 1_200_000 and (tmp_path / "m.pth.part").read_bytes() == BODY[:have]
    server.cut, server.reset = None, False
    assert download_official("capeformer", folder=tmp_path).read_bytes() == BODY
    assert server.asked == [("/m.pth", None), ("/m.pth", f"bytes={have}-")]             # the rest, and no more


def test_progress_counts_the_whole(server, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(official, "progress", lambda **kw: seen.append(Lines(**kw)) or seen[-1])
    (tmp_path / "m.pth.part").write_bytes(BODY[:2_000_000])
    fetch(f"{server.url}/m.pth", tmp_path / "m.pth")
    assert [(b.desc, b.initial, b.n, b.total, b.unit) for b in seen] == [("m.pth", 2, 3, 3, "MB")]


def test_server_without_ranges_starts_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "m.pth.part").write_bytes(b"x" * 1000)
    assert fetch(f"{server.url}/m.pth", tmp_path / "m.pth", sha(BODY)).read_bytes() == BODY
    assert server.asked == [("/m.pth", "bytes=1000-")]


@pytest.mark.parametrize("part,shift", [(BODY, 0), (BODY + b"more", 0), (BODY[:1000], 7)])
def test_part_that_cannot_be_gone_on_from(server, tmp_path, part, shift):
    (tmp_path / "m.pth.part").write_bytes(part)
    server.shift = shift
    assert fetch(f"{server.url}/m.pth", tmp_path / "m.pth", sha(BODY)[:8]).read_bytes() == BODY
    assert [r for _, r in server.asked] == [f"bytes={len(part)}-", None]


def test_without_a_length(server, tmp_path):
    server.length = False
    assert fetch(f"{server.url}/m.pth", tmp_path / "m.pth").read_bytes() == BODY


def test_redirect_keeps_the_range(server, tmp_path):
    (tmp_path / "m.pth.part").write_bytes(BODY[:1000])
    assert fetch(f"{server.url}/moved/m.pth", tmp_path / "m.pth", sha(BODY)).read_bytes() == BODY
    assert server.asked[-1] == ("/m.pth", "bytes=1000-")


def test_wrong_hash_is_not_kept(server, entry, tmp_path):
    entry["sha256"] = "0" * 8
    with pytest.raises(CheckpointError, match="not the published file; what came is not kept.*not 00000000"):
        download_official("capeformer", folder=tmp_path)
    assert left(tmp_path) == []
    with pytest.raises(CheckpointError):       # a hash in the name counts where none is given
        fetch(f"{server.url}/m.pth", tmp_path / "m-0000000a_20200101.pth")
    assert left(tmp_path) == []


def test_bad_part_is_found_by_its_hash(server, entry, tmp_path):
    (tmp_path / "m.pth.part").write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError): download_official("capeformer", folder=tmp_path)
    assert download_official("capeformer", folder=tmp_path).read_bytes() == BODY        # the next call is clean


def test_not_there(server, tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.pth: the server answers 404.*with a browser"):
        fetch(f"{server.url}/none.pth", tmp_path / "none.pth")
    assert left(tmp_path) == []


def test_connection_refused(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s: port = s.server_port
    with pytest.raises(MissingFileError, match="no answer .*refused.*Without a network"):
        fetch(f"http://127.0.0.1:{port}/m.pth", tmp_path / "m.pth")
    assert left(tmp_path) == []


def test_no_place_to_write(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written .*name another folder"):
        fetch(f"{server.url}/m.pth", tmp_path / "file/m.pth")

    def full(source, target): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"): fetch(f"{server.url}/m.pth", tmp_path / "m.pth")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_disk_full_while_bytes_come(server, tmp_path):
    (tmp_path / "m.pth.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device.*make room"):
        fetch(f"{server.url}/m.pth", tmp_path / "m.pth")


@pytest.mark.parametrize("ask,error,message", [
    (("pomnet",), MissingFileError, "no weights of pomnet to fetch: the authors published code"),
    (("sdpnet",), MissingFileError, "neither code nor weights"),
    (("capeformer", 6), ConfigError, "split 6.*published: splits 1, 2, 3, 4, 5; shots 1, 5; variants none"),
    (("capeformer", 1, 3), ConfigError, "3 shots"), (("capeformer", "1"), ConfigError, "split '1'"),
    (("prototype", 1, 1, "huge"), ConfigError, "variants baseline, finetune"),
    (("scape",), ConfigError, "known: capeformer")])
def test_requests_that_cannot_be_met(tmp_path, ask, error, message):
    with pytest.raises(error, match=message): download_official(*ask, folder=tmp_path)


@pytest.mark.parametrize("ask,name", [(("graphcape", 2, 5, "small"), "graphcape-small-split2-5shot.pth"),
                                      (("fmmp",), "fmmp-split1-1shot.pth")])
def test_files_for_browsers_only(tmp_path, ask, name, monkeypatch):
    monkeypatch.setattr(official, "urlopen", None)     # the net is not touched
    with pytest.raises(MissingFileError, match=rf"{name} is not there, and https://(drive|pan)\S+ gives it to a"):
        download_official(*ask, folder=tmp_path)
    (tmp_path / name).write_bytes(b"by hand")
    assert download_official(*ask, folder=tmp_path) == tmp_path / name
