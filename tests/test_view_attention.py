"Where methods look: one form for all of them, the right episode and shot, what the page gets, the explorer without a page."
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("anywidget")
from cape.data.episodes import EpisodeBatch  # noqa: E402
from cape.errors import ConfigError  # noqa: E402
from cape.models.base import CapeModel, Prediction, create_model, toy_batch  # noqa: E402
from cape.view import attention, explorer  # noqa: E402
from cape.view.attention import (Look, attention_figure, graph_figure, looks, note, points_figure, scene_of,  # noqa: E402
                                 stages_figure)
from cape.view.explorer import AttentionExplorer  # noqa: E402

SMALL = dict(options={"width": 16}, dim=16, heads=2)


class Stare(CapeModel):
    "Two heads: keypoint k looks at cell k of 4 x 4, and at the last cell"
    name = "stare"
    def encode(self, images, role="query"): return {"map": images[:, :1, :4, :4]}
    def adapt(self, support, keypoints, visible, links=None): return {"at": keypoints.mean(1)}
    def locate(self, prompt, query):
        (B, K, _), Q = prompt["at"].shape, query["map"].shape[1]
        first, last = torch.arange(K) % 16, torch.full((K,), 15)
        cells = torch.eye(16)[torch.stack([first, last])].expand(B, Q, 2, K, 16)
        points = prompt["at"][:, None].expand(B, Q, K, 2)
        return Prediction(points, points[..., 0] * 0, attention={"layer0.cross": cells} if self.look else {})


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {n: create_model(n, **SMALL) for n in ("capeformer", "graphcape", "pomnet", "sdpnet", "fmmp")}


@pytest.fixture
def batch(): return toy_batch(2, 2, 2, 5)


@pytest.fixture
def tool(posezoo_mini): return AttentionExplorer({"stare": Stare(), "protonet": create_model("protonet")}, posezoo_mini, size=64)


# one form

def same(a, b):
    assert list(a.looks) == list(b.looks)
    for name, look in a.looks.items():
        for mine, other in zip(look[2:5], b.looks[name][2:5]):
            if mine is not None: torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["capeformer", "graphcape", "pomnet", "sdpnet", "fmmp"])
def test_looks_of_one_episode_are_those_of_a_batch(networks, batch, name):
    def only(n, v): return v if n == "size" else v[1:, 1:] if n.startswith("query_") else v[1:]
    one = EpisodeBatch(**{f.name: only(f.name, getattr(batch, f.name)) for f in fields(batch)})
    same(looks(networks[name], batch, episode=1, query=1), looks(networks[name], one))


@pytest.mark.parametrize("name", ["capeformer", "graphcape", "pomnet", "sdpnet", "fmmp"])
def test_weights_are_shares(networks, batch, name):
    seen = looks(networks[name], batch)
    kinds = {look.kind for look in seen.looks.values()}
    assert kinds & {"map", "points"} and "pairs" in kinds
    for look in seen.looks.values():
        if look.name == "similarity" or look.kind == "stages": continue
        total = look.weight.flatten(2).sum(-1)
        assert (look.weight >= 0).all() and total.max() < 1 + 1e-4, look.name
        if not look.name.startswith("encoder") and not (name == "fmmp" and look.kind == "pairs"):
            torch.testing.assert_close(total[:, seen.known], torch.ones_like(total[:, seen.known]), rtol=0, atol=1e-4)


def test_samples_start_where_they_are_said_to(networks, batch):
    fmmp = looks(networks["fmmp"], batch, episode=1, shot=1)
    shown = batch.support_visible[1, 1]
    start = fmmp["support 1: places"].reference[:, 0]
    torch.testing.assert_close(start[shown], batch.support_keypoints[1, 1][shown])
    sdpnet = looks(networks["sdpnet"], batch, query=1)
    for i in range(3):
        torch.testing.assert_close(sdpnet[f"stage {i + 1}: places"].reference[:, 0], sdpnet["refinement"].places[i])


def test_a_failing_method_is_left_as_it_was(batch):
    class Broken(Stare):
        def locate(self, prompt, query): raise ConfigError("broken")
    model = Broken().train()
    with pytest.raises(ConfigError, match="broken"): looks(model, batch)
    assert model.training and not model.look


@pytest.mark.parametrize("name, said", [("protonet", "the method does not attend"), ("capeformer", "there is similarity, encoder 1")])
def test_unknown_layer_names_those_there_are(networks, batch, name, said):
    seen = looks(networks.get(name) or create_model(name), batch)
    assert "similarity" in seen.looks
    with pytest.raises(ConfigError, match=said): seen["decoder 7: image"]


def test_detr_encoder_has_no_rows_for_keypoints(batch):
    seen = looks(create_model("capeformer", encoder="detr", **SMALL), batch)
    assert not [n for n in seen.looks if n.startswith("encoder")] and "decoder 1: image" in seen.looks


# pictures

def scene(batch): return scene_of(batch, episode=0)


def test_figures_draw_what_there_is(networks, batch):
    found = {n: looks(m, batch) for n, m in networks.items()}
    k = int(batch.support_visible[0, 0].long().argmax())
    fig = attention_figure(scene(batch), {n: found[n] for n in ("capeformer", "pomnet")}, k)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[1:5] == ["encoder 1: image", "decoder 1: image", "decoder 2: image", "decoder 3: image"]
    assert len(stages_figure(scene(batch), found).axes) == 1 + 4          # all but POMNet answer in stages
    assert len(points_figure(scene(batch), found["fmmp"], k).axes) == 2 * 5
    assert len(graph_figure([scene(batch)], [found["sdpnet"]]).axes) == 2
    with pytest.raises(ConfigError, match="pomnet samples no places"): points_figure(scene(batch), found["pomnet"], k)
    with pytest.raises(ConfigError, match="none of these methods"): stages_figure(scene(batch), {"p": found["pomnet"]})
    with pytest.raises(ConfigError, match="nothing is called 'graph'"): graph_figure([scene(batch)], [found["fmmp"]])


