"""POMNet against what the official code computed, its two short cuts against plain loops, and the laws of the contract."""
import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cape.errors import CheckpointError, ConfigError
from cape.models.base import (check_contract, create_model, load_model, rename_tensors, save_model, toy_batch)
from cape.models.pomnet import MatchingHead, from_official_pomnet, official_names, on_map

here = Path(__file__).parent / "golden"
cases = dict(a=dict(seed=1031, batch=1, shots=1, n_kpts=17),
             b=dict(seed=1012, batch=2, shots=5, n_kpts=[17, 39], p_vis_s=.93, p_vis_q=.8),
             grad=dict(seed=1043, batch=2, shots=2, n_kpts=[17, 9], p_vis_s=.9, p_vis_q=.8))
cases["train"] = cases["grad"]


def module(name):
    spec = importlib.util.spec_from_file_location(name, here / f"{name}.py")
    it = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(it)
    return it


@pytest.fixture(scope="module")
def state():
    "The filled weights under their official names."
    shapes = json.loads((here / "pomnet_names.json").read_text())
    return {n: torch.from_numpy(np.array(v)) for n, v in module("official_fill").fill_state_dict(shapes).items()}


@pytest.fixture(scope="module")
def official(state): return from_official_pomnet(state)


def golden(case, slots):
    "The case's batch with so many keypoint slots, and what the official code made of it."
    raw = {k: torch.from_numpy(v) for k, v in module("inputs").make_case(**cases[case]).items()}
    shots = lambda t: t.transpose(0, 1)
    batch = SimpleNamespace(
        support_images=shots(raw["img_s"]), query_images=raw["img_q"][:, None], links=None,
        support_keypoints=shots(raw["kp_s"])[:, :, :slots] / 256, support_visible=shots(raw["vis_s"])[:, :, :slots] > 0,
        query_keypoints=raw["kp_q"][:, None, :slots] / 256, query_visible=raw["vis_q"][:, None, :slots] > 0)
    return batch, np.load(here / f"pomnet_{case}.npz")


def near(ours, theirs, eps): np.testing.assert_allclose(np.asarray(ours), theirs, atol=eps, rtol=0)


@pytest.mark.parametrize("case,slots", [("a", 100), ("a", 17), ("b", 41)])
def test_evaluation_is_the_official_one(official, case, slots):
    batch, g = golden(case, slots)
    count, size = min(slots, g["query_proj"].shape[1]), len(batch.query_images)
    with torch.no_grad():
        prompt = official.adapt(official.encode_all(batch.support_images, "support"), batch.support_keypoints,
                                batch.support_visible)
        query = official.encode_all(batch.query_images)
        answer = official.locate(prompt, query)
        loss = official.loss(answer, batch)["heatmap"]
        tokens = official.interact(prompt["tokens"], query["memory"][:, 0], prompt["seen"])
    seen = prompt["seen"].numpy()
    assert (seen == g["mask_s"][:, :slots, 0]).all() and 0 < seen.sum() < seen.size or slots == 17
    near(prompt["tokens"][:, :count, ::4], g["query_proj"][:, :count], 1e-4)
    near(query["memory"][:, 0, ::8], g["memory"], 2e-4)
    near(tokens[:, :count, ::4], g["dec_norm"][:, :count], 2e-4)
    maps = answer.similarity[:, 0]
    near(maps[:, :count, ::4, ::4], g["heatmaps_stride4"][:, :count], 1e-4)
    near(torch.stack([maps.mean((2, 3)), maps.std((2, 3), correction=0)], -1), g["heatmaps_mean_std"][:, :slots], 1e-4)
    near(loss, g["loss/mse_loss"], 1e-6)
    side = 1.15 * (1 + .1 * np.arange(size)) * 200
    centre = np.array([123.5, 87.25]) + 7 * np.arange(size)[:, None]
    image = answer.keypoints[:, 0].numpy() * side[:, None, None] + (centre - side[:, None] / 2)[:, None]
    near(image[seen], g["decoded"][:, :slots, :2][seen], 1e-3)
    near(answer.confidence[:, 0].numpy()[seen], g["decoded"][:, :slots, 2][seen].clip(0, 1), 1e-4)
    assert (answer.keypoints[:, 0].numpy()[~seen] == .5).all() and (answer.confidence[:, 0].numpy()[~seen] == 0).all()


def gradients(model, names, g):
    "Own parameter names in the official order, and the relative differences of the gradients' norms."
    own = {k: next(iter(rename_tensors({k: torch.zeros(1)}, official_names))) for k in names}
    parameters = dict(model.named_parameters())
    trained = [n for n in names if own[n] in parameters]
    norms = np.array([float(parameters[own[n]].grad.norm()) for n in trained])
    assert not g["grad_is_none"].any() and len(trained) == len(g["grad_norm"]) == len(parameters)
    return own, abs(norms - g["grad_norm"]) / g["grad_norm"]


