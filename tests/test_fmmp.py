"""FMMP against what the official code computed, and the laws of the contract for every switch."""
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cape.data.crops import make_heatmaps
from cape.errors import CheckpointError, ConfigError, DataError
from cape.layers.attention import sine_grid, sine_points
from cape.layers.graph import bfs_batch
from cape.models.base import (_one_episode, _one_query, _pad_slots, _permute_slots, check_contract, create_model, fold,
                              load_model, save_model, toy_batch)
from cape.models.capeformer import inverse_sigmoid
from cape.models.fmmp import (FMMP, Pyramid, from_official_fmmp, linked_points, on_crop, order_code, place_error,
                              point_features, seen_mean)

here = Path(__file__).parent / "golden"
cases = [(shots, name) for shots in (1, 5) for name in "AB"]
skeletons = dict(
    A=[[15, 13], [13, 11], [16, 14], [14, 12], [11, 12], [5, 11], [6, 12], [5, 6], [5, 7], [6, 8], [7, 9], [8, 10], [1, 2],
       [0, 1], [0, 2], [1, 3], [2, 4], [3, 5], [4, 6]],
    B=[[0, 1], [1, 2], [2, 3], [4, 5], [5, 6], [7, 8]])
keypoints = dict(A=17, B=9)


def module(name):
    spec = importlib.util.spec_from_file_location(name, here / f"{name}.py")
    it = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(it)
    return it


fill = module("escape_fill")


