"""SDPNet: what its specification promises, the laws of the contract for every switch, and what bad input does."""
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cape.errors import CapeError, ConfigError, DataError
from cape.layers.attention import Identifier
from cape.layers.structure import (GraphBlock, PoseReconstruction, SupportGraph, SupportTokens, draw_masks, graph_figures,
                                   penalty, reconstruction_loss, weighted_shots)
from cape.models.base import (_each_slot, _hide, _one_episode, _one_query, _pad_slots, _permute_slots, check_contract,
                              create_model, load_model, save_model, toy_batch)
from cape.models.sdpnet import DynamicConvolution, ModulatedAttention, OffsetScale, usable_supports

tables = [dict(aggregation="mean"), dict(aggregation="quality"),                                          # Table 1
          dict(image="lr"), dict(image="hr"),                                                             # Table 2
          dict(gcn="none"), dict(graph="global"), dict(graph="concat"), dict(sparsity="none"),            # Table 3
          dict(gcn="shared"), dict(gcn="static"),
          dict(deformable="plain"), dict(deformable="support"), dict(deformable="offset")]                # Table 4
own = [{}, dict(identifier="none"), dict(identifier="shuffled"), dict(identifier="learned"), dict(order=False), dict(fine=0),
       dict(fuse="all"), dict(sparsity="offdiag"), dict(sparsity="paper"), dict(pose_weight=0), dict(reconstruct="masked"),
       dict(decouple_self=True), dict(support_valid="all"), dict(loss="mse"), dict(backbone="resnet18", rounds=1),
       dict(backbone="resnet18", fine=4, image="hr", rounds=1), dict(identifier="none", graph="concat", aggregation="quality")]
switches = tables + own
tiny = dict(dim=32, heads=4, hidden=64, encoder_layers=1, layers=2)
pytestmark = pytest.mark.filterwarnings("ignore:sdpnet. sparsity='paper'")


def small(**options):
    "A small model whose answers differ: at the published start every stage answers with the proposal."
    torch.manual_seed(0)
    model = create_model("sdpnet", **{**tiny, **options})
    model.proposer.query_proj.weight.data *= 8
    for step in model.refiner.steps: nn.init.normal_(step[-1].weight, std=.3)
    for stage in model.refiner.stages:
        if stage.scale is not None: nn.init.normal_(stage.scale.mlp[-1].weight, std=1.)
    return model


def answers(model, batch):
    with torch.no_grad(): return model.eval()(batch).keypoints


def prompt_of(model, batch):
    with torch.no_grad():
        return model.eval().adapt(model.encode_all(batch.support_images), batch.support_keypoints, batch.support_visible)


def points_of(number=5, shots=2):
    "Episodes without images: points and flags."
    torch.manual_seed(number)
    return torch.rand(2, shots, number, 2), torch.ones(2, shots, number, dtype=torch.bool)


# ---- every switch --------------------------------------------------------------------------------

@pytest.mark.parametrize("options", switches, ids=str)
def test_contract(options):
    model = small(**options)
    assert model.equivariant == (options.get("identifier") == "none")
    check_contract(model)


@pytest.mark.parametrize("options", switches, ids=str)
def test_every_parameter_is_trained(options):
    model = small(**options).train()
    terms = model.training_step(toy_batch(3, 2, 2))
    assert all(torch.isfinite(t) and t.ndim == 0 for t in terms.values())
    sum(terms.values()).backward()
    wanted = ["heatmap", "proposal", "stage1", "stage2"]
    if options.get("gcn") != "none":
        wanted += ["pose"] * (options.get("pose_weight") != 0) + ["sparsity"] * (options.get("sparsity") != "none")
        assert 1 <= model.watched["neighbours"] <= 5 and 0 < model.watched["diagonal"] < 1
    assert list(terms) == wanted and model.watched["skipped"] == 0
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in idle if not n.startswith("backbone.side.0")] == []     # stride 4, not asked for with fine=0


def test_equivariance_ends_where_slots_are_known_by_number():
    for options, free in (({}, True), (dict(graph="global"), False), (dict(gcn="static"), False)):
        model = small(identifier="none", **options)
        assert model.equivariant == free
        check_contract(model)