def test_gradients_are_the_official_ones(state, official):
    batch, g = golden("grad", 17)
    model = copy.deepcopy(official)
    answer = model(batch)
    loss = model.loss(answer, batch)["heatmap"]
    loss.backward()
    near(loss.detach(), g["loss/mse_loss"], 1e-6)
    own, off = gradients(model, state, g)
    assert off.max() < 2e-3, off.max()
    for name in ("transformer.decoder.post_norm.bias", "relation_model.conv.bn.bias", "final_layer.weight",
                 "input_proj.bias", "query_proj.bias"):
        theirs = g[f"grad/keypoint_head.{name}"]
        ours = model.get_parameter(own[f"keypoint_head.{name}"]).grad.flatten()
        near(ours, theirs, 5e-3 * abs(theirs).max())


def test_training_normalises_as_the_official_code_does(state, official):
    batch, g = golden("train", 17)
    model = copy.deepcopy(official).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout): part.p = 0.
        if isinstance(part, nn.MultiheadAttention): part.dropout = 0.
    answer = model(batch)
    loss = model.loss(answer, batch)["heatmap"]
    loss.backward()
    near(loss.detach(), g["loss/mse_loss"], 3e-5)
    near(answer.similarity[:, 0, :, ::4, ::4].detach(), g["heatmaps_stride4"][:, :17], 5e-3)
    own, off = gradients(model, state, g)
    assert off.max() < 2e-2, off.max()
    buffers = dict(model.named_buffers())
    for key in (k for k in g.files if k.startswith("buffer/")):
        near(buffers[own[key[7:]]], g[key], 2e-3 * abs(g[key]).max() if g[key].dtype.kind == "f" else 0)


def test_misfits_are_named(state):
    some = {**state, "keypoint_head.final_layer.bias": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"wrong shape: head.final.bias \(2,\) instead of \(1,\)"):
        from_official_pomnet(some)
    with pytest.raises(CheckpointError, match="unexpected: backbone.conv1.weight"):
        from_official_pomnet({**state, "backbone.conv1.weight": torch.zeros(1)})
    lacking = {k: v for k, v in state.items() if "input_proj.bias" not in k}
    with pytest.raises(CheckpointError, match="missing: query_proj.bias"): from_official_pomnet(lacking)


# ---- the matching head: short cuts against the plain way -----------------------------------------

def head(dim=8, deconvs=2, seed=0):
    "A head whose weights and statistics are not special."
    torch.manual_seed(seed)
    it = MatchingHead(dim, deconvs)
    for name, value in (*it.named_parameters(), *it.named_buffers()):
        if value.is_floating_point(): value.data = torch.rand_like(value) + .5 if "var" in name else torch.randn_like(value)
    return it


def plainly(it, token, memory):
    "One slot, step by step: the token (M,C) on every place beside the map, and all layers."
    x = torch.cat([memory, token[..., None, None].expand_as(memory)], 1)
    x = F.relu(it.norms[0](it.relation(x)))
    for deconv, norm in zip(it.deconvs, it.norms[1:]): x = F.relu(norm(deconv(x)))
    return it.final(x)[:, 0]


@pytest.mark.parametrize("h,w", [(5, 4), (2, 2), (1, 3)])
def test_split_convolution_is_the_whole_one(h, w):
    it, tokens, memory = head().eval(), torch.randn(3, 5, 8), torch.randn(3, 8, h, w)
    seen = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    tokens = torch.where(F.pad(seen, (0, 1))[..., None], tokens, tokens[:, -1:])     # hidden ones are all alike
    with torch.no_grad():
        plain = torch.stack([plainly(it, tokens[:, k], memory) for k in range(4)], 1)
        ours = it(tokens, memory, seen)
    torch.testing.assert_close(ours, plain, atol=1e-4 * plain.abs().max().item(), rtol=0)
    assert on_map(3, 3).sum(1).tolist() == [4, 6, 4, 6, 9, 6, 4, 6, 4]


@pytest.mark.parametrize("slots", [100, 4, 3])
def test_batchnorm_slot_by_slot_is_the_plain_loop(slots):
    it, tokens, memory = head(deconvs=1).train(), torch.randn(3, 5, 8), torch.randn(3, 8, 4, 4)
    other = copy.deepcopy(it)
    plain = [plainly(other, tokens[:, min(k, 4)], memory) for k in range(max(slots, 4))][:4]
    ours = it(tokens, memory, torch.ones(3, 4).bool(), slots)
    torch.testing.assert_close(ours, torch.stack(plain, 1), atol=1e-4, rtol=1e-4)
    (ours.square().sum()).backward(), torch.stack(plain, 1).square().sum().backward()
    for (name, p), q in zip(it.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4 * q.grad.abs().max().item(), rtol=1e-3, msg=name)
    for p, q in zip(it.buffers(), other.buffers()): torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
    assert it.norms[0].num_batches_tracked == max(slots, 4)