@pytest.fixture(scope="module")
def state():
    "The filled weights under their official names."
    shapes = json.loads((here / "fmmp_names.json").read_text())
    return {n: torch.from_numpy(np.array(fill.fill_tensor(n, s))) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def official(state): return from_official_fmmp(state)


def near(ours, theirs, eps): np.testing.assert_allclose(np.asarray(ours.detach()), theirs, atol=eps, rtol=0)


@pytest.fixture(scope="module")
def encoded(official):
    "Shots and case -> the maps of all its images; each is encoded once."
    found = {}

    def give(shots, name):
        if (shots, name) not in found:
            tags = [f"fm{shots}{name}/s{i}" for i in range(shots)] + [f"fm{shots}{name}/q"]
            with torch.no_grad():
                found[shots, name] = official.encode_all(torch.stack([torch.from_numpy(fill.image(t)) for t in tags])[None])
        return found[shots, name]
    return give


def golden(shots, name):
    "Arrays of the case by their names; points and flags before padding; its links."
    g = np.load(here / f"fmmp_{shots}shot.npz")
    g = {k[2:]: g[k] for k in g.files if k.startswith(name)}
    K = keypoints[name]
    points, seen = torch.from_numpy(g["points"][None, :, :K]), torch.from_numpy(g["visible"][None, :, :K])
    return g, points, seen, [torch.tensor(skeletons[name])]


def split(maps, shots): return {k: v[:, :shots] for k, v in maps.items()}, {k: v[:, shots:] for k, v in maps.items()}


# ---- the official numbers; the published tolerance is 1e-4, ours 1e-5 where units are those of the crop ---------------------------

@pytest.mark.parametrize("shots,name", cases)
def test_padding_and_neighbours_are_the_official_ones(official, shots, name):
    g, points, seen, links = golden(shots, name)
    slots = official.fill(points, seen, links, torch.tensor([keypoints[name]]))
    near(slots.points[0], g["points"], 1e-6)
    assert np.array_equal(slots.visible[0], g["visible"])
    assert np.array_equal(bfs_batch(list(slots.links[0]), slots.visible[0], 16), g["ref_index"])
    near(order_code(slots.points[:, 0, :, 0])[0], g["query_order"], 1e-5)


@pytest.mark.parametrize("shots,name", cases)
def test_maps_and_first_tokens_are_the_official_ones(official, encoded, shots, name):
    g, points, seen, links = golden(shots, name)
    maps = encoded(shots, name)
    assert [m.shape[-1] for m in maps.values()] == [8, 16, 32]
    for i, m in enumerate(maps.values()):
        step = 4 * 2 ** i
        near(m[0, -1][:, 1::step, 2::step], g[f"pyramid_q{i}_grid"], 1e-4)
    slots = official.fill(points, seen, links, torch.tensor([keypoints[name]]))
    supports = [fold(m[:, :shots]) for m in maps.values()]
    near(official.miner.start(supports, slots.points[:, :shots], slots.visible[:, :shots])[0], g["init_embed"], 1e-4)


@pytest.mark.parametrize("shots,name", cases)
def test_every_layer_is_the_official_one(official, encoded, shots, name, monkeypatch):
    "Each shot's block, their mean, the query's block, and the places."
    g, points, seen, links = golden(shots, name)
    support, query = split(encoded(shots, name), shots)
    kept = {"shot": [], "mean": [], "query": []}
    miner, over = official.miner, official.miner.over_shots

    def watch(values, shown):
        mean = over(values, shown)
        if values.ndim == 5:
            kept["shot"].append(values[0, 0, 0]); kept["mean"].append(mean[0, 0])
        return mean
    monkeypatch.setattr(miner, "over_shots", watch)
    for layer in miner.query:
        monkeypatch.setattr(layer, "forward", lambda *a, run=layer.forward: kept["query"].append(run(*a)) or kept["query"][-1])
    with torch.no_grad():
        slots = official.fill(points, seen, links, torch.tensor([keypoints[name]]))
        stages = miner.trace(official.prepare(support, slots, shots), [fold(m) for m in query.values()])
    near(torch.stack(kept["shot"])[..., ::4], g["support_shot0"], 1e-4)
    near(torch.stack(kept["mean"])[..., ::2], g["support_mean"], 1e-4)
    near(torch.stack(kept["query"])[:, 0, :, ::2], g["decoder_embed"], 1e-4)
    near(stages[0, 0], g["pred"], 1e-5)


@pytest.mark.parametrize("shots,name", cases)
def test_the_answer_is_the_official_one(official, encoded, shots, name):
    "Through the contract: real keypoints only, and pixels of the image."
    g, points, seen, links = golden(shots, name)
    support, query = split(encoded(shots, name), shots)
    with torch.no_grad():
        answer = official.locate(official.adapt(support, points[:, :shots], seen[:, :shots], links), query)
    K = keypoints[name]
    assert answer.keypoints.shape == (1, 1, K, 2) and answer.stages.shape == (1, 1, 3, K, 2)
    near(answer.stages[0, 0], g["pred"][:, :K], 1e-5)
    near(answer.keypoints[0, 0] * 1.7 * 200 + torch.tensor([210.5, 150.25]) - 1.7 * 100, g["preds_image"][:K, :2], 5e-3)


@pytest.mark.parametrize("shots,name", cases)
def test_losses_are_the_official_ones(official, shots, name, monkeypatch):
    "Those of the official vectors were taken with evenly spaced points."
    g, points, seen, links = golden(shots, name)
    tags = [f"fm{shots}{name}/s{i}" for i in range(shots)] + [f"fm{shots}{name}/q"]
    images = torch.stack([torch.from_numpy(fill.image(t)) for t in tags])[None]
    batch = replace(toy_batch(1, shots, 1, keypoints[name], 256), links=tuple(links), support_images=images[:, :shots],
                    query_images=images[:, shots:], support_keypoints=points[:, :shots], query_keypoints=points[:, shots:],
                    support_visible=seen[:, :shots], query_visible=seen[:, shots:])
    monkeypatch.setattr(official, "fill", lambda *a, mix: FMMP.fill(official, *a, mix=False))
    with torch.no_grad(): terms = official.training_step(batch)
    near(terms["real"], g["loss_real"], 1e-5)
    near(terms["mix"], g["loss_mix"], 1e-5)


@pytest.fixture(scope="module")
def parts(): return np.load(here / "fmmp_modules.npz")


def drawn(name, *shape): return torch.from_numpy(fill.generator(name).standard_normal(shape).astype(np.float32))


def levels(values): return [v.mT.unflatten(-1, (s, s)) for v, s in zip(values.split([64, 256, 1024], 1), (8, 16, 32))]


def test_mining_is_the_official_one(official, parts):
    layer = official.miner.support[0].mine
    maps, query = levels(drawn("mod/values", 2, 1344, 256)), drawn("mod/query", 2, 12, 256)
    reference = linked_points(torch.from_numpy(parts["ref"]), torch.from_numpy(parts["idx"][:, 0, :, :8]))
    near(layer(query, reference, layer.attention.values(maps)), parts["structured_out"], 1e-4)
    near(point_features(maps, torch.from_numpy(parts["ref"])), parts["ref_feat"], 1e-5)


def test_blocks_are_the_official_ones(official, parts):
    maps, query, pos = levels(drawn("mod/values", 2, 1344, 256)), drawn("mod/query", 2, 12, 256), drawn("mod/pos", 2, 12, 256)
    reference = linked_points(torch.from_numpy(parts["ref"]), torch.from_numpy(parts["idx"][:, 0, :, :8]))
    hidden = torch.zeros(2, 12).bool()
    hidden[0, 3:6] = True
    for side, mask, name in (("support", hidden, "support"), ("query", None, "decoder")):
        layer = getattr(official.miner, side)[0]
        out = layer(query, pos + .5 * pos.flip(1), reference, layer.mine.attention.values(maps), mask)
        near(out, parts[f"{name}_layer_out"], 1e-4)


def test_codes_are_the_official_ones(parts):
    near(sine_points(torch.from_numpy(parts["ref"])), parts["pe_coord"], 1e-5)
    near(order_code(torch.from_numpy(parts["order_x"])), parts["order_pe"], 1e-5)
    near(inverse_sigmoid(torch.from_numpy(parts["inverse_sigmoid_in"])), parts["inverse_sigmoid_out"], 1e-5)


# ---- names ---------------------------------------------------------------------------------------

def test_every_official_tensor_has_its_place(state, official):
    assert len(state) == 868 and sum(p.numel() for p in official.parameters()) == 40_944_710 and not official.training
    number = lambda tensors: sum(t.numel() for n, t in tensors if "num_batches" not in n)
    assert number(official.state_dict().items()) == number(state.items())
    assert torch.equal(official.miner.query[2].mine.attention.value_proj.weight[5 * 256:6 * 256],
                       state["predictor.decoder_layers.2.deform_attn.attn_layers.5.value_proj.weight"])
    wrapped = from_official_fmmp({"state_dict": state, "meta": {}})
    assert all(torch.equal(t, official.state_dict()[n]) for n, t in wrapped.state_dict().items())


@pytest.mark.parametrize("change,said", [
    (lambda s: s.pop("predictor.kpt_branch.1.mlp.6.bias"), "missing: miner.steps.1.6.bias"),
    (lambda s: s.pop("predictor.support_layers.2.deform_attn.attn_layers.3.output_proj.bias"), "missing .*attn_layers.3"),
    (lambda s: s.update({"predictor.support_layers.0.deform_attn.attn_layers.0.scale": torch.zeros(1)}), "unexpected"),
    (lambda s: s.update({"keypoint_head.bias": torch.zeros(1)}), "unexpected: keypoint_head.bias"),
    (lambda s: s.update({"backbone_projs.1.0.bias": torch.zeros(2)}), r"wrong shape: pyramid.projections.1.bias \(2,\)")])
def test_misfits_are_named(state, change, said):
    some = dict(state)
    change(some)
    with pytest.raises(CheckpointError, match=said): from_official_fmmp(some)


# ---- pieces --------------------------------------------------------------------------------------

def test_a_keypoint_off_the_crop_shifts_the_codes_of_those_after_it():
    code = order_code(torch.tensor([[.2, 1.5, .4, -1.2, .6]]), 16)[0]
    number = torch.tensor([1., 1., 2., 4., 5.]) / (5 + 1e-6)
    row = torch.tensor([1., 0., 1., 2., 1.])
    torch.testing.assert_close(code, sine_points(torch.stack([number, row / (row + 1e-6)], -1), 16))
    torch.testing.assert_close(order_code(torch.rand(2, 70), 16)[1], sine_grid(1, 70, 16))


def test_what_counts_as_on_the_crop_is_what_heatmaps_say():
    points = torch.randn(4, 3000, 2, generator=torch.Generator().manual_seed(0)) + .5
    seen = torch.rand(4, 3000) < .8
    assert torch.equal(on_crop(points, seen), make_heatmaps(points, seen)[1] > 0)


def test_the_mean_over_shots():
    values, seen = torch.tensor([[[1.], [2.]], [[3.], [4.]]])[None], torch.tensor([[[1.], [0.]], [[1.], [0.]]])[None]
    assert seen_mean(values, seen).flatten().tolist() == [2., 0.]


def test_the_error_is_a_mean_over_keypoints_and_a_sum_over_layers():
    stages, target = torch.rand(3, 2, 4, 5, 2), torch.rand(3, 2, 5, 2)
    weight = torch.rand(3, 2, 5) < .6
    each = [[sum((stages[b, q, t, weight[b, q]] - target[b, q, weight[b, q]]).abs().sum(-1).mean() for t in range(4))
             if weight[b, q].any() else torch.tensor(0.) for q in range(2)] for b in range(3)]
    torch.testing.assert_close(place_error(stages, target, weight), torch.tensor(each).mean())


def test_levels_are_added_from_the_top():
    pyramid = Pyramid({8: 3, 16: 4, 32: 5}, 6)
    maps = {8: torch.randn(2, 3, 8, 8), 16: torch.randn(2, 4, 4, 4), 32: torch.randn(2, 5, 2, 2)}
    out = pyramid(maps)
    plain = [p(maps[s]) for p, s in zip(pyramid.projections, (32, 16, 8))]
    wanted = plain[2][:, :, 5, 6] + plain[1][:, :, 2, 3] + plain[0][:, :, 1, 1]
    torch.testing.assert_close(out[2][:, :, 5, 6], wanted)


# ---- the model -----------------------------------------------------------------------------------

switches = [{}, dict(identifier="none"), dict(identifier="learned"), dict(identifier="shuffled"), dict(identifier="order"),
            dict(padding="zero"), dict(padding="none"), dict(padding="none", identifier="order"), dict(mining="sequential"),
            dict(mining="query"), dict(form="paper"), dict(form="paper", identifier="fixed", mining="query"),
            dict(branches=1), dict(layers=1), dict(slots=3), dict(strides=(4, 8)), dict(mix_weight=0.),
            dict(backbone="resnet18", dim=16, heads=2, branches=2, hidden=16, slots=8)]


def small(**options):
    "A small model whose answers differ: the published start leaves all points in the middle."
    torch.manual_seed(0)
    model = create_model("fmmp", **{**dict(dim=32, hidden=32, slots=12), **options})
    for net in model.miner.steps: nn.init.normal_(net[-1].weight, std=3. if model.paper else .3)
    for layer in (*model.miner.support, *model.miner.query):
        for linear in (layer.mine.attention.sampling_offsets, layer.mine.attention.attention_weights):
            nn.init.normal_(linear.weight, std=.1)
    return model


@pytest.mark.parametrize("options", switches, ids=str)
def test_contract(options):
    model = small(**options)
    assert model.equivariant == (model.kind == "none")
    check_contract(model)


@pytest.mark.parametrize("options", switches, ids=str)
def test_every_parameter_is_trained(options):
    model = small(**options)
    model.train()
    terms = model.training_step(toy_batch(3, 2, 2, hidden=0.))
    sum(terms.values()).backward()
    mixed = model.padding == "mixup" and model.mix_weight and model.slots > 5
    assert [k for k, v in terms.items() if v > 0] == ["real"] + ["mix"] * bool(mixed)
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in idle if not n.startswith("backbone.side.")] == []     # strides not asked for