@pytest.mark.parametrize("options,said", [
    (dict(aggregation="max"), "aggregation must be one of"), (dict(image="fine"), "image must be one of"),
    (dict(gcn="fixed"), "gcn must be one of"), (dict(graph="mlp"), "graph must be one of"),
    (dict(deformable="unique"), "deformable must be one of"), (dict(sparsity="l1"), "sparsity must be one of"),
    (dict(reconstruct="half"), "reconstruct must be one of"), (dict(fuse="sum"), "fuse must be one of"),
    (dict(support_valid="most"), "support_valid must be one of"), (dict(loss="l1"), "loss must be one of"),
    (dict(identifier="name"), "identifier must be one of"), (dict(dim=30), "multiple of 4"),
    (dict(heads=5), "multiple of 4 and of heads"),
    (dict(layers=0), "must be at least 1, got 0"), (dict(graph_layers=0), "must be at least 1, got 0"),
    (dict(rounds=0), "needs a round"),
    (dict(fine=0, image="hr"), "needs a fine map"), (dict(mask_ratio=1.), "mask_ratio must lie in"), (dict(fine=3), "strides"),
    (dict(graph_heads=3), "cannot be shared by 3 heads"), (dict(skeleton=1), "no option skeleton")], ids=str)
def test_wrong_options(options, said):
    with pytest.raises(ConfigError, match=said): create_model("sdpnet", **{**tiny, **options})


# ---- what the specification calls done -----------------------------------------------------------

def test_1_padding_changes_nothing():
    model, batch = small(), toy_batch(3, 2, 2)
    assert (answers(model, _pad_slots(batch, 60))[..., :5, :] - answers(model, batch)).abs().max() < 1e-5


@pytest.mark.parametrize("kind,same", [("none", True), ("fixed", False), ("learned", False), ("shuffled", False)])
def test_2_order_of_keypoints_counts_by_identifiers_alone(kind, same):
    model, batch, order = small(identifier=kind), toy_batch(shots=2, hidden=0.), torch.tensor([3, 0, 4, 1, 2])
    gap = (answers(model, _permute_slots(batch, order)) - answers(model, batch)[..., order, :]).abs().max()
    assert (gap < 1e-5) == same


@pytest.mark.parametrize("order", [True, False])
def test_3_order_of_shots_counts_by_their_codes_alone(order):
    model, batch = small(order=order), toy_batch(3, 3, 2)
    turned = replace(batch, **{n: getattr(batch, n).flip(1) for n in ("support_images", "support_keypoints", "support_visible")})
    gap = (answers(model, turned) - answers(model, batch)).abs().max()
    assert (gap > 1e-5) == order


@pytest.mark.parametrize("kind", SupportGraph.kinds)
def test_4_rows_of_the_graph(kind):
    model, batch = small(graph=kind), _pad_slots(toy_batch(4, 1, hidden=.3), 2)
    prompt = prompt_of(model, batch)
    graph, valid = prompt["graph"], batch.support_visible.any(1)
    assert torch.equal(prompt["valid"], valid) and not valid.all()
    torch.testing.assert_close(graph.sum(-1), valid.float())
    assert (graph >= 0).all() and (graph.sum(1)[~valid] == 0).all() and (graph[~valid] == 0).all()
    assert (graph - graph.mT).abs().max() > 1e-4


def test_5_printed_sparsity_has_no_gradient():
    graph, x, valid = SupportGraph(16, 4), torch.randn(3, 6, 16), torch.rand(3, 6) > .2
    slope = {}
    for kind in ("paper", "entropy", "offdiag"):
        graph.zero_grad()
        penalty(graph(x, valid), valid, kind).backward()
        slope[kind] = graph.ask.weight.grad.norm().item()
    assert slope["paper"] < 1e-7 < 1e-4 < min(slope["entropy"], slope["offdiag"])
    torch.testing.assert_close(penalty(graph(x, valid), valid, "paper"), (1 / valid.sum(1)).mean())
    with pytest.warns(UserWarning, match="has no gradient") as said:
        model = create_model("sdpnet", **tiny, sparsity="paper").train()
        for _ in range(2): model.training_step(toy_batch())
    assert len([w for w in said if "no gradient" in str(w.message)]) == 1


def test_6_factors_lie_between_0_and_2_and_start_at_1():
    batch = toy_batch(2, 2, 3)
    for kind, count in (("shared", 1), ("support", 1), ("offset", 16)):
        for start, model in ((True, create_model("sdpnet", **tiny, deformable=kind)), (False, small(deformable=kind))):
            model.look = True
            with torch.no_grad(): seen = model.eval()(batch).attention
            scale = torch.stack([seen[f"stage.{i}.scale"] for i in range(2)])
            assert scale.shape == (2, 2, 3, 5, count) and scale.min() > 0 and scale.max() < 2
            assert ((scale - 1).abs().max() < 1e-6) == start
    assert small(deformable="plain").refiner.stages[0].scale is None


