"""CapeFormer against what the official code computed, and the laws of the contract for every switch."""
import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cape.errors import CheckpointError, ConfigError, DataError
from cape.layers.attention import sine_grid
from cape.models.base import check_contract, create_model, load_model, rename_tensors, save_model, toy_batch
from cape.models.capeformer import (cell_centres, from_official_capeformer, inverse_sigmoid, mean_place, official_names,
                                    propose, small_targets, visible_mean)

here = Path(__file__).parent / "golden"
cases = dict(a=dict(seed=1021, batch=1, shots=1, n_kpts=17),
             b=dict(seed=1022, batch=2, shots=5, n_kpts=[17, 39], p_vis_s=.93, p_vis_q=.8),
             empty=dict(seed=1054, batch=2, shots=1, n_kpts=[17, 12], force_hidden=[(1, 0, k) for k in range(12)]),
             grad=dict(seed=1043, batch=2, shots=2, n_kpts=[17, 9], p_vis_s=.9, p_vis_q=.8))
cases.update(clamp=cases["a"], train=cases["grad"])
terms = dict(heatmap="heatmap_loss", proposal="proposal_loss", stage1="l1_loss_layer0", stage2="l1_loss_layer1",
             stage3="l1_loss_layer2")


def module(name):
    spec = importlib.util.spec_from_file_location(name, here / f"{name}.py")
    it = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(it)
    return it


fill, inputs = module("official_fill"), module("inputs")


def filled(name, shape, gains=None):
    return torch.from_numpy(np.array(fill.fill_array(name, shape, fill.ALIAS["capeformer"], gains)))


@pytest.fixture(scope="module")
def state():
    "The filled weights under their official names, the backbone under one of its two."
    shapes = json.loads((here / "capeformer_names.json").read_text())
    return {n: filled(n, s) for n, s in shapes.items() if not n.startswith("encoder_query.")}


@pytest.fixture(scope="module")
def official(state): return from_official_capeformer(state)


def golden(case, slots=100):
    "The case's batch with so many keypoint slots, and what the official code made of it."
    raw = {k: torch.from_numpy(v) for k, v in inputs.make_case(**cases[case]).items()}
    shots = lambda t: t.transpose(0, 1)
    batch = SimpleNamespace(
        support_images=shots(raw["img_s"]), query_images=raw["img_q"][:, None], links=None,
        support_keypoints=shots(raw["kp_s"])[:, :, :slots] / 256, support_visible=shots(raw["vis_s"])[:, :, :slots] > 0,
        query_keypoints=raw["kp_q"][:, None, :slots] / 256, query_visible=raw["vis_q"][:, None, :slots] > 0)
    return batch, np.load(here / f"capeformer_{case}.npz")


def near(ours, theirs, eps): np.testing.assert_allclose(np.asarray(ours), theirs, atol=eps, rtol=0)


def compare(model, batch, g, eps=1.):
    "Every answer and every loss term; `eps` times the published tolerances."
    answer = model(batch)
    steps, slots = answer.stages[:, 0].detach(), answer.stages.shape[3]
    few = min(slots, g["similarity"].shape[1])
    near(answer.similarity[:, 0, :few].detach(), g["similarity"][:, :few], 3e-3 * eps)
    near(mean_place(answer.similarity[:, 0]).detach(), g["proposals_for_loss"][:, :slots], 1e-4 * eps)
    near(steps[:, 0], g["proposals"][:, :slots], 5e-5 * eps)
    near(steps[:, 1:].transpose(0, 1), g["keypoints"][:, :, :slots], 5e-5 * eps)
    loss = model.loss(answer, batch)
    assert list(loss) == list(terms)
    for ours, theirs in terms.items(): near(loss[ours].detach(), g[f"loss/{theirs}"], 2e-5 * eps)
    return answer, loss


