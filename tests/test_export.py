"ONNX graphs of every method: equal to torch for shapes they were not made with, whole or not there, and refused by name."
import json
import sys

import numpy as np
import pytest
import torch
from conftest import own_methods

from cape.data.crops import make_heatmaps
from cape.data.padding import pad
from cape.errors import CapeError, ConfigError, MissingFileError, StorageError
from cape.layers.graph import adjacency, bfs_batch
from cape.models.base import _awkward, create_model, save_model, toy_batch
from cape.models.sdpnet import DynamicConvolution

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from cape import export
from cape.export import OnnxModel, export_onnx, pad_links

NARROW = dict(layers=1, dim=32, heads=4, hidden=32)
TINY = {"capeformer": NARROW, "graphcape": NARROW, "pomnet": dict(layers=1, dim=32), "sdpnet": dict(NARROW, graph_layers=1),
        "fmmp": dict(layers=1, dim=32, slots=10, branches=3), "escape": dict(iterations=3, supers=20),
        "padded": dict(model="graphcape", slots=12, options=NARROW)}
GRADIENTS = ("finetune", "maml")


def tiny(name, **more):
    "A small network, moved from its start: behind last layers of zeros nothing could be seen."
    torch.manual_seed(0)
    model = create_model(name, **{**TINY.get(name, {}), **more}).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05 * torch.randn_like(p))
    return model


def fitted(data): return create_model("meanpose").fit(data)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "GraphCape, whose graph takes all that a person can say, and its export."
    model = tiny("graphcape")
    return model, export_onnx(model, tmp_path_factory.mktemp("export") / "graphcape", 64)


def gap(model, graphs, batch):
    with torch.no_grad(): own = model(batch)
    found = graphs(batch)
    assert all(np.isfinite(f).all() for f in found)
    return max(float(np.abs(a.numpy() - b).max()) for a, b in zip((own.keypoints, own.confidence), found))


# parts without lists, against those with lists; no graph is made

@pytest.mark.parametrize("seed", range(5))
def test_links_as_a_tensor(seed):
    g = torch.Generator().manual_seed(seed)
    links = [torch.randint(0, 9, (e, 2), generator=g) for e in (12, 5, 0)] + [None]
    seen = torch.rand(4, 9, generator=g) > .2
    assert torch.equal(export._linked(pad_links(links, 4, 20), seen), adjacency(links, seen))
    for count in (1, 4, 9): assert torch.equal(export._nearest(pad_links(links, 4), seen, count), bfs_batch(links, seen, count))


@pytest.mark.parametrize("kind,paper,slots", [("uniform", False, 20), ("uniform", True, 20), ("zero", False, 12),
                                              ("uniform", True, 8), ("uniform", False, 1)])
def test_padding_without_lists(kind, paper, slots):
    g = torch.Generator().manual_seed(slots)
    points, seen = torch.rand(3, 2, 9, 2, generator=g), torch.rand(3, 2, 9, generator=g) > .3
    links = [torch.stack([torch.randperm(6, generator=g)[:2] for _ in range(e)]) for e in (4, 2)] + [None]
    want, got = pad(kind, points, seen, links, None, slots, paper), None
    loose = pad_links(links, 3, 7).roll(2, 1)                   # rows of -1 first: they may stand anywhere
    got = export._filled(kind, points, seen, loose, None, slots, paper)
    assert torch.allclose(got.points, want.points, atol=1e-6)
    for name in ("visible", "real", "used"): assert torch.equal(getattr(got, name), getattr(want, name)), name
    bare = lambda links: [e[e[:, 0] >= 0].tolist() for e in links]
    assert bare(got.shared) == [e.tolist() for e in want.shared]
    assert bare(got.links[0][0]) == [e.tolist() for images in want.links for e in images]