def at(value, x, y):
    "The map (C,h,w) at cells x, y, which may lie between cells; zeros outside."
    found, (left, top) = torch.zeros(len(value)), (math.floor(x), math.floor(y))
    for i in (left, left + 1):
        for j in (top, top + 1):
            if 0 <= i < value.shape[2] and 0 <= j < value.shape[1]:
                found += (1 - abs(x - i)) * (1 - abs(y - j)) * value[:, j, i]
    return found


@pytest.mark.parametrize("kind", ["plain", "shared", "offset"])
def test_7_sampling_is_that_of_a_plain_loop(kind):
    torch.manual_seed(0)
    dim, heads, points, h, w = 16, 4, 3, 6, 9
    look = ModulatedAttention(dim, heads, 1, points)
    for layer in (look.sampling_offsets, look.attention_weights): nn.init.normal_(layer.weight, std=.3)
    x, where, maps = torch.randn(2, 5, dim), torch.rand(2, 5, 2), torch.randn(2, dim, h, w)
    scale = {"plain": None, "shared": 2 * torch.rand(2, 5, 1), "offset": 2 * torch.rand(2, 5, heads * points)}[kind]
    with torch.no_grad():
        got = look(x, where, look.values([maps]), scale)
        value = F.conv2d(maps, look.value_proj.weight[..., None, None], look.value_proj.bias).unflatten(1, (heads, -1))
        offset = look.sampling_offsets(x).view(2, 5, heads, points, 2)
        weight = look.attention_weights(x).view(2, 5, heads, points).softmax(-1)
        factor = (torch.ones(2, 5, 1) if scale is None else scale).expand(2, 5, heads * points).view(2, 5, heads, points)
        for b in range(2):
            for k in range(5):
                parts = []
                for m in range(heads):
                    part = torch.zeros(dim // heads)
                    for p in range(points):
                        dx, dy = (factor[b, k, m, p] * offset[b, k, m, p]).tolist()
                        px, py = where[b, k, 0].item() * w - .5 + dx, where[b, k, 1].item() * h - .5 + dy
                        part += weight[b, k, m, p] * at(value[b, m], px, py)
                    parts.append(part)
                wanted = look.output_proj.weight[0] @ torch.cat(parts) + look.output_proj.bias[0]
                torch.testing.assert_close(got[b, k], wanted, atol=1e-4, rtol=1e-4)


def test_8_filters_copy_at_the_start():
    torch.manual_seed(0)
    dynamic, maps, valid = DynamicConvolution(8).train(), torch.randn(2, 3, 8, 12, 10), torch.ones(2, 5).bool()
    with torch.no_grad():
        plain = F.batch_norm(maps.flatten(0, 1), None, None, training=True).relu()
        start = dynamic(maps, dynamic.kernels(torch.randn(2, 5, 8), valid))
        assert (start - plain).abs().max() < .1                                     # the supports change it a little
        assert 1e-4 < (start - plain).abs().max()
        torch.testing.assert_close(dynamic(maps, dynamic.kernels(torch.zeros(2, 5, 8), valid)), plain, atol=1e-5, rtol=1e-5)


def test_8_each_episode_has_its_own_filters():
    torch.manual_seed(0)
    dynamic, maps, kernels = DynamicConvolution(4).eval(), torch.randn(2, 3, 4, 9, 9), torch.randn(2, 4, 7, 7)
    with torch.no_grad(): together = dynamic(maps, kernels).unflatten(0, (2, 3))
    for b in range(2):
        for q in range(3):
            for c in range(4):
                one = F.conv2d(maps[b, q, c][None, None], kernels[b, c][None, None], padding=3)[0, 0]
                torch.testing.assert_close(together[b, q, c], (one / (1 + dynamic.norm.eps) ** .5).relu(), atol=1e-5, rtol=1e-5)


def test_9_reconstruction_teaches_the_graph_and_nothing_else_of_the_supports():
    model, batch = small().train(), toy_batch(3, 2, 2)
    terms = model.training_step(batch)
    terms["pose"].backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {n.split(".")[0] for n in touched} == {"reconstruction", "graph", "structural", "maps", "backbone"}
    assert not [n for n in touched if n.startswith("maps.coarse")]
    with torch.no_grad(): graph = model(batch).attention["graph"][:, 0]
    model.zero_grad()
    model.graph_loss(graph, *usable_supports(batch.support_keypoints, batch.support_visible)[:2])["pose"].backward()
    touched = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"reconstruction"}                                             # with the graph cut off