@pytest.mark.parametrize("case,slots", [("a", 100), ("a", 17), ("b", 100), ("b", 39), ("empty", 100)])
def test_evaluation_is_the_official_one(official, case, slots):
    batch, g = golden(case, slots)
    with torch.no_grad(): answer, _ = compare(official, batch, g)
    seen = torch.from_numpy(g["mask_s"])[:, :slots, 0] > 0
    assert torch.equal(answer.confidence[:, 0] > 0, seen)
    assert torch.equal(answer.keypoints[:, 0][seen], answer.stages[:, 0, -1][seen])
    assert (answer.keypoints[:, 0][~seen] == .5).all()


def test_tokens_and_encoder_are_the_official_ones(official):
    batch, g = golden("b")
    with torch.no_grad():
        prompt = official.adapt(official.encode_all(batch.support_images, "support"), batch.support_keypoints,
                                batch.support_visible)
        memory = official.encode_all(batch.query_images)["query"][:, 0].flatten(2).mT
        names = official.identifier(2, 100)
        refined, after = official.mix(prompt["tokens"], memory, names, sine_grid(8, 8), prompt["hidden"], None)
    near(prompt["tokens"][:, :41, ::4], g["query_proj"], 3e-4)
    near(after.mT.unflatten(-1, (8, 8))[:, ::8], g["memory"], 6e-4)
    near(refined[:, :41, ::8], g["refined_support"], 6e-4)


def test_inverse_sigmoid_is_clamped_as_in_the_official_code(official, state):
    "With larger steps coordinates reach the border, where its eps counts."
    batch, g = golden("clamp")
    model, gains = copy.deepcopy(official), {**fill.GAINS, "mlp": 2.}
    for name in (n for n in state if ".mlp." in n):
        own = next(iter(rename_tensors({name: state[name]}, official_names)))
        model.get_parameter(own).data = filled(name, state[name].shape, gains)
    with torch.no_grad(): compare(model, batch, g)


def gradients(model, g, key):
    "Relative difference of the norm of every parameter's gradient; official name -> our gradient."
    theirs = bytes(g["parameters"]).decode().split("\n")
    own = {n: next(iter(rename_tensors({n: torch.zeros(1)}, official_names))) for n in theirs}
    assert sorted(own.values()) == sorted(n for n, _ in model.named_parameters())
    grads = {n: model.get_parameter(own[n]).grad for n in theirs}
    norms = np.array([0. if v is None else v.norm().item() for v in grads.values()])
    return np.abs(norms - g[key]) / np.maximum(np.abs(g[key]), 1e-6), grads, own


def check_slices(g, grads, eps):
    for name in (k[5:] for k in g.files if k.startswith("grad/")):
        ours, theirs = grads[name].flatten()[:256], g[f"grad/{name}"]
        near(ours, theirs, eps * np.abs(theirs).max())


def test_gradients_are_the_official_ones(official):
    "Of all terms together, and of the decoder's alone, which reach the proposals through one position code."
    (batch, g), model = golden("grad", 17), copy.deepcopy(official)
    answer, loss = compare(model, batch, g)
    sum(loss.values()).backward(retain_graph=True)
    off, grads, _ = gradients(model, g, "grad_norm")
    assert off.max() < 5e-3, off.max()
    check_slices(g, grads, 1e-2)
    model.zero_grad()
    sum(v for k, v in loss.items() if k.startswith("stage")).backward()
    off, grads, _ = gradients(model, g, "grad_norm_l1_losses_only")
    assert off.max() < 5e-3, off.max()
    assert grads["keypoint_head.transformer.proposal_generator.query_proj.weight"].norm() > 0


def test_a_layer_sends_gradient_one_step_back(official):
    (batch, _), model = golden("a", 17), copy.deepcopy(official)
    model.loss(model(batch), batch)["stage3"].backward()
    reached = [b[-1].weight.grad is not None and b[-1].weight.grad.abs().sum() > 0 for b in model.decoder.branches]
    assert reached == [False, True, True]