def answers(model, batch):
    with torch.no_grad(): return model.eval()(batch).keypoints


def gap(a, b): return (a - b).abs().max().item()


@pytest.mark.parametrize("options", [{}, dict(padding="none"), dict(form="paper")], ids=str)
def test_eight_at_once_are_eight_alone_and_padding_changes_nothing(options):
    model, batch = small(**options), toy_batch(8, 2, 5)
    whole = answers(model, batch)
    for b in range(8): assert gap(answers(model, _one_episode(batch, b)), whole[b:b + 1]) < 1e-5
    for q in (0, 4): assert gap(answers(model, _one_query(batch, q)), whole[:, q:q + 1]) < 1e-5
    for extra in (1, 40): assert gap(answers(model, _pad_slots(batch, extra))[..., :5, :], whole) < 1e-5
    assert whole.std(2).min() > 1e-3                      # the laws would hold of a model that mixes keypoints up


@pytest.mark.parametrize("kind,same", [("none", True), ("fixed", False), ("order", False), ("learned", False)])
@pytest.mark.parametrize("padding", ["mixup", "none"])
def test_an_identifier_is_what_makes_the_order_of_keypoints_count(kind, same, padding):
    model, batch, order = small(identifier=kind, padding=padding), toy_batch(hidden=0.), torch.tensor([3, 0, 4, 1, 2])
    assert (gap(answers(model, _permute_slots(batch, order)), answers(model, batch)[..., order, :]) < 1e-5) == same