def test_9_what_is_hidden_is_not_told():
    torch.manual_seed(0)
    net, (points, seen) = PoseReconstruction(16), points_of()
    graph, hidden = torch.rand(2, 5, 5).softmax(-1), draw_masks(seen)
    with torch.no_grad():
        first = net(graph, points, seen, hidden)
        other = torch.where(hidden[..., None], 1 - points, points)
        torch.testing.assert_close(net(graph, other, seen, hidden), first)
        assert (net(torch.eye(5).expand(2, -1, -1), points, seen, hidden) - first).abs().max() > 1e-4
        alone = net(torch.eye(5).expand(2, -1, -1), points, seen, hidden)[hidden]
        torch.testing.assert_close(alone, alone[:1].expand_as(alone))               # without neighbours all alike


def test_10_it_learns_eight_episodes_by_heart():
    torch.manual_seed(0)
    model, batch = create_model("sdpnet", **tiny), toy_batch(8, points=4, hidden=0.)
    optimizer, share = torch.optim.Adam(model.parameters(), 3e-3), 0.
    for step in range(200):
        model.train()
        optimizer.zero_grad()
        sum(model.training_step(batch).values()).backward()
        optimizer.step()
        if step % 20 == 19:
            share = ((answers(model, batch) - batch.query_keypoints).norm(dim=-1) < .05).float().mean()
            if share > .95: break
    assert share > .95, (step, share)


# ---- 11: what bad input does ---------------------------------------------------------------------

@pytest.mark.parametrize("change,said", [
    (lambda p, s: (p[:, :0], s[:, :0]), r"each at least 1; got \(2, 0, 5, 2\)"),
    (lambda p, s: (p[:, :, :0], s[:, :, :0]), r"each at least 1; got \(2, 2, 0, 2\)"),
    (lambda p, s: (p[0], s), r"expected \(B,N,K,2\), each at least 1; got \(2, 5, 2\)"),
    (lambda p, s: (p[..., :1], s), r"expected \(B,N,K,2\)"),
    (lambda p, s: (p, s[..., :4]), r"support visible: expected \(2, 2, 5\) beside keypoints \(2, 2, 5, 2\); got \(2, 2, 4\)"),
    (lambda p, s: (p[:, :1], s[:, :1]), r"support features: expected \(B,N\) = \(2, 1\) .* got \(2, 2\)"),
    (lambda p, s: (torch.where(p > .5, math.nan, p), s), "not a finite number"),
    (lambda p, s: (torch.where(p > .5, math.inf, p), s), "not a finite number"),
    (lambda p, s: (p * 64, s), "looks like pixels")], 
    ids=["no shot", "no keypoint", "rank", "one coordinate", "flags", "features", "nan", "inf", "pixels"])
def test_11_wrong_tensors(change, said):
    model, batch = small(), toy_batch(2, 2, hidden=0.)
    features = model.encode_all(batch.support_images)
    with pytest.raises(DataError, match=said): model.adapt(features, *change(batch.support_keypoints, batch.support_visible))
    assert issubclass(DataError, ValueError)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_11_what_is_not_visible_is_not_read(value):
    model, batch = small(), toy_batch(2, 2, 2, hidden=.4)
    wild = replace(batch, support_keypoints=torch.where(batch.support_visible[..., None], batch.support_keypoints, value))
    assert torch.equal(answers(model, wild), answers(model, batch))
    wild = replace(wild, query_keypoints=torch.where(batch.query_visible[..., None], batch.query_keypoints, value))
    terms = []
    for one in (wild, batch):
        torch.manual_seed(0)
        terms.append(model.train().training_step(one))
    assert all(torch.equal(terms[0][k], terms[1][k]) for k in terms[1])