def test_targets_and_filters_are_the_same():
    g = torch.Generator().manual_seed(0)
    points = torch.rand(2, 3, 40, 2, generator=g) * 1.6 - .3    # many lie outside, or on the border
    seen = torch.rand(2, 3, 40, generator=g) > .3
    for ours, theirs in zip(export._gaussians(points, seen), make_heatmaps(points, seen)):
        assert torch.allclose(ours, theirs, atol=1e-6)
    layer = DynamicConvolution(8, 5).eval()
    maps, kernels = torch.randn(2, 3, 8, 6, 7, generator=g), torch.randn(2, 8, 5, 5, generator=g)
    with torch.no_grad(): assert torch.allclose(export._filter(layer, maps, kernels), layer(maps, kernels), atol=1e-5)
    t = torch.randn(2, 3, 4, generator=g)
    for dim in (0, 1): assert torch.equal(export._repeat(t, 5, dim), t.repeat_interleave(5, dim))


def test_nothing_stays_replaced():
    before = [getattr(where, name) for where, name, _ in export._replaced]
    with pytest.raises(KeyError), export._traceable(): raise KeyError
    assert [getattr(where, name) for where, name, _ in export._replaced] == before
    assert not any(hasattr(m, "len") for n, m in sys.modules.items() if n.startswith("cape."))


# graphs

OWN = own_methods()


def test_every_method_has_a_case_or_a_reason():
    "A method that joins the library must be tried here."
    assert set(OWN) <= {*TINY, *GRADIENTS, "copy", "meanpose", "protonet", "prototype"}


def test_the_smallest_export_is_equal_for_other_shapes(exported):
    model, folder = exported
    graphs = OnnxModel(folder, threads=1)
    for B, N, Q, K in ((1, 1, 1, 1), (4, 1, 3, 2), (1, 3, 2, 20)):
        assert gap(model, graphs, toy_batch(B, N, Q, K, 64, seed=3)) < 1e-4
    for case, batch in _awkward(toy_batch(2, 2, 2, 5, 64)).items(): assert gap(model, graphs, batch) < 1e-4, case
    card = json.loads((folder / "cape.json").read_text())
    assert card["inputs"]["keypoints"] == ["B", "N", "K", 2] and card["inputs"]["links"] == ["B", "E", 2]
    assert set(card["differences"]) == {"points", "confidence"} and max(card["differences"].values()) < 1e-4
    assert card["graphs"] == dict(support="encode.onnx", query="encode.onnx", answer="adapt_locate.onnx")


def test_links_count_and_their_filler_does_not(exported):
    model, folder = exported
    graphs, batch = OnnxModel(folder, 1), toy_batch(2, 1, 1, 6, 64)
    given = {**graphs.encode(batch.support_images, "support"), **graphs.encode(batch.query_images, "query")}
    ask = lambda links: graphs.answer({**given, **export._labels(batch), "links": links})[0]
    chain = pad_links(batch.links, 2).numpy()
    longer = np.concatenate([np.full((2, 3, 2), -1), chain, np.full((2, 4, 2), -1)], 1)
    assert np.abs(ask(chain) - ask(longer)).max() < 1e-6 < np.abs(ask(chain) - ask(np.full((2, 1, 2), -1))).max()


@pytest.mark.parametrize("name", [n for n in OWN if n not in (*GRADIENTS, "meanpose", "graphcape")])
def test_every_method(name, tmp_path):
    model = tiny(name)
    graphs = OnnxModel(export_onnx(model, tmp_path / name, 64), threads=1)
    most = graphs.card["most_keypoints"] or 40
    assert most >= TINY.get(name, {}).get("supers", 40)
    with torch.no_grad(): spread = model(toy_batch(2, 1, 1, 5, 64)).keypoints.std()
    assert spread > .01                                         # an answer that is always the same proves nothing
    for B, N, Q, K in ((1, 1, 1, 1), (4, 1, 3, 2), (1, 3, 2, min(most, 30))):
        assert gap(model, graphs, toy_batch(B, N, Q, K, 64, seed=3)) < 1e-4
    for case, batch in _awkward(toy_batch(2, 2, 2, 5, 64)).items(): assert gap(model, graphs, batch) < 1e-4, case