def test_a_keypoint_that_the_support_does_not_show(networks):
    batch = toy_batch(1, 1, 1, 5, hidden=.6, seed=3)
    hidden = int((~batch.support_visible[0, 0]).long().argmax())
    assert not batch.support_visible[0, 0, hidden]
    seen = looks(Stare(), batch)
    with pytest.raises(ConfigError, match=f"keypoint {hidden} .* is not shown on the support"):
        attention_figure(scene_of(batch), {"stare": seen}, hidden)
    with pytest.raises(ConfigError, match="keypoint must be 0 to 4, got 5"): attention_figure(scene_of(batch), {"stare": seen}, 5)


def test_notes():
    points = Look("x", "points", torch.tensor([[[.75, .25]]]), torch.tensor([[[[.5, .5], [.5, .9]]]]), torch.tensor([[[.5, .5]]]))
    assert note(points, 0) == "samples 0.10 of the crop from their start"
    assert note(Look("similarity", "map", torch.tensor([[[[-3., 12.]]]])), 0) == "scores -3 to 12"


# the page

def test_the_page_gets_every_head_and_the_mean_first(networks, batch):
    look = looks(networks["capeformer"], batch)["decoder 1: image"]
    page = explorer._page_look(look, scene(batch))
    sent = np.frombuffer(page["cells"], np.uint8).reshape(3, 5, *page["size"]) / 255
    wanted = torch.cat([look.weight.mean(0, True), look.weight]).numpy()
    low, high = (f(wanted, (2, 3), keepdims=True) for f in (np.min, np.max))
    np.testing.assert_allclose(sent, (wanted - low) / (high - low), atol=1 / 254)
    assert len(page["notes"]) == 3 and len(page["notes"][0]) == 5


def test_the_page_gets_samples_where_they_are(networks, batch):
    look = looks(networks["fmmp"], batch)["query 2: places"]
    page = explorer._page_look(look, scene(batch))
    places = np.frombuffer(page["places"], np.float32).reshape(*look.weight.shape, 2)
    wanted = 100 * (look.places.numpy() + .5 / batch.size)
    np.testing.assert_allclose(places, wanted.clip(-100, 200), atol=.01)
    assert np.frombuffer(page["cells"], np.float32).reshape(look.weight.shape).max((0, 2)) == pytest.approx(1)


# the explorer

def test_an_episode_is_new_to_both_and_then_kept(tool):
    first, asked = tool.left, []
    tool.model("stare").register_forward_pre_hook(lambda *_: asked.append(1))
    tool.episode = 3
    assert tool.left["key"] == "0:3" and tool.right["key"] == "1:3" and tool.scene["names"] == tool.now.names and asked == [1]
    tool.episode = 0
    assert asked == [1] and tool.left == first
    tool.methods = [1, 1]
    assert [part["method"] for part in (tool.left, tool.right)] == ["protonet"] * 2 and tool.looks[0] == "similarity"


def test_a_kept_look_keeps_its_name_where_the_other_method_has_it(posezoo_mini, networks):
    tool = AttentionExplorer({n: networks[n] for n in ("capeformer", "graphcape", "pomnet")}, posezoo_mini, size=64,
                             looks=["encoder 1: image", ""])
    tool.methods = [1, 1]
    assert tool.looks[0] == "encoder 1: image"
    tool.methods = [2, 1]
    assert tool.looks[0] == "decoder 3: image"


def test_opening_loads_only_what_is_shown(posezoo_mini, tmp_path):
    models = {"a": Stare(), "b": Stare(), "c": tmp_path / "absent.safetensors"}
    tool = AttentionExplorer(models, posezoo_mini, size=64)
    assert len(tool.tests[64].source.kept) == 2                       # one support, one query
    tool.methods = [0, 2]
    assert "absent.safetensors: no such checkpoint file" in tool.status and tool.left["key"] == "0:0"
    tool.methods = [0, 1]
    assert tool.status == "" and tool.right["key"] == "1:0"


def test_a_picture_without_a_kernel_and_beside_the_widget(tool, monkeypatch):
    tool.heads = [2, 0]
    data, _ = tool._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/jpeg"} and len(data["image/jpeg"]) > 10_000
    assert tool.figure().axes[1].get_title() == "decoder 1: image, head 2"
    monkeypatch.setattr(explorer, "_has_kernel", lambda: True)
    assert "application/vnd.jupyter.widget-view+json" in tool._repr_mimebundle_()[0]


@pytest.mark.parametrize("options, said", [
    (dict(methods=["stare"]), "two of stare"), (dict(methods=["stare", "x"]), "two of stare, got stare, x"),
    (dict(episode=10_000), "episode must be 0 to"), (dict(looks=["decoder 2: image", ""]), "nothing is called 'decoder 2: image'"),
    (dict(looks=["decoder 1: image", ""], heads=[3, 0]), "head must be None or 0 to 1, got 2")])
def test_bad_input(posezoo_mini, options, said):
    with pytest.raises(ConfigError, match=said): AttentionExplorer({"stare": Stare()}, posezoo_mini, size=64, **options)


def test_a_method_without_anything_to_show(posezoo_mini, tool):
    with pytest.raises(ConfigError, match="copy has neither"): AttentionExplorer({"copy": create_model("copy")}, posezoo_mini)


def test_pictures_are_drawn_without_pyplot():
    for module in (attention, explorer): assert "pyplot" not in Path(module.__file__).read_text()