def test_11_points_outside_the_crop():
    model, batch = small(), toy_batch(2, 1, hidden=0.)
    points = batch.support_keypoints.clone()
    points[:, 0, 2] = torch.tensor([1.2, .5])
    hidden = _hide(batch, torch.arange(5) == 2)
    with pytest.warns(UserWarning, match="2 visible support keypoints lie outside") as said:
        for _ in range(2): found = answers(model, replace(batch, support_keypoints=points))
    assert len(said) == 1 and torch.equal(found, answers(model, hidden))
    with pytest.raises(DataError, match="2 visible ones lie outside"):
        small(strict=True)(replace(batch, support_keypoints=points))
    for edge in (0., 1.):                                # a point on the edge has some map under it
        points[:, 0, 2] = edge
        with torch.no_grad():
            model.eval()
            features = model.encode_all(batch.support_images)
            assert (model.maps.pooled(features, points, batch.support_visible)[:, 0, 2].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("kind,fine", [("fixed", False), ("learned", False), ("shuffled", True), ("none", True)])
def test_11_more_keypoints_than_identifiers(kind, fine):
    model, batch = small(identifier=kind, slots=4), toy_batch()
    if fine:
        assert torch.isfinite(answers(model, batch)).all()
        assert torch.isfinite(sum(model.train().training_step(batch).values()))
    else:
        with pytest.raises(DataError, match="5 keypoints, but identifiers for 4"): model(batch)


@pytest.mark.parametrize("options", [dict(graph="global"), dict(gcn="static")], ids=str)
def test_11_more_keypoints_than_slots(options):
    with pytest.raises(DataError, match="5 keypoints.*slots=5"): small(identifier="none", slots=4, **options)(toy_batch())


def test_11_a_keypoint_no_support_shows():
    model, batch = small(), _hide(toy_batch(2, 2, 2, hidden=0.), torch.arange(5) == 3)
    with torch.no_grad(): answer = model.eval()(batch)
    assert (answer.keypoints[..., 3, :] == .5).all() and (answer.confidence[..., 3] == 0).all()
    assert (answer.confidence[..., :3] > 0).all()
    graph = prompt_of(model, batch)["graph"]
    assert (graph[:, 3] == 0).all() and (graph[:, :, 3] == 0).all()
    moved = replace(batch, query_keypoints=torch.where((torch.arange(5) == 3)[:, None], .1, batch.query_keypoints))
    losses = [model.loss(answer, one) for one in (batch, moved)]
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])


def test_11_one_shot_is_enough_or_all_are_wanted():
    batch = toy_batch(4, 3, hidden=.4)
    for kind, seen in (("any", batch.support_visible.any(1)), ("all", batch.support_visible.all(1))):
        with torch.no_grad(): answer = small(support_valid=kind).eval()(batch)
        assert torch.equal(answer.confidence[:, 0] > 0, seen)


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_11_an_empty_episode_is_no_zero_in_the_mean(loss):
    model, batch = small(loss=loss, pose_weight=0, sparsity="none", dropout=0.).eval(), toy_batch(2, 1, hidden=0.)
    half = replace(batch, support_visible=batch.support_visible & torch.tensor([True, False])[:, None, None])
    with torch.no_grad():
        both, one = model.loss(model(half), half), model.loss(model(_one_episode(half, 0)), _one_episode(half, 0))
        for k in one: torch.testing.assert_close(both[k], one[k], atol=1e-5, rtol=1e-4)
        assert (model.loss(model(half), half), model.watched["skipped"])[1] == 1
    none = _hide(batch, torch.ones(5, dtype=torch.bool))
    model = small(loss=loss).train()
    terms = model.training_step(none)
    sum(terms.values()).backward()
    assert all(t == 0 for t in terms.values()) and model.watched["skipped"] == 2
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_11_a_single_keypoint():
    model, batch = small(), toy_batch(2, 2, hidden=0.)
    single = replace(batch, links=tuple(e[:0] for e in batch.links), **_each_slot(batch, lambda t, d: t.narrow(d, 0, 1)))
    assert (prompt_of(model, single)["graph"] == 1).all()
    terms = model.train().training_step(single)
    assert terms["pose"] == 0 and terms["sparsity"] == 0 and torch.isfinite(sum(terms.values()))


def test_11_two_slots_at_one_place_are_twins_without_identifiers():
    batch = toy_batch(2, 2, 2, hidden=0.)
    points = batch.support_keypoints.clone()
    points[:, :, 4] = points[:, :, 1]
    for kind, same in (("none", True), ("fixed", False)):
        found = answers(small(identifier=kind), replace(batch, support_keypoints=points))
        assert ((found[..., 4, :] - found[..., 1, :]).abs().max() < 1e-6) == same