def test_training_normalises_as_the_official_code_does(official):
    (batch, g), model = golden("train", 17), copy.deepcopy(official).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout): part.p = 0.
        if isinstance(part, nn.MultiheadAttention): part.dropout = 0.
    answer, loss = compare(model, batch, g, eps=20.)
    for ours, theirs in terms.items(): assert loss[ours].item() == pytest.approx(float(g[f"loss/{theirs}"]), rel=1e-3)
    sum(loss.values()).backward()
    off, grads, own = gradients(model, g, "grad_norm")
    assert off.max() < 2e-2, off.max()
    buffers = dict(model.named_buffers())
    for key in (k for k in g.files if k.startswith("buffer/")):
        own = next(iter(rename_tensors({key[7:]: torch.zeros(1)}, official_names)))
        near(buffers[own].flatten()[:g[key].size], g[key].ravel(), 1e-4)


def test_small_pieces_are_the_official_ones():
    g = np.load(here / "golden_functions.npz")
    near(inverse_sigmoid(torch.from_numpy(g["inverse_sigmoid_in"])), g["inverse_sigmoid_out"], 1e-5)
    assert inverse_sigmoid(torch.zeros(1)).item() == pytest.approx(np.log(1e-3))


# ---- names ---------------------------------------------------------------------------------------

def test_either_alias_will_do_and_a_wrapper_too(state, official):
    other = {n.replace("encoder_sample.", "encoder_query."): t for n, t in state.items()}
    for given in (other, {"state_dict": state, "meta": {}}, {**state, **other}):
        model = from_official_capeformer(given)
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in official.state_dict().items())
    assert sum(p.numel() for p in official.parameters()) == 36_524_998 and not official.training


def test_misfits_are_named(state):
    some = {**state, "keypoint_head.input_proj.bias": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"wrong shape: input_proj.bias \(2,\) instead of \(256,\)"):
        from_official_capeformer(some)
    with pytest.raises(CheckpointError, match="unexpected: backbone.conv1.weight"):
        from_official_capeformer({**state, "backbone.conv1.weight": torch.zeros(1)})
    lacking = {k: v for k, v in state.items() if not k.endswith("ref_point_head.layers.1.bias")}
    with pytest.raises(CheckpointError, match="missing: decoder.point_head.2.bias"): from_official_capeformer(lacking)
    twice = {**state, "encoder_query.bn1.bias": state["encoder_sample.bn1.bias"] + 1}
    with pytest.raises(CheckpointError, match="stored twice with different values: encoder_query.bn1.bias"):
        from_official_capeformer(twice)


# ---- pieces --------------------------------------------------------------------------------------

def test_a_proposal_is_the_mean_in_a_window_cut_at_the_border():
    torch.manual_seed(0)
    maps = 3 * torch.randn(200, 5, 7)
    place, mass = propose(maps)
    chance, centres = maps.flatten(1).softmax(-1).view_as(maps), cell_centres(5, 7)
    for m, p, c, total in zip(maps, place, chance, mass):
        y, x = divmod(m.argmax().item(), 7)
        box = slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2)
        torch.testing.assert_close(c[box].sum(), total)
        torch.testing.assert_close((c[box][..., None] * centres[box]).sum((0, 1)) / c[box].sum(), p)
    torch.testing.assert_close(mean_place(maps), (chance[..., None] * centres).sum((1, 2)))


@pytest.mark.parametrize("size", [(8, 8), (12, 12), (16, 16)])
def test_targets_have_peak_one_at_the_nearest_cell(size):
    points = torch.rand(1, 40, 2, generator=torch.Generator().manual_seed(0))
    maps, weight = small_targets(points, torch.ones(1, 40).bool(), size)
    assert maps.amax((2, 3)).sub(1).abs().max() < 1e-5 and (weight == 1).all()
    top = cell_centres(*size).view(-1, 2)[maps[0].flatten(1).argmax(-1)]
    assert (top - points[0]).abs().max() < .5 / size[0] + 1 / 64
    empty, weight = small_targets(points, torch.zeros(1, 40).bool(), size)
    assert not empty.any() and not weight.any()