def test_the_order_of_links_counts_always():
    model, batch = small(identifier="none"), toy_batch(hidden=0.)
    other = replace(batch, links=tuple(e.flip(0) for e in batch.links))
    assert gap(answers(model, other), answers(model, batch)) > 1e-4


def test_links_count_through_neighbours_alone():
    "Without padding, links that give every keypoint the same neighbours in the same order are the same."
    model, batch = small(padding="none"), toy_batch(hidden=0.)
    turned = replace(batch, links=tuple(e.flip(1) for e in batch.links))
    assert gap(answers(model, turned), answers(model, batch)) < 1e-6
    none = replace(batch, links=tuple(e[:0] for e in batch.links))
    assert gap(answers(model, none), answers(model, batch)) > 1e-4


def test_links_may_be_missing():
    model, batch = small().eval(), toy_batch(2, 1, 1, hidden=0.)
    maps = model.encode_all(batch.support_images)
    args = maps, batch.support_keypoints, batch.support_visible
    with torch.no_grad():
        found = [model.locate(model.adapt(*args, links), maps).keypoints
                 for links in (None, [None, None], [torch.zeros(0, 2).long()] * 2)]
    assert gap(found[0], found[1]) == gap(found[0], found[2]) == 0.
    model.train()
    loss = model.training_step(replace(batch, links=tuple(e[:0] for e in batch.links)))
    assert torch.isfinite(sum(loss.values())) and loss["mix"] == 0