def test_11_crops_of_any_size_that_32_divides():
    model = small().eval()
    with torch.no_grad():
        maps = {k: v[:, None] for k, v in model.encode(torch.randn(2, 3, 64, 96)).items()}
        points, seen = points_of(shots=1)
        answer = model.locate(model.adapt(maps, points, seen), maps)
    assert answer.similarity.shape[-2:] == (8, 12) and torch.isfinite(answer.keypoints).all()
    with pytest.raises(DataError, match=r"multiples of 32 px, got \(64, 80\)"): model.encode(torch.randn(1, 3, 64, 80))


def test_11_a_batch_of_one_trains():
    model = small().train()
    assert torch.isfinite(sum(model.training_step(toy_batch(1, 1, 1)).values()))
    assert model.dynamic.norm.num_batches_tracked == 1


@pytest.mark.parametrize("options", [{}, dict(loss="mse"), dict(image="lr", graph="concat", deformable="offset")], ids=str)
def test_11_bfloat16(options):
    model, batch = small(**options).train(), toy_batch(3, 2, 2)
    with torch.autocast("cpu", torch.bfloat16): terms = model.training_step(batch)
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer, graph = model.eval()(batch), model.adapt(model.encode_all(batch.support_images), batch.support_keypoints,
                                                         batch.support_visible)["graph"]
    assert answer.similarity.dtype == answer.keypoints.dtype == graph.dtype == torch.float32
    torch.testing.assert_close(graph.sum(-1), batch.support_visible.any(1).float())


# ---- parts ---------------------------------------------------------------------------------------

def test_a_graph_that_hears_only_itself_gives_one_warning():
    model, (points, seen) = small().train(), points_of()
    with pytest.warns(UserWarning, match="links each keypoint to itself alone") as said:
        for _ in range(2): model.graph_loss(torch.eye(5).expand(2, -1, -1), points, seen)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small().graph_loss(torch.full((2, 5, 5), .2), points, seen)


def test_figures_leave_out_lonely_keypoints_and_empty_slots():
    graph = torch.zeros(3, 4, 4)
    graph[0, :2, :2] = .5
    graph[1, 3, 3] = 1.
    valid = torch.tensor([[True, True, False, False], [False, False, False, True], [False] * 4])
    figures = graph_figures(graph, valid)
    assert figures["neighbours"].item() == pytest.approx(2, abs=1e-5) and figures["diagonal"].item() == pytest.approx(.5)
    assert penalty(graph, valid, "entropy").item() == pytest.approx(1 / 3, abs=1e-5)
    assert penalty(graph, valid, "offdiag").item() == pytest.approx((1 / 4) / 3)
    with pytest.raises(ConfigError, match="sparsity must be one of"): penalty(graph, valid, "none")


@pytest.mark.parametrize("ratio", [.001, .5, .999])
def test_masks_leave_one_and_take_one(ratio):
    seen = torch.rand(3000, 6) > .6
    mask, enough = draw_masks(seen, ratio), seen.sum(1) > 1
    assert not (mask & ~seen).any() and not mask[~enough].any()
    assert mask[enough].any(1).all() and (seen & ~mask)[enough].any(1).all()


def test_concatenation_needs_more_than_a_softmax():
    "The linear layer's half for the listener would cancel: all rows would be one."
    torch.manual_seed(0)
    graph, x, valid = SupportGraph(16, 4, "concat"), 3 * torch.randn(1, 6, 16), torch.ones(1, 6).bool()
    graph.fc.bias.data.zero_()
    left, right = graph.fc.weight.view(2, -1)
    scores = (x @ left)[:, :, None] + (x @ right)[:, None]
    torch.testing.assert_close(graph(x, valid), scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True))
    rows = scores.softmax(-1)[0]
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
    assert (graph(x, valid)[0] - graph(x, valid)[0, :1]).abs().max() > 1e-2


def test_attention_graph_is_the_mean_of_its_heads():
    torch.manual_seed(0)
    graph, x, valid = SupportGraph(8, 2), torch.randn(1, 4, 8), torch.ones(1, 4).bool()
    wanted = 0
    for head in (slice(0, 4), slice(4, 8)):
        q, r = x[0] @ graph.ask.weight[head].T, x[0] @ graph.offer.weight[head].T
        wanted = wanted + (q @ r.T / 2).softmax(-1) / 2
    torch.testing.assert_close(graph(x, valid)[0], wanted)


