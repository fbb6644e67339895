"""Assignment and matching network: against what the official code computed, against POT, and the laws they keep."""
import hashlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cape.data.crops import make_heatmaps
from cape.errors import ConfigError, DataError
from cape.layers.sinkhorn import (MatchingNetwork, hungarian, index_codes, limit_norm, matching_accuracy, matching_loss,
                                  mean_scores, official_names, raster_cells, simple_matching, sinkhorn)
from cape.models.backbones import create_backbone
from cape.models.base import rename_tensors
from cape.models.prototype import deconv_head, pool_features

here = Path(__file__).parent / "golden"
net_prefix = "keypoint_head.matching_network."


def close(ours, theirs, eps=1e-4): np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=eps, rtol=0)


def random_scores(batch=3, keypoints=6, supers=10, scale=2., seed=0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, keypoints, supers, generator=g), torch.rand(batch, keypoints, generator=g) > .3


# ---- what the official code computed

@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("escape_fill", here / "escape_fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(): return np.load(here / "escape_sinkhorn.npz")


@pytest.fixture(scope="module")
def golden(): return np.load(here / "escape_match.npz")


def official_shapes():
    "Official name -> shape of what belongs to the matching network but for its backbone and deconvolutions."
    numbers = {name: i for i, name in enumerate("self_x ff_x self_y ff_y cross_x last_x cross_y last_y".split())}

    def official(own):
        if own == "omega": return "keypoint_head.omega"
        own = re.sub(r"^embed_keypoints", "to_embedding1", own)
        own = re.sub(r"^embed_supers", "to_embedding2", own)
        part = re.match(r"layers\.(\d+)\.(\w+)\.(.+)", own)
        if part:
            net = "net." if part[3][0].isdigit() else ""
            own = f"GAT.layers.{part[1]}.{numbers[part[2]]}.{net}{part[3]}"
        return net_prefix + own
    return {official(n): tuple(t.shape) for n, t in MatchingNetwork(120).state_dict().items()}


def filled(fill, shapes): return {n: torch.from_numpy(np.array(fill.fill_tensor(n, s))) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def net(fill):
    net = MatchingNetwork(120).eval()
    net.load_state_dict(rename_tensors(filled(fill, official_shapes()), official_names))
    return net


@pytest.fixture(scope="module")
def extract(fill):
    "Keypoint features of named images at points (M,K,2), px of 256, by the network's own ResNet-50."
    parts = {"backbone.": create_backbone("resnet50", None, (32,)), "deconv.deconv_layers.": deconv_head(2048)}
    for name, part in parts.items():
        shapes = {net_prefix + name + n: tuple(t.shape) for n, t in part.state_dict().items()}
        part.load_state_dict({n[len(net_prefix + name):]: t for n, t in filled(fill, shapes).items()})
        part.eval()
    backbone, head = parts.values()

    @torch.no_grad()
    def run(tags, points, visible):
        images = torch.from_numpy(np.stack([fill.image(t) for t in tags]))
        maps, weight = make_heatmaps(points / 256, visible)
        return pool_features(head(backbone(images)[32]), maps), weight > 0
    return run


def test_names_and_shapes_are_those_of_the_released_files(golden):
    lines = "\n".join(sorted(f"{n} {s}" for n, s in official_shapes().items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == str(golden["names_sha256"])


def test_golden_rounds(small):
    scores, seen = torch.from_numpy(small["scores"]), torch.from_numpy(small["weight"][..., 0]) > 0
    rows = torch.cat([seen, torch.ones(2, 1, dtype=torch.bool)], 1)
    for rounds in (3, 50):
        for dustbin in (float(small["bin_score"]), -4.):   # the score of the dustbin does nothing
            ours = sinkhorn(scores, seen, rounds, dustbin=dustbin)
            close(ours[rows], small[f"logZ_{rounds}"][rows.numpy()], 2e-5)
            assert (ours[~rows] == -torch.inf).all()


def test_golden_codes_and_norm(small):
    close(index_codes(torch.tensor([0, 1, 63, 64, 1000, 4095])), small["sincos_1d_rows"], 1e-6)
    close(limit_norm(torch.from_numpy(small["normclamp_in"])), small["normclamp_out"], 1e-4)


@pytest.fixture(scope="module", params=["e1", "e5"])
def case(request, golden, net, extract):
    g = {k[3:]: golden[k] for k in golden.files if k.startswith(request.param)}
    points, visible = torch.from_numpy(g["points_px"]), torch.from_numpy(g["visible"]) > 0
    features, seen = extract([f"{request.param}/s{i}" for i in range(len(points))], points, visible)
    x, bias = net.keypoint_tokens(features, points / 256, seen)
    with torch.no_grad():
        out_x, out_y = x, net.super_tokens()
        for layer in net.layers: out_x, out_y = layer(out_x, out_y, bias)
        scores, any_seen = mean_scores(net(features, points / 256, seen)[None], seen[None])
    return dict(g=g, features=features, x=x, out_x=out_x, out_y=out_y, scores=scores, seen=any_seen)


def test_golden_tokens(case):
    g = case["g"]
    close(case["features"][0], g["match_keypoint_feature"])
    close(case["x"][0, :-1].detach(), g["match_gat_x_in"])
    close(case["out_x"][0, :-1], g["match_gat_x_out"])
    close(case["out_y"][0, ::10], g["match_gat_y_out"])
    close(case["out_y"].norm(dim=-1).amax(-1), g["match_gat_y_maxnorm"])


def test_golden_scores_and_assignment(case):
    g, seen = case["g"], case["seen"][0]
    close(case["scores"][0], g["match_scores"], 2e-4)
    log_shares = sinkhorn(case["scores"], case["seen"])[0]
    rows = torch.cat([seen, torch.ones(1, dtype=torch.bool)])
    close(log_shares[rows], g["match_logZ"][rows.numpy()], 2e-4)
    close(log_shares[:-1].exp(), g["match_assignment"])


def test_golden_prior(case, fill):
    means = torch.from_numpy(fill.fill_tensor("keypoint_head.superkeypoints", (120, 256)))
    prior = sinkhorn(case["scores"], case["seen"])[0, :-1].exp() @ means
    close(prior[case["seen"][0]], case["g"]["prior_prototypes"][case["seen"][0].numpy()])


def test_simple_matching_is_the_reference_of_the_paper(case, fill):
    means = torch.from_numpy(fill.fill_tensor("keypoint_head.superkeypoints", (120, 256)))
    ours = simple_matching(torch.from_numpy(case["g"]["mle_prototypes"])[None], means, case["seen"])
    assert ours[0].tolist() == case["g"]["map_ref_assignment"].tolist()


def test_golden_loss(golden, net, extract):
    points, seen, target = torch.zeros(2, 17, 2), torch.zeros(2, 17, dtype=torch.bool), torch.full((2, 17), -1)
    for i, (count, hidden) in enumerate(((9, [2]), (17, [0, 5, 16]))):
        points[i, :count] = torch.from_numpy(golden[f"loss_points_px_{i}"])
        target[i, :count] = torch.from_numpy(golden[f"loss_superkeypoint_index_{i}"])
        seen[i, :count] = True
        seen[i, hidden] = False
    features, seen = extract(["loss/0", "loss/1"], points, seen)
    with torch.no_grad(): log_shares = sinkhorn(net(features, points / 256, seen), seen)
    close(matching_loss(log_shares, target, seen), golden["loss_matching_loss"], 5e-5)
    close(matching_accuracy(log_shares[:, :-1], target, seen), golden["loss_acc_matching"], 1e-6)


def test_raster_cells_are_the_peaks_of_the_heatmaps():
    points = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(0)) * 1.04 - .02
    maps, _ = make_heatmaps(points, torch.ones(1, 200, dtype=torch.bool))
    assert torch.equal(raster_cells(points), maps.flatten(2).argmax(-1))


# ---- laws of the assignment

def test_rows_and_columns_sum_to_one():
    scores, seen = random_scores()
    share = sinkhorn(scores, seen, 200).exp()
    close(share.sum(1), torch.ones(3, 10), 1e-5)
    close(share[:, :-1].sum(-1), seen.float(), 1e-4)
    assert (share[:, :-1].sum(1) <= 1 + 1e-5).all() and (share >= 0).all()


@pytest.mark.parametrize("epsilon", [.2, 1., 3.])
def test_agrees_with_pot(epsilon):
    ot = pytest.importorskip("ot")
    scores, seen = random_scores(1)
    rows = scores[0, seen[0]].double().numpy()
    table = np.concatenate([rows, np.zeros((1, 10))])
    wanted = np.append(np.ones(len(rows)), 10. - len(rows))
    theirs = ot.sinkhorn(wanted, np.ones(10), -table, epsilon, method="sinkhorn_log", numItermax=5000, stopThr=1e-12)
    ours = sinkhorn(scores.double(), seen, 2000, epsilon)[0].exp()
    close(ours[torch.cat([seen[0], torch.tensor([True])])], theirs, 1e-7)


def test_small_epsilon_is_hungarian():
    scores, seen = random_scores(8, 5, 9, seed=4)
    hard, soft = hungarian(scores, seen), sinkhorn(scores.double(), seen, 3000, .02)[:, :-1].argmax(-1)
    assert torch.equal(hard[seen], soft[seen]) and (hard[~seen] == -1).all()


def test_order_of_keypoints_and_of_super_keypoints_means_nothing():
    scores, seen = random_scores()
    order, columns = torch.randperm(6), torch.randperm(10)
    share = sinkhorn(scores, seen).exp()
    close(sinkhorn(scores[:, order], seen[:, order]).exp()[:, :-1], share[:, :-1][:, order], 1e-6)
    close(sinkhorn(scores[..., columns], seen).exp(), share[..., columns], 1e-6)
    assert torch.equal(hungarian(scores[:, order], seen[:, order]), hungarian(scores, seen)[:, order])


def test_a_batch_is_its_images_and_padding_does_nothing():
    scores, seen = random_scores()
    whole = sinkhorn(scores, seen).exp()
    for i in range(3):
        close(sinkhorn(scores[i:i + 1], seen[i:i + 1]).exp(), whole[i:i + 1], 1e-6)
        own = seen[i].nonzero()[:, 0]
        close(sinkhorn(scores[i:i + 1, own], seen[i:i + 1, own]).exp()[0, :-1], whole[i, own], 1e-6)
        assert torch.equal(hungarian(scores[i:i + 1], seen[i:i + 1])[0], hungarian(scores, seen)[i])


@pytest.mark.parametrize("junk", [1e9, float("nan"), float("inf")])
def test_what_stands_in_hidden_rows_does_nothing(junk):
    scores, seen = random_scores()
    spoiled = torch.where(seen[..., None], scores, junk).requires_grad_()
    answer = sinkhorn(spoiled, seen)
    assert torch.equal(answer, sinkhorn(scores, seen))
    assert torch.equal(hungarian(spoiled, seen), hungarian(scores, seen))
    matching_loss(answer, torch.arange(6).expand(3, -1), seen).backward()
    assert torch.isfinite(spoiled.grad).all() and (spoiled.grad[~seen] == 0).all()


def test_nothing_visible():
    scores, seen = random_scores()
    scores, seen = scores.requires_grad_(), seen & False
    answer = sinkhorn(scores, seen)
    close(answer[:, -1].detach().exp(), torch.ones(3, 10), 1e-6)
    loss = matching_loss(answer, torch.full((3, 6), -1), seen)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and (scores.grad == 0).all()
    assert (hungarian(scores, seen) == -1).all()


def test_gradients_are_those_of_finite_differences():
    scores, seen = random_scores(2, 3, 5)
    scores = scores.double().requires_grad_()
    target = torch.tensor([[0, 1, 2], [4, 3, 2]])
    assert torch.autograd.gradcheck(lambda s: matching_loss(sinkhorn(s, seen, 8, .7), target, seen), scores)
    dustbin = torch.tensor(.3, dtype=torch.float64, requires_grad=True)
    matching_loss(sinkhorn(scores, seen, dustbin=dustbin), target, seen).backward()
    assert abs(dustbin.grad) < 1e-12


def test_as_many_keypoints_as_super_keypoints():
    scores, seen = torch.randn(1, 4, 4, requires_grad=True), torch.ones(1, 4)
    answer = sinkhorn(scores, seen, 200)
    close(answer.detach().exp().sum(-1)[0], [1, 1, 1, 1, 0], 1e-3)
    matching_loss(answer, torch.arange(4)[None], seen).backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("scale,epsilon", [(1e4, 1.), (1., 1e-3), (1e4, 1e-2)])
def test_large_scores_do_not_overflow(scale, epsilon):
    scores, seen = random_scores(scale=scale)
    scores.requires_grad_()
    answer = sinkhorn(scores, seen, 50, epsilon)
    matching_loss(answer, torch.arange(6).expand(3, -1), seen).backward()
    assert torch.isfinite(answer[:, :-1][seen]).all() and torch.isfinite(scores.grad).all()
    close(answer.detach().exp().sum(1), torch.ones(3, 10), 1e-2)


def test_half_precision_scores_are_summed_in_float32():
    scores, seen = random_scores()
    with torch.autocast("cpu", torch.bfloat16): inside = sinkhorn(scores.bfloat16(), seen)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sinkhorn(scores.bfloat16().float(), seen))


# ---- faults

def test_faults_are_named():
    scores, seen = random_scores(1)
    seen[0, 1] = True
    spoiled = scores.clone()
    spoiled[0, 1, 3] = torch.nan
    for method in (hungarian, sinkhorn):
        with pytest.raises(DataError, match=f"{method.__name__}.*image 0, keypoint 1"): method(spoiled, seen)
        with pytest.raises(DataError, match="6 visible keypoints for 5 super-keypoints"):
            method(scores[..., :5], torch.ones(1, 6))
        assert method(scores[..., :5], torch.arange(6)[None] < 5) is not None
        with pytest.raises(DataError, match=r"visible is \(1, 4\), expected \(1, 6\)"): method(scores, seen[:, :4])
    for epsilon in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="epsilon must be above 0"): sinkhorn(scores, seen, epsilon=epsilon)
    with pytest.raises(ConfigError, match="iterations must be at least 1, got 0"): sinkhorn(scores, seen, 0)
    for target in (-1, 10):
        with pytest.raises(DataError, match=f"super-keypoint {target}; expected 0..9"):
            matching_loss(sinkhorn(scores, seen), torch.full((1, 6), target), seen)
    with pytest.raises(ConfigError, match="raster or coordinates, got 'x'"): MatchingNetwork(5, codes="x")
    with pytest.raises(ConfigError, match="even and at least 4, got 7"): index_codes(torch.arange(3), 7)


# ---- the network

def tiny(**options):
    torch.manual_seed(0)
    return MatchingNetwork(9, 16, channels=12, layers=2, heads=2, width=8, hidden=32, **options).eval()


def inputs(seed=1):
    g = torch.Generator().manual_seed(seed)
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    return torch.randn(3, 5, 12, generator=g), torch.rand(3, 5, 2, generator=g), seen


@pytest.mark.parametrize("options", [{}, dict(slots=None), dict(slots=3), dict(codes="coordinates")])
def test_laws_of_the_network(options):
    net, (features, points, seen) = tiny(**options), inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        whole = net(features, points, seen)
        spoiled = net(*(torch.where(seen[..., None], t, torch.nan) for t in (features, points)), seen)
        longer = (torch.cat([t, t[:, :3]], 1) for t in (features, points))
        padded = net(*longer, torch.cat([seen, seen[:, :3] & False], 1))
        moved = net(features[:, order], points[:, order], seen[:, order])
        singles = torch.cat([net(features[i:i + 1], points[i:i + 1], seen[i:i + 1]) for i in range(3)])
    assert torch.isfinite(whole).all() and (whole[~seen] == 0).all() and whole[seen].std() > 0
    assert torch.equal(spoiled, whole)
    close(padded[:, :5], whole, 1e-5)
    close(moved, whole[:, order], 1e-5)
    close(singles, whole, 1e-5)


def test_the_crowd_is_the_padding():
    "A token for each of 20 slots, as the official code has it, gives what keypoints and one empty token give."
    net, (features, points, seen) = tiny(slots=20), inputs()
    pad = lambda t: torch.cat([t, t.new_zeros(3, 15, *t.shape[2:])], 1)
    wide, place, shown = pad(features * seen[..., None]), pad(points), pad(seen)
    with torch.no_grad():
        x, y = net.embed_keypoints(wide) + net.place_codes(place, shown), net.super_tokens()
        for layer in net.layers: x, y = layer(x, y, torch.zeros(3, 20))
        scores = x @ limit_norm(y).mT / 16 ** .5
        close(net(features, points, seen)[seen], scores[:, :5][seen], 1e-5)
        assert (tiny(slots=None)(features, points, seen) - net(features, points, seen)).abs().max() > 1e-3


def test_the_length_of_a_token_is_limited_without_a_gradient_through_it():
    tokens = torch.tensor([[[300., 400.], [3., 4.]]], requires_grad=True)
    limit_norm(tokens)[0, 0].sum().backward()
    close(tokens.grad[0], [[.2, .2], [0., 0.]], 1e-6)
    net, given = tiny(), inputs()
    with torch.no_grad():
        net.embed_supers[2].weight.mul_(1e4)
        huge = net(*given)
        net.embed_supers[2].weight.mul_(10)
        assert huge.abs().max() < 1e3 and (net(*given) - huge).abs().max() < .1 * huge.abs().max()
        assert limit_norm(torch.zeros(1, 2, 3)).abs().max() == 0


def test_somebody_is_looked_at_where_nothing_is_visible():
    see = {}
    with torch.no_grad(): tiny(slots=None)(*inputs(), see)
    for weights in see.values(): close(weights.sum(-1), torch.ones(weights.shape[:-1]), 1e-5)


def test_places_and_index_matter():
    net, (features, points, seen) = tiny(), inputs()
    with torch.no_grad():
        whole = net(features, points, seen)
        assert (net(features, points.flip(-1), seen) - whole)[seen].abs().max() > 1e-3
        assert (tiny(codes="coordinates")(features, points, seen) - whole)[seen].abs().max() > 1e-3


def test_attention_on_request():
    net, (features, points, seen) = tiny(), inputs()
    see = {}
    with torch.no_grad(): assert torch.equal(net(features, points, seen, see), net(features, points, seen))
    assert sorted(see) == sorted(f"layer{i}.{p}_{s}" for i in (0, 1) for p in ("self", "cross") for s in "xy")
    assert see["layer1.cross_y"].shape == (3, 2, 9, 6)
    for weights in see.values(): close(weights.sum(-1), torch.ones(weights.shape[:-1]), 1e-5)
    assert (see["layer0.self_x"][1, :, :, [1, 3]] == 0).all()


def test_every_parameter_is_trained_and_the_loss_falls():
    net, (features, points, seen) = tiny().train(), inputs()
    target, losses = torch.tensor([[0, 1, 2, 3, 4], [2, 0, 8, 0, 5], [0] * 5]), []
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(30):
        loss = matching_loss(sinkhorn(net(features, points, seen), seen, 20), target, seen)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        losses.append(loss.item())
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert losses[-1] < .5 * losses[0]


def test_bfloat16_is_near():
    net, (features, points, seen) = tiny(), inputs()
    with torch.no_grad():
        exact = net(features, points, seen)
        with torch.autocast("cpu", torch.bfloat16): near = net(features, points, seen)
    assert near.dtype == torch.float32 and (near - exact).abs().max() < .05 * exact.abs().max()