awkward = {
    "one keypoint": lambda b: replace(b, links=tuple(e[:0] for e in b.links), **{
        n: getattr(b, n)[:, :, :1] for n in ("support_keypoints", "support_visible", "query_keypoints", "query_visible", "query_occluded")},
        valid=b.valid[:, :1]),
    "hidden in all": lambda b: replace(b, support_visible=b.support_visible & (torch.arange(5) != 1)),
    "hidden, with a link": lambda b: replace(b, support_visible=b.support_visible & (torch.arange(5) != 4)),
    "the last, without link": lambda b: replace(b, support_visible=b.support_visible & (torch.arange(5) != 4),
                                                links=tuple(e[:2] for e in b.links)),
    "a blind shot": lambda b: replace(b, support_visible=b.support_visible & torch.tensor([False, True])[:, None]),
    "all blind": lambda b: replace(b, support_visible=torch.zeros_like(b.support_visible)),
    "query hidden": lambda b: replace(b, query_visible=torch.zeros_like(b.query_visible)),
    "off the crop": lambda b: replace(b, support_keypoints=b.support_keypoints + torch.tensor([.9, 0.]))}


@pytest.mark.parametrize("options", [{}, dict(padding="none"), dict(padding="zero", identifier="order"), dict(form="paper")], ids=str)
@pytest.mark.parametrize("case", awkward)
def test_awkward_episodes_are_finite(case, options):
    model, batch = small(**options), awkward[case](toy_batch(2, 2, 2, hidden=0.))
    model.train()
    terms = model.training_step(batch)
    sum(terms.values()).backward()
    assert all(torch.isfinite(v) for v in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(): answer = model.eval()(batch)
    assert torch.isfinite(answer.keypoints).all() and answer.keypoints.min() >= 0 and answer.keypoints.max() <= 1
    seen = on_crop(batch.support_keypoints, batch.support_visible).any(1)[:, None].expand_as(answer.confidence)
    assert (answer.confidence[~seen] == 0).all() and (answer.confidence[seen] > 0).all() and answer.confidence.max() <= 1


def test_a_blind_shot_has_no_say():
    batch = awkward["a blind shot"](toy_batch(2, 2, 2, hidden=0.))
    only = replace(batch, **{n: getattr(batch, n)[:, 1:] for n in
                             ("support_images", "support_keypoints", "support_visible", "support_index")})
    model = small()
    assert gap(answers(model, batch), answers(model, only)) < 1e-5
    model.look = True                                     # PyTorch then takes another way, where a masked row is NaN
    assert gap(answers(model, batch), answers(model, only)) < 1e-5


def test_a_layer_teaches_its_own_step_and_all_miners_before_it():
    model, batch = small().train(), toy_batch(2, 1, 1, hidden=0.)
    stages = model(batch).stages
    parts = [net[-1].weight for net in model.miner.steps] + [l.ffn2.linear1.weight for l in model.miner.query]
    for t in range(3):
        grads = torch.autograd.grad(stages[:, :, t].sum(), parts, retain_graph=True, allow_unused=True)
        taught = [g is not None and bool(g.abs().sum() > 0) for g in grads]
        assert taught == [l == t for l in range(3)] + [l <= t for l in range(3)]


def test_hidden_keypoints_of_the_support_are_taught():
    model, batch = small().train(), toy_batch(2, 1, 1, hidden=0.)
    only = replace(batch, support_visible=batch.support_visible & (torch.arange(5) != 1),
                   query_visible=batch.query_visible & (torch.arange(5) == 1))
    assert model.training_step(only)["real"] > 0


def test_empty_slots_are_looked_at_by_the_query():
    "As in the code, which masks nothing there."
    batch = toy_batch(hidden=0.)
    assert gap(answers(small(padding="none"), batch), answers(small(padding="zero"), batch)) > 1e-4


def test_more_keypoints_than_slots_are_taken_as_they_are():
    few, batch = small(slots=3), toy_batch(hidden=0.)
    assert answers(few, batch).shape[-2] == 5
    with pytest.raises(DataError, match="80 keypoints, but room for 70"): few(_pad_slots(batch, 75))
    with pytest.raises(DataError, match="5 keypoints, but room for 3"): small(slots=3, identifier="order")(batch)


def test_an_episode_is_itself_beside_one_with_more_keypoints_than_slots():
    model, short, long = small(slots=8), toy_batch(1, 1, 1, 5, seed=1), toy_batch(1, 1, 1, 12, seed=2)
    wide, both = _pad_slots(short, 7), {}
    for name, value in vars(long).items():
        if torch.is_tensor(value): both[name] = torch.cat([getattr(wide, name), value])
    together = answers(model, replace(long, **both, links=(*short.links, *long.links)))
    assert gap(together[:1, :, :5], answers(model, short)) < 1e-5 and gap(together[1:], answers(model, long)) < 1e-5


def test_padding_is_drawn_anew_in_training_and_never_at_test():
    model, batch = small(), toy_batch(hidden=0.)
    assert gap(answers(model, batch), answers(model, batch)) == 0
    points, seen = batch.support_keypoints, batch.support_visible
    count = batch.valid.sum(-1)
    torch.manual_seed(0)
    a, b = (model.fill(points, seen, batch.links, count, True) for _ in range(2))
    torch.manual_seed(0)
    again = model.fill(points, seen, batch.links, count, True)
    assert torch.equal(a.points, again.points) and not torch.equal(a.points, b.points)
    assert torch.equal(a.points[:, :, :5], points)


def test_supports_and_queries_are_one_batch_to_batchnorm():
    model, batch = small().train(), toy_batch(3, 2, 4)
    counter = next(m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    model.training_step(batch)
    assert counter.num_batches_tracked == 1
    model.eval()(batch)
    assert counter.num_batches_tracked == 1


def test_at_the_start_every_keypoint_is_in_the_middle():
    torch.manual_seed(0)
    assert gap(answers(create_model("fmmp", dim=32, hidden=32), toy_batch()), torch.tensor(.5)) < 1e-6


@pytest.mark.parametrize("mining,alone", [("recurrent", 1), ("sequential", 3), ("query", 0)])
def test_what_is_looked_at_is_kept_on_request(mining, alone):
    model, batch = small(mining=mining, slots=7).eval(), toy_batch(2, 2, 3, hidden=0.)
    with torch.no_grad():
        assert model(batch).attention == {}
        assert len(model.miner.alone) == alone
        model.look = True
        answer = model(batch)
    seen, sides = answer.attention, ("query",) if mining == "query" else ("query", "support")
    assert sorted(seen) == [f"{s}.{l}.{k}" for s in sides for l in range(3) for k in ("points", "reference", "self", "weights")]
    assert seen["query.1.points"].shape == (2, 3, 7, 4, 4, 3, 4, 2) and seen["query.0.self"].shape == (2, 3, 4, 7, 7)
    torch.testing.assert_close(seen["query.2.weights"].sum((-2, -1)), torch.ones(2, 3, 7, 4, 4))
    torch.testing.assert_close(seen["query.1.reference"][..., :5, 0, :], answer.stages[:, :, 0])
    if alone:
        assert seen["support.2.weights"].shape == (2, 3, 2, 7, 4, 4, 3, 4)
        own = batch.support_keypoints[:, None].expand(2, 3, 2, 5, 2)
        torch.testing.assert_close(seen["support.2.reference"][..., :5, 0, :], own)


def test_support_values_do_not_depend_on_the_query():
    "So that the prompt may be kept: two portions of queries are the same as all at once."
    model, batch = small().eval(), toy_batch(2, 2, 4)
    with torch.no_grad():
        prompt = model.adapt(model.encode_all(batch.support_images), batch.support_keypoints, batch.support_visible, batch.links)
        query = model.encode_all(batch.query_images)
        whole = model.locate(prompt, query).keypoints
        parts = [model.locate(prompt, {k: v[:, s] for k, v in query.items()}).keypoints for s in (slice(3), slice(3, 4))]
    assert gap(torch.cat(parts, 1), whole) < 1e-5
    assert all(len(v) == 2 for v in prompt.values())


@pytest.mark.parametrize("options", [{}, dict(form="paper"), dict(padding="none")], ids=str)
def test_bfloat16(options):
    model, batch = small(**options).train(), toy_batch(3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16): loss = sum(model.training_step(batch).values())
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): answer = model.eval()(batch)
    assert answer.keypoints.dtype == torch.float32 and gap(answer.keypoints, answers(model, batch)) < .1


def test_checkpoint_keeps_the_answers(tmp_path):
    model = small(identifier="learned", frozen_bn=True, mining="sequential").eval()
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    assert torch.equal(answers(model, toy_batch()), answers(again, toy_batch()))
    assert again.config["dim"] == 32 and again.kind == "learned"


@pytest.mark.parametrize("options,said", [
    (dict(form="letter"), "form must be one of"), (dict(mining="twice"), "mining must be one of"),
    (dict(padding="uniform"), "padding must be one of"), (dict(identifier="name"), "identifier must be one of"),
    (dict(dim=30), "multiple of 4"), (dict(dim=64, heads=7), "multiple of 4 and of heads, got 64 and 7"),
    (dict(layers=0), "layers must be at least 1"), (dict(slots=0), "slots must be at least 1"),
    (dict(branches=0), "branches must be at least 1"), (dict(strides=(7,)), "strides"), (dict(hedas=8), "no option hedas")], ids=str)
def test_wrong_options(options, said):
    with pytest.raises(ConfigError, match=said): create_model("fmmp", **options)


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, batch = create_model("fmmp", dim=32, hidden=32, slots=8, layers=2), toy_batch(4, points=3, hidden=0.)
    optimizer, log = torch.optim.Adam(model.parameters(), 2e-3), []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model.training_step(batch)
        sum(loss.values()).backward()
        optimizer.step()
        log.append(loss["real"].item())
    assert np.mean(log[-5:]) < .6 * log[0], (log[0], log[-5:])
