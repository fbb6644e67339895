"""Backbones: shapes, names, weights from files, BatchNorm that stays frozen."""
import copy
import sys

import pytest
import torch

from cape.errors import CheckpointError, ConfigError, MissingFileError
from cape.models.backbones import FrozenBatchNorm2d, create_backbone, freeze_bn, load_weights, read_weights


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("out", [(4,), (16,), (8, 32), None])
def test_shapes_and_channels(name, out):
    net = create_backbone(name, out=out).eval()
    with torch.no_grad(): maps = net(torch.randn(2, 3, 64, 64))
    assert list(maps) == list(out or (4, 8, 16, 32)) == list(net.channels)
    assert {s: tuple(m.shape) for s, m in maps.items()} == {s: (2, net.channels[s], 64 // s, 64 // s) for s in maps}


@pytest.mark.parametrize("name", ["small", "resnet18", "mobilenet_v2"])
def test_an_image_does_not_depend_on_its_batch(name):
    net, images = create_backbone(name, out=(16,)).eval(), torch.randn(3, 3, 64, 64)
    with torch.no_grad(): assert torch.allclose(net(images)[16][1:2], net(images[1:2])[16], atol=1e-5)


def test_every_parameter_is_used():
    for out in ((4,), (8, 32), (32,)):
        net = create_backbone("small", out=out)
        sum(m.sum() for m in net(torch.randn(2, 3, 64, 64)).values()).backward()
        idle = {n.split(".")[0] + "." + n.split(".")[1] for n, p in net.named_parameters() if p.grad is None}
        assert idle <= {f"side.{i}" for i in range(4) if 4 * 2 ** i < min(out)}   # finer than what was asked for


def test_names_are_torchvisions():
    from torchvision import models
    theirs = {n for n in models.resnet50(weights=None).state_dict() if not n.startswith("fc")}
    assert set(create_backbone("resnet50").state_dict()) == theirs


def test_same_answer_as_torchvision():
    from torchvision import models
    whole = models.resnet18(weights=None).eval()
    net = create_backbone("resnet18", out=(32,)).eval()
    load_weights(net, whole.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): pooled = net(images)[32].mean((2, 3))
    with torch.no_grad(): assert torch.allclose(whole.fc(pooled), whole(images), atol=1e-4)


def test_frozen_batchnorm_survives_train_copy_and_state():
    net = freeze_bn(create_backbone("resnet18", out=(4,)))
    before = copy.deepcopy(net.state_dict())
    twin = copy.deepcopy(net).train()
    twin(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in twin.modules()) == 5


def test_a_file_of_weights_comes_back(tmp_path):
    from safetensors.torch import save_file
    net = create_backbone("small", out=(4,))
    net(torch.randn(4, 3, 32, 32))                                 # statistics that are not placeholders
    save_file({k: v.clone() for k, v in net.state_dict().items()}, str(tmp_path / "w.safetensors"))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        again = create_backbone("small", weights=tmp_path / file, out=(4,))
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
        assert not any(isinstance(m, FrozenBatchNorm2d) for m in again.modules())


def test_code_in_a_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth"): read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_errors_name_the_thing(tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match="nowhere.pth"): create_backbone("resnet18", weights="nowhere.pth")
    with pytest.raises(ConfigError, match=r"strides 4, 8, 16 and 32, not \[3\]"): create_backbone("small", out=(3,))
    with pytest.raises(ConfigError, match="no ImageNet"): create_backbone("small", weights="imagenet")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"): create_backbone("hrnet_w32")
    torch.save(create_backbone("resnet18").state_dict(), tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match="missing: layer3.2.conv1.weight|missing: layer1.2"):
        create_backbone("resnet34", weights=tmp_path / "r18.pth")


def test_no_network_gives_a_way_out(monkeypatch):
    import torch.hub
    def refuse(*args, **kw): raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(MissingFileError, match="local file"): create_backbone("resnet18", weights="imagenet")


def test_folded_mobilenet_stays_frozen(shared):
    path = shared / "backbone" / "mobilenet_v2_imagenet.safetensors"
    if not path.is_file(): pytest.skip("no MobileNetV2 weights beside the repository")
    net = create_backbone("mobilenet_v2", weights=path, out=(16,)).train()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): first, second = net(images)[16], net.eval()(images)[16]
    assert torch.equal(first, second) and first.abs().max() > .1
    assert next(net.parameters()).dtype == torch.float32