def test_without_slots_only_seen_tokens_count():
    "BatchNorm over all seen tokens together; the loss divides by their number."
    torch.manual_seed(0)
    model, batch = create_model("pomnet", slots=None, dropout=0.).train(), toy_batch(4)
    answer = model(batch)
    seen = batch.support_visible[:, 0, None]
    assert (answer.similarity[~seen] == 0).all() and (answer.similarity[seen].flatten(1).std(1) > 0).all()
    assert model.head.norms[0].num_batches_tracked == 1
    both = seen & batch.query_visible
    each = create_model("pomnet").loss(answer, batch)["heatmap"] * 100 * 4
    torch.testing.assert_close(model.loss(answer, batch)["heatmap"], each / both.sum())


# ---- the model -------------------------------------------------------------------------------------

switches = [{}, dict(self_attention=False, cross_attention=False), dict(head="dot"), dict(self_attention=False),
            dict(cross_attention=False), dict(shots_mask="any"), dict(loss="ce"), dict(slots=None),
            dict(backbone="resnet18", dim=32, heads=4, hidden=64, deconvs=2)]


@pytest.mark.parametrize("options", switches, ids=str)
def test_contract(options):
    "Every row of the paper's Table 3 and every other option."
    torch.manual_seed(0)
    check_contract(roused(create_model("pomnet", **options)))


def roused(model):
    "`model` with answers that differ: the published start makes maps of almost nothing."
    if model.head is not None:
        for p in model.head.parameters(): p.data = torch.randn_like(p) * .2
    return model


@pytest.mark.parametrize("options", switches[:6], ids=str)
def test_every_parameter_is_trained(options):
    torch.manual_seed(0)
    model = roused(create_model("pomnet", **options))
    sum(model.training_step(toy_batch(3, 2, 2)).values()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in idle if ".side.0." not in n] == []      # the small backbone's stride 4, not asked for


def test_shots_are_encoded_one_by_one_in_training():
    torch.manual_seed(0)
    model, batch = create_model("pomnet").train(), toy_batch(3, 2)
    model.encode_all(batch.support_images, "support")
    counter = next(m for m in model.support_backbone.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked
    assert counter == 2
    model.encode_all(batch.query_images)
    assert next(m for m in model.query_backbone.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked == 1


def test_a_keypoint_must_be_seen_on_all_shots_or_on_any():
    batch = toy_batch(2, 3, hidden=.5)
    for rule, expected in (("all", batch.support_visible.all(1)), ("any", batch.support_visible.any(1))):
        model = roused(create_model("pomnet", shots_mask=rule)).eval()
        with torch.no_grad(): answer = model(batch)
        assert torch.equal(answer.confidence[:, 0] > 0, expected & (answer.similarity[:, 0].amax((2, 3)) > 0))
        assert (answer.keypoints[:, 0][~expected] == .5).all()


def test_attention_is_kept_on_request():
    torch.manual_seed(0)
    model, batch = create_model("pomnet").eval(), toy_batch(2, 1, 3)
    with torch.no_grad():
        assert model(batch).attention == {}
        model.look = True
        seen = model(batch).attention
    assert sorted(seen) == [f"layer{i}.{k}" for i in range(3) for k in ("cross", "self")]
    assert seen["layer0.self"].shape == (2, 3, 4, 5, 5) and seen["layer0.cross"].shape == (2, 3, 4, 5, 64)
    for weights in seen.values(): torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("options", [{}, dict(loss="ce", slots=None), dict(head="dot")], ids=str)
def test_bfloat16(options):
    torch.manual_seed(0)
    model, batch = create_model("pomnet", **options), toy_batch(3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16): loss = sum(model.training_step(batch).values())
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): answer = model.eval()(batch)
    assert answer.similarity.dtype == torch.float32 and torch.isfinite(answer.keypoints).all()


def test_checkpoint_keeps_the_answers(tmp_path):
    torch.manual_seed(0)
    model = roused(create_model("pomnet", dim=32, slots=None)).eval()
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    batch = toy_batch()
    with torch.no_grad(): assert torch.equal(model(batch).keypoints, again(batch).keypoints)
    assert again.config["dim"] == 32 and again.slots is None


@pytest.mark.parametrize("options,said", [
    (dict(head="mlp"), "head must be one of"), (dict(loss="l1"), "loss must be one of"), (dict(dim=30), "multiple of 4"),
    (dict(dim=64, heads=7), "multiple of 4 and of heads"), (dict(slots=0), "slots must be"), (dict(stride=7), "strides"),
    (dict(shots_mask="most"), "shots_mask must be one of"), (dict(hedas=8), "no option hedas")], ids=str)
def test_wrong_options(options, said):
    with pytest.raises(ConfigError, match=said): create_model("pomnet", **options)


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, batch = create_model("pomnet", dim=32, hidden=64, layers=1), toy_batch(4, points=3, hidden=0.)
    optimizer, first = torch.optim.Adam(model.parameters(), 3e-3), None
    for _ in range(40):
        optimizer.zero_grad()
        loss = sum(model.training_step(batch).values())
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < .5 * first, (first, loss.item())