def test_mean_over_visible_ones_of_each_pair():
    values, weight = torch.tensor([[1., 3., 9.], [5., 7., 9.], [1., 1., 1.]]), torch.tensor([[1., 1, 0], [0, 1, 0], [0, 0, 0]])
    assert visible_mean(values, weight).item() == pytest.approx((2 + 7 + 0) / 3)


# ---- the model -----------------------------------------------------------------------------------

switches = [{}, dict(encoder="detr"), dict(stages="one"), dict(encoder="detr", stages="one"), dict(identifier="none"),
            dict(identifier="learned"), dict(identifier="shuffled"), dict(position="qk"), dict(loss="mse"),
            dict(loss="mse", heatmap_weight=0), dict(proposal_weight=0, refine_weight=1 / 3),
            dict(backbone="resnet18", dim=32, heads=4, hidden=64)]


def small(**options):
    "A small model with answers that differ: the published start leaves all points at much the same proposal."
    torch.manual_seed(0)
    model = create_model("capeformer", **{**dict(dim=32, heads=4, hidden=64), **options})
    for weight in (model.query_proj.weight, model.input_proj.weight, model.proposer.query_proj.weight): weight.data *= 8
    for branch in model.decoder.branches if model.decoder is not None else ():
        nn.init.normal_(branch[-1].weight, std=.3)
    return model


@pytest.mark.parametrize("options", switches, ids=str)
def test_contract(options):
    "Every row of the paper's Tables 3 to 5, and the options of our own."
    model = small(**options)
    assert model.equivariant == (options.get("identifier") == "none")
    check_contract(model)


@pytest.mark.parametrize("options", switches, ids=str)
def test_every_parameter_is_trained(options):
    model = small(**options)
    model.train()
    loss = model.training_step(toy_batch(3, 2, 2))
    sum(loss.values()).backward()
    wanted = [k for k, weight in (("heatmap", model.heatmap_weight), ("proposal", model.proposal_weight)) if weight]
    assert list(loss) == wanted + [f"stage{i}" for i in (1, 2, 3) if model.decoder is not None]
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in idle if not n.startswith("backbone.side.0")] == []     # stride 4, not asked for


def answers(model, batch):
    with torch.no_grad(): return model.eval()(batch).keypoints


def test_eight_at_once_are_eight_alone_and_padding_changes_nothing():
    from cape.models.base import _one_episode, _one_query, _pad_slots
    model, batch = small(), toy_batch(8, 2, 15)
    whole = answers(model, batch)
    for b in range(8): assert (answers(model, _one_episode(batch, b)) - whole[b:b + 1]).abs().max() < 1e-5
    for q in (0, 7, 14): assert (answers(model, _one_query(batch, q)) - whole[:, q:q + 1]).abs().max() < 1e-5
    assert (answers(model, _pad_slots(batch, 60))[..., :5, :] - whole).abs().max() < 1e-5


@pytest.mark.parametrize("kind,same", [("none", True), ("fixed", False), ("learned", False), ("shuffled", False)])
def test_an_identifier_is_what_makes_the_order_count(kind, same):
    from cape.models.base import _permute_slots
    model, batch, order = small(identifier=kind), toy_batch(hidden=0.), torch.tensor([3, 0, 4, 1, 2])
    gap = (answers(model, _permute_slots(batch, order)) - answers(model, batch)[..., order, :]).abs().max()
    assert (gap < 1e-5) == same


def test_keypoints_have_answers_of_their_own():
    "Otherwise the laws above would hold of a model that mixes them up."
    assert answers(small(), toy_batch(hidden=0.)).std(2).min() > 2e-3


def test_more_keypoints_than_identifiers():
    with pytest.raises(DataError, match="5 keypoints, but identifiers for 4"): small(slots=4)(toy_batch())