def test_factors_of_the_graph_convolution_weigh_what_is_said():
    torch.manual_seed(0)
    block, x, graph, valid = GraphBlock(4, 2), torch.randn(1, 3, 4), torch.rand(1, 3, 3).softmax(-1), torch.ones(1, 3).bool()
    M, y = block.factors(x[0]).sigmoid(), x[0]
    for conv in block.convs: y = (graph[0] @ (M * (y @ conv.linear.weight.T + conv.linear.bias))).relu()
    torch.testing.assert_close(block(x, graph, valid)[0], block.norm(x[0] + y))


def test_reconstruction_error_is_a_mean_of_means():
    points, counted = torch.zeros(1, 3, 4, 2), torch.zeros(1, 3, 4, dtype=torch.bool)
    counted[0, 0, :2] = counted[0, 1, 3] = True
    guess = torch.zeros_like(points)
    guess[0, 0, 0], guess[0, 1, 3], guess[0, 2] = torch.tensor([1., 1.]), torch.tensor([3., 0.]), 99.
    assert reconstruction_loss(guess, points, counted).item() == pytest.approx((1 + 3) / 2)
    assert reconstruction_loss(guess, points, counted & False).item() == 0


def test_only_the_masked_count_if_asked():
    model, (points, seen) = small(reconstruct="masked"), points_of()
    graph = torch.full((2, 5, 5), .2)
    torch.manual_seed(0)
    term = model.graph_loss(graph, points, seen)["pose"]
    torch.manual_seed(0)
    hidden = draw_masks(seen)
    torch.testing.assert_close(term, reconstruction_loss(model.reconstruction(graph, points, seen, hidden), points, hidden))


def test_a_shot_can_be_judged_badly():
    tokens, x = SupportTokens(8, 4, kind="quality"), torch.randn(1, 2, 3, 8)
    seen = torch.tensor([[[True, True, False], [True, False, False]]])
    alpha = tokens.quality(x)[..., 0].softmax(1)[0, :, 0]
    found = tokens(x, seen)[0]
    torch.testing.assert_close(found[0], alpha @ x[0, :, 0])
    torch.testing.assert_close(found[1], x[0, 0, 1])
    assert not found[2].any()
    torch.testing.assert_close(weighted_shots(x, seen)[0, 0], x[0, :, 0].mean(0))


def test_without_names_a_keypoint_looks_at_itself_on_other_shots():
    "Between shots; within a shot it sees the others, so that part is taken away here."
    torch.manual_seed(0)
    tokens, x, seen = SupportTokens(8, 4, 16, 1).eval(), torch.randn(1, 3, 4, 8), torch.ones(1, 3, 4).bool()
    tokens.within[0].forward = lambda x, *_: x
    other = x.clone()
    other[:, 1, 2] += torch.randn(8)
    names = Identifier("fixed", 8)(1, 4)
    changed = lambda n: ((tokens(other, seen, n) - tokens(x, seen, n)).abs().amax(-1)[0] > 1e-6).tolist()
    assert changed(None) == [False, False, True, False] and changed(names) == [True] * 4


# ---- the model -----------------------------------------------------------------------------------

def count(module): return sum(p.numel() for p in module.parameters())


def test_parameters_are_as_many_as_the_specification_says():
    model = create_model("sdpnet", backbone="resnet50")
    head = count(model) - count(model.backbone)
    assert round(head / 1e6, 1) == 16.7 and round(count(model.backbone) / 1e6, 1) == 23.5
    assert round(count(model.semantic) / 1e6, 1) == 3.2 and round(count(model.encoder) / 1e6, 1) == 3.9
    assert round(count(model.refiner.stages) / 1e6 + count(model.refiner.steps) / 1e6, 1) == 4.7
    assert count(DynamicConvolution().fc) == 256 * 12544 + 12544
    assert model.image == "lr" and model.dynamic is None and model.refiner.stages[0].scale is not None


def test_hrnet():
    pytest.importorskip("timm")
    model = create_model("sdpnet", backbone="hrnet_w32").eval()
    assert round((count(model) - count(model.backbone)) / 1e6, 1) == 19.2
    assert model.backbone.channels == {4: 32, 8: 64, 16: 128, 32: 256} and model.image == "dynamic"
    with torch.no_grad(): maps = model.encode(torch.randn(1, 3, 64, 64))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {"coarse": (1, 256, 2, 2), "fine": (1, 256, 16, 16)}
    assert count(create_model("sdpnet", backbone="hrnet_w32", fuse="branch").maps.fine) == 33 * 256


