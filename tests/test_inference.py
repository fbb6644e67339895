"Quick copies: the same answers for every method, the laws, what is refused, and what bfloat16 may move."
from importlib.resources import files

import pytest
import torch
from conftest import own_methods
from torch import nn

from cape.data.episodes import TestEpisodes
from cape.errors import ConfigError
from cape.estimator import default_model
from cape.models.base import check_contract, create_model, load_model, toy_batch
from cape.models.inference import convolutional_parts, fold_norms, quick


def stirred(name, **options):
    "A model whose BatchNorms do something."
    torch.manual_seed(0)
    made = create_model(name, **options).eval()
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, .1)
            m.running_var.uniform_(.5, 2)
            m.weight.data.uniform_(.5, 1.5)
    return made


def features(model, images):
    with torch.no_grad(): return {role: model.encode(images, role) for role in ("support", "query")}


METHODS = [n for n in own_methods() if n not in ("copy", "meanpose")]


@pytest.mark.parametrize("name", METHODS)
def test_features_are_the_same(name):
    made, images = stirred(name), toy_batch(2).query_images[:, 0]
    before = {n: t.clone() for n, t in made.state_dict().items()}
    copy = quick(made)
    assert convolutional_parts(made) and not copy.training
    assert sum(isinstance(m, nn.BatchNorm2d) for m in copy.modules()) < sum(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    for role, theirs in features(made, images).items():
        for n, ours in features(copy, images)[role].items():
            torch.testing.assert_close(ours, theirs[n], atol=1e-4 * float(theirs[n].abs().max()), rtol=1e-3)
    assert all(torch.equal(t, before[n]) for n, t in made.state_dict().items())          # the original is as it was
    for found in features(quick(made, bf16=True), images).values():
        assert all(f.dtype == torch.float32 and torch.isfinite(f).all() for f in found.values())


@pytest.mark.parametrize("name", ["protonet", "prototype", "escape", "capeformer"])
def test_laws_hold(name): check_contract(quick(stirred(name)))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2"])
def test_own_backbones_fold_whole(backbone):
    made, images = stirred("prototype", backbone=backbone), torch.randn(1, 3, 64, 64)
    copy = quick(made)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in copy.modules())
    with torch.no_grad(): ours, theirs = copy.encode(images)["map"], made.encode(images)["map"]
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_frozen_norms_fold_too():
    made = stirred("protonet", frozen_bn=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quick(made).modules())


def test_bf16_rounds_and_gives_float32():
    made, images = default_model(), toy_batch(2, size=96).query_images[:, 0]
    exact, half = features(made, images)["query"], features(quick(made, bf16=True), images)["query"]
    for n in exact:
        assert half[n].dtype == torch.float32
        gap = float((half[n] - exact[n]).abs().max() / exact[n].abs().max())
        assert 1e-6 < gap < .1                       # rounded, and not more than rounded


SHIPPED = sorted(f.stem for f in (files("cape") / "weights" / "posezoo").iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_all_products_in_bf16(name, posezoo_mini):
    "Trained networks answer alike, whole, also where they use the weights of a layer without calling it"
    made = load_model(f"posezoo/{name}").eval()
    batch = TestEpisodes(posezoo_mini, 1, 4, 1, size=made.meta["size"]).batch(range(6))
    with torch.no_grad(): exact, half = made(batch).keypoints, quick(made, bf16="all")(batch).keypoints
    gap = (half - exact).norm(dim=-1)[batch.query_visible]
    assert torch.isfinite(half).all() and gap.max() > 0
    assert gap.median() < .01, gap.median()


def test_escape_in_bf16():
    batch = toy_batch(2)
    with torch.no_grad(): assert torch.isfinite(quick(stirred("escape"), bf16="all")(batch).keypoints).all()


def test_float32_islands_keep_their_weights():
    "What a method does in float32 under autocast is not rounded, the rest is"
    copy = quick(stirred("sdpnet"), bf16="all")
    kinds = {n: m.weight.dtype for n, m in copy.named_modules() if isinstance(m, nn.Linear)}
    assert kinds["graph.ask"] == kinds["graph.offer"] == torch.float32 and kinds["refiner.point_head.0"] == torch.bfloat16
    head = quick(stirred("finetune"), bf16="all")
    assert all(m.weight.dtype == torch.float32 for m in head.modules() if isinstance(m, nn.Linear))


def test_ways_of_a_quick_escape_share_its_parts():
    copy, batch = quick(stirred("escape")), toy_batch(2)
    with torch.no_grad():
        for way in ("mle", "map", "escape"): assert torch.isfinite(copy.by(way)(batch).keypoints).all()


def test_controls_have_nothing_to_fold():
    assert convolutional_parts(create_model("copy")) == []
    batch = toy_batch(2)
    assert torch.equal(quick(create_model("copy"))(batch).keypoints, create_model("copy")(batch).keypoints)


class Crossed(nn.Module):
    "Its BatchNorm is listed behind the wrong convolution."
    channels = {4: 4}
    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.norm.running_mean += 1
    def forward(self, x): return {4: self.two(self.norm(self.one(x)))}


def test_parts_in_another_order_are_told():
    made = stirred("protonet")
    made.backbone = Crossed().eval()
    with pytest.raises(ConfigError, match="quick: protonet encodes differently .* order of use"): quick(made)


def test_a_norm_without_a_convolution_stays():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    assert [type(m).__name__ for m in fold_norms(net)] == ["BatchNorm2d", "Conv2d", "ReLU", "BatchNorm2d"]