@pytest.mark.slow
@pytest.mark.parametrize("name,options", [("fmmp", dict(identifier="order", padding="none")), ("fmmp", dict(form="paper")),
                                          ("padded", dict(test="zero")), ("padded", dict(paper=True)),
                                          ("escape", dict(method="mle")), ("escape", dict(average="shares")),
                                          ("pomnet", dict(head="dot", loss="ce", shots_mask="any")),
                                          ("capeformer", dict(stages="one", identifier="shuffled", encoder="detr")),
                                          ("graphcape", dict(backbone="resnet18", graph_decoder="both", norm="symmetric")),
                                          ("prototype", dict(official=True)), ("sdpnet", dict(image="hr", graph="concat"))])
def test_options(name, options, tmp_path):
    model = tiny(name, **options)
    assert gap(model, OnnxModel(export_onnx(model, tmp_path / name, 64)), toy_batch(2, 3, 2, 7, 64, seed=4)) < 1e-4


def test_controls(tmp_path, posezoo_mini):
    model = fitted(posezoo_mini)
    graphs = OnnxModel(export_onnx(model, tmp_path / "mean", 64))
    batch = export._toy(model, 3, 1, 9, 2, 64, seed=5)
    assert gap(model, graphs, batch) < 1e-6 and graphs.card["graphs"] == {"answer": "adapt_locate.onnx"}
    assert set(graphs.card["inputs"]) == {"keypoints", "category", "query_index"}
    with pytest.raises(ConfigError, match="fit"): export_onnx(create_model("meanpose"), tmp_path / "not", 64)


# what is refused, and what stays

@pytest.mark.parametrize("name", GRADIENTS)
def test_inner_gradients_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=f"{name} adapts by gradient steps"): export_onnx(create_model(name), tmp_path / "x", 64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model,said", [(lambda: create_model("escape", method="map"), "Hungarian"),
                                        (lambda: create_model("padded", model="protonet", test="mixup"), "numpy"),
                                        (lambda: create_model("padded", model="maml"), "gradient"),
                                        (lambda: torch.nn.Linear(2, 2), "expected a CapeModel"),
                                        (lambda: create_model("sdpnet"), "multiples of 32")])
def test_what_cannot_be_exported_says_why(model, said, tmp_path):
    with pytest.raises(CapeError, match=said): export_onnx(model(), tmp_path / "x", 50)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name}: pip install 'cape\[onnx\]'"): export_onnx(tiny("copy"), tmp_path / "x", 64)


def test_training_mode_half_precision_and_files(tmp_path):
    "What is written is a float32 copy in eval mode; the model itself stays as it is."
    model = tiny("copy").train()
    export_onnx(model, tmp_path / "copy", 64)
    assert model.training
    ready, size = export._prepared(tiny("protonet").train().bfloat16(), 64)
    assert not ready.training and {p.dtype for p in ready.parameters()} == {torch.float32} and size == 64
    path = save_model(tiny("protonet"), tmp_path / "m.safetensors", size=96)
    assert export._prepared(path, None)[1] == 96
    with pytest.raises(MissingFileError): export_onnx(tmp_path / "none.safetensors", tmp_path / "x")


def test_other_things_are_not_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(StorageError, match="something else"): export_onnx(tiny("copy"), tmp_path / name, 64)
    assert (tmp_path / "full/thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    with pytest.raises(StorageError, match="cannot be written"): export_onnx(tiny("copy"), tmp_path / "file/below", 64)
    with pytest.raises(MissingFileError, match="no export"): OnnxModel(tmp_path / "full")


def test_a_failed_check_leaves_the_earlier_export(tmp_path, monkeypatch):
    folder = export_onnx(tiny("copy"), tmp_path / "copy", 64)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    answer = OnnxModel.answer
    monkeypatch.setattr(OnnxModel, "answer", lambda *a: [v + np.float32(.01) for v in answer(*a)])
    with pytest.raises(CapeError, match=r"copy: with B, N, K, Q = 1, 1, 1, 1 .* differ from torch by 0.01 crop units"):
        export_onnx(tiny("copy"), folder, 64)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["copy"]
    monkeypatch.undo()
    export_onnx(tiny("copy"), folder, 32)
    assert json.loads((folder / "cape.json").read_text())["size"] == 32 and [p.name for p in tmp_path.iterdir()] == ["copy"]
