"""The contract: laws that break when they should, checkpoints, names, decoding."""
import json
import os

import pytest
import torch
from torch import nn

from cape.errors import CapeError, CheckpointError, ConfigError, StorageError
from cape.models.base import (CapeModel, Prediction, check_contract, create_model, decode_quarter, decode_soft,
                              list_models, load_model, peaks, read_card, register_model, save_model, toy_batch)
from cape.models.controls import Copy, mean_pose


class Place(CapeModel):
    "Answers the support's first pose, changed by `twist`."
    def __init__(self, twist="none"):
        super().__init__()
        self.twist, self.linear = twist, nn.Linear(2, 2)
    def encode(self, images, role="query"): return {"mean": images.mean((1, 2, 3))}
    def adapt(self, support, keypoints, visible, links=None):
        points = mean_pose(keypoints, visible)[0]
        if self.twist == "padding": points = points + .1 * points.mean(1, keepdim=True)
        if self.twist == "order": points = points + .01 * torch.arange(points.shape[1])[:, None]
        if self.twist == "batch": points = points - points.mean(0)
        seen = visible.any(1)[..., None].float()
        if self.twist == "nan": points = points * (seen / seen)
        if self.twist == "links": points = points + torch.stack([l.float().mean() for l in links])[:, None, None]
        return {"points": points}
    def locate(self, prompt, query):
        points = prompt["points"][:, None].expand(-1, query["mean"].shape[1], -1, -1)
        if self.twist == "query": points = points + query["mean"].mean(1)[:, None, None, None]
        confidence = torch.ones(points.shape[:-1]) * (2 if self.twist == "sure" else 1)
        return Prediction(points, confidence)


@pytest.mark.parametrize("twist,law", [("padding", "padding"), ("order", "permutation"), ("batch", "batch"),
                                       ("query", "query"), ("nan", "nothing visible"), ("links", "no links"), ("sure", "single keypoint")])
def test_every_law_can_break(twist, law):
    check_contract(Place())
    with pytest.raises(CapeError, match=law): check_contract(Place(twist))


def test_a_model_that_uses_the_order_need_not_be_equivariant():
    model = Place("order")
    model.equivariant = False
    assert "permutation" not in check_contract(model)


def test_check_leaves_the_mode_alone():
    model = Place().train()
    check_contract(model)
    assert model.training


def test_known_names_and_wrong_ones():
    assert list_models()[:2] == ["copy", "meanpose"] and {"protonet", "prototype"} <= set(list_models())
    assert isinstance(create_model("copy"), Copy)
    with pytest.raises(ConfigError, match="did you mean 'protonet'"): create_model("protonett")
    with pytest.raises(ConfigError, match="no option stripe"): create_model("protonet", stripe=16)


@register_model("test-tiny")
class Tiny(Place):
    def __init__(self, width: int = 3, names: tuple = ("a", "b"), **more):
        super().__init__()
        self.layer, self.tied = nn.Linear(width, 2), nn.BatchNorm2d(width)
        self.again = self.layer                                    # shared memory: safetensors refuses it as it is


def test_config_is_plain_json():
    config = Tiny(4, more=1).config
    assert config == json.loads(json.dumps(config)) == {"width": 4, "names": ["a", "b"], "more": 1}


def test_checkpoint_round_trip(tmp_path):
    from cape.models.backbones import FrozenBatchNorm2d, freeze_bn
    model = freeze_bn(Tiny(5))
    again = load_model(save_model(model, tmp_path / "deep" / "m.safetensors", score=.5))
    assert again.config == model.config and again.meta == {"score": .5} and not again.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert isinstance(again.tied, FrozenBatchNorm2d)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["m.safetensors"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_model(Tiny(), tmp_path / "m.safetensors", step=1)
    def torn(file): raise OSError("disk full")
    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(StorageError, match="m.safetensors: cannot be written: disk full; the file of before is intact"): save_model(Tiny(), path, step=2)
    assert read_card(path)["meta"] == {"step": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 5, 100, -8])
def test_torn_files(tmp_path, keep):
    path = save_model(Tiny(), tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="m.safetensors"): load_model(path)


def test_foreign_and_mismatched_files(tmp_path):
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(CheckpointError, match="names no model"): load_model(tmp_path / "other.safetensors")
    state = {k: v.clone() for k, v in Tiny(3).state_dict().items() if k != "layer.bias"} | {"extra": torch.zeros(1)}
    card = dict(name="test-tiny", config={"width": 4}, version="0", meta={})
    save_file(state, str(tmp_path / "bad.safetensors"), metadata={"cape": json.dumps(card)})
    said = r"missing: layer.bias.*unexpected: extra.*wrong shape: .*\(2, 3\) instead of \(2, 4\)"
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path / "bad.safetensors")
    save_file(state, str(tmp_path / "bad.safetensors"), metadata={"cape": json.dumps({**card, "name": "test-tinny"})})
    with pytest.raises(CheckpointError, match="test-tinny"): load_model(tmp_path / "bad.safetensors")


def test_decoders():
    maps = torch.rand(2, 3, 9, 13)
    value, cell = peaks(maps)
    assert torch.equal(value, maps.amax((-2, -1)))
    assert torch.equal(maps.flatten(2).argmax(-1), cell[..., 1] * 13 + cell[..., 0])
    assert ((decode_quarter(maps) * torch.tensor([13, 9]) - cell).abs() <= .2501).all()
    point, mass = decode_soft(maps * 200, radius=2)
    assert ((point * torch.tensor([13, 9]) - cell).abs() <= 2).all() and (mass > 0).all() and (mass <= 1).all()
    corner = torch.full((1, 6, 6), -50.)
    corner[0, 5, 0] = 50
    assert torch.allclose(decode_soft(corner)[0], torch.tensor([[0., 5 / 6]]))


def test_toy_batch_is_pure_and_has_no_support_when_asked():
    assert torch.equal(toy_batch(seed=3).query_images, toy_batch(seed=3).query_images)
    assert not torch.equal(toy_batch(seed=3).query_images, toy_batch(seed=4).query_images)
    assert toy_batch(shots=0).shots == 0