def test_shots_are_encoded_one_by_one_in_training():
    model, batch = small().train(), toy_batch(3, 2, 4)
    counter = next(m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    model(batch)
    assert counter.num_batches_tracked == 3                                      # two shots, and the queries
    model.eval()(batch)
    assert counter.num_batches_tracked == 3


def test_a_keypoint_counts_if_seen_on_every_shot():
    batch = toy_batch(3, 3, hidden=.4)
    with torch.no_grad(): answer = small().eval()(batch)
    assert torch.equal(answer.confidence[:, 0] > 0, batch.support_visible.all(1))


def test_at_the_start_every_stage_is_the_proposal():
    torch.manual_seed(0)
    with torch.no_grad(): steps = create_model("capeformer", dim=32, heads=4).eval()(toy_batch()).stages
    assert (steps - steps[:, :, :1]).abs().max() < 1e-5


def test_attention_is_kept_on_request():
    model, batch = small(encoder_layers=2).eval(), toy_batch(2, 1, 3)
    with torch.no_grad():
        assert model(batch).attention == {}
        model.look = True
        seen = model(batch).attention
    assert sorted(seen) == [f"decoder.{i}.{k}" for i in range(3) for k in ("cross", "self")] + ["encoder.0", "encoder.1"]
    assert seen["encoder.0"].shape == (2, 3, 4, 69, 69) and seen["decoder.2.cross"].shape == (2, 3, 4, 5, 64)
    for weights in seen.values(): torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("options", [{}, dict(loss="mse"), dict(stages="one")], ids=str)
def test_bfloat16(options):
    model, batch = small(**options).train(), toy_batch(3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16): loss = sum(model.training_step(batch).values())
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): answer = model.eval()(batch)
    assert answer.similarity.dtype == answer.keypoints.dtype == torch.float32 and torch.isfinite(answer.keypoints).all()


def test_checkpoint_keeps_the_answers(tmp_path):
    model = small(identifier="learned", frozen_bn=True).eval()
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    assert torch.equal(answers(model, toy_batch()), answers(again, toy_batch()))
    assert again.config["dim"] == 32 and again.identifier.kind == "learned"


@pytest.mark.parametrize("options,said", [
    (dict(encoder="none"), "encoder must be one of"), (dict(stages="three"), "stages must be one of"),
    (dict(identifier="name"), "identifier must be one of"), (dict(position="v"), "position must be one of"),
    (dict(loss="l1"), "loss must be one of"), (dict(dim=30), "multiple of 4"), (dict(dim=64, heads=7), "multiple of 4 and of heads, got 64 and 7"),
    (dict(stride=7), "strides"), (dict(layers=0), "layers and encoder_layers must be"),
    (dict(encoder_layers=0), "encoder_layers must be"), (dict(hedas=8), "no option hedas"),
    (dict(stages="one", heatmap_weight=0, proposal_weight=0), "has no loss")], ids=str)
def test_wrong_options(options, said):
    with pytest.raises(ConfigError, match=said): create_model("capeformer", **options)


def test_another_feed_forward_part_can_be_put_in():
    "As a graph network needs: it is made by the class, and handed the prompt's graph."
    from cape.models.capeformer import CapeFormer

    class Sum(nn.Module):
        def forward(self, tokens, graph): return 3 * graph @ tokens

    class WithGraph(CapeFormer):
        def make_ffn(self): return Sum()
        def adapt(self, support, keypoints, visible, links=None):
            prompt = super().adapt(support, keypoints, visible, links)
            return {**prompt, "graph": torch.eye(visible.shape[-1]).roll(self.step, 0).expand(len(visible), -1, -1)}
    torch.manual_seed(0)
    model, batch = WithGraph(dim=32, heads=4, hidden=64).eval(), toy_batch(2, 1, 3)
    for branch in model.decoder.branches: nn.init.normal_(branch[-1].weight, std=.3)
    found = []
    for model.step in (0, 1): found.append(answers(model, batch))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, batch = create_model("capeformer", dim=32, heads=4, hidden=64, layers=2), toy_batch(4, points=3, hidden=0.)
    optimizer, first = torch.optim.Adam(model.parameters(), 3e-3), None
    for _ in range(60):
        optimizer.zero_grad()
        loss = sum(model.training_step(batch).values())
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < .5 * first, (first, loss.item())