def test_eight_at_once_are_eight_alone_and_one_query_is_one_of_fifteen():
    model, batch = small(), toy_batch(8, 2, 15)
    whole = answers(model, batch)
    for b in (0, 3, 7): assert (answers(model, _one_episode(batch, b)) - whole[b:b + 1]).abs().max() < 1e-5
    for q in (0, 7, 14): assert (answers(model, _one_query(batch, q)) - whole[:, q:q + 1]).abs().max() < 1e-5


def test_keypoints_have_answers_of_their_own():
    "Otherwise the laws would hold of a model that mixes them up."
    assert answers(small(), toy_batch(hidden=0.)).std(2).min() > 2e-3


@pytest.mark.parametrize("part", ["graph", "kernels", "semantic"])
def test_every_part_of_the_prompt_is_used(part):
    model, batch = small().eval(), toy_batch(2, 2, 2, hidden=0.)
    with torch.no_grad():
        query, prompt = model.encode_all(batch.query_images), prompt_of(model, batch)
        torch.manual_seed(0)
        other = {**prompt, part: torch.eye(5).expand(2, 5, 5) if part == "graph" else torch.randn_like(prompt[part])}
        assert (model.locate(other, query).keypoints - model.locate(prompt, query).keypoints).abs().max() > 1e-4


def test_at_the_start_every_stage_is_the_proposal():
    torch.manual_seed(0)
    steps = create_model("sdpnet", **tiny).eval()(toy_batch()).stages
    assert steps.shape == (2, 1, 3, 5, 2) and (steps - steps[:, :, :1]).abs().max() < 1e-5


def test_what_was_looked_at_is_kept_on_request():
    model, batch = small().eval(), toy_batch(2, 2, 3)
    with torch.no_grad():
        assert model(batch).attention == {}
        model.look = True
        seen = model(batch).attention
    stage = ("look.points", "look.weights", "scale", "self")
    assert sorted(seen) == ["encoder.0", "graph"] + [f"stage.{i}.{k}" for i in range(2) for k in stage]
    assert seen["graph"].shape == (2, 3, 5, 5) and seen["stage.0.look.points"].shape == (2, 3, 5, 1, 4, 1, 4, 2)
    torch.testing.assert_close(seen["graph"][:, 0], prompt_of(model, batch)["graph"])


def test_an_answer_without_a_graph_has_no_loss_for_it():
    model, batch = small().eval(), toy_batch(2, 2, 2)
    with torch.no_grad(): assert "pose" not in model.loss(model(batch), batch)
    model.look = True
    with torch.no_grad(): assert "pose" in model.loss(model(batch), batch)


def test_checkpoint_keeps_the_answers(tmp_path):
    model, batch = small(identifier="learned", gcn="static", frozen_bn=True).eval(), toy_batch(2, 2)
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    assert torch.equal(answers(model, batch), answers(again, batch)) and again.config["gcn"] == "static"


def test_it_is_trained_and_scored_like_any_other(tmp_path, posezoo_mini):
    import cape
    from cape.learner import Learner, train_config
    data = cape.PoseDataset.load("posezoo", size="mini", split=1, subset="train")
    config = train_config("tiny", "sdpnet", steps=2, batch=4, val_every=0, pck_every=0, shots=2, log_every=1)
    model = create_model("sdpnet", **tiny)
    result = Learner(model, data, None, config, tmp_path).fit()
    assert result["step"] == 2 and {"pose", "sparsity", "stage2"} <= set(result["last"])
    report = cape.evaluate(model, data.select(list(data.categories)[:2]), shots=2, episodes=2, queries=2, size=64, progress=False)
    assert 0 <= report.pck[.2] <= 1


def test_a_broken_model_is_noticed(monkeypatch):
    "The check of the laws can fail: filters of one episode used for all."
    model = small()
    whole = model.dynamic.forward
    monkeypatch.setattr(model.dynamic, "forward", lambda maps, kernels: whole(maps, kernels.roll(1, 0)))
    model.dynamic.fc.weight.data *= 300
    with pytest.raises(CapeError, match="batch"): check_contract(model)
