"GraphCape: the graph in its decoder by hand, the laws of the contract, Swin-V2, and names of published weights."
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cape.errors import CheckpointError, ConfigError, DataError, MissingFileError
from cape.layers.graph import adjacency
from cape.models.base import check_contract, create_model, load_model, save_model, toy_batch
from cape.models.graphcape import (GraphFeedForward, SwinMaps, from_official_graphcape, make_swin, skeleton_matrix)

here = Path(__file__).parent / "golden"


# ---- the feed-forward part -----------------------------------------------------------------------

@pytest.mark.parametrize("where", ["pre", "post", "both"])
def test_the_part_is_what_a_loop_makes(where):
    "1/links of the *sender*, ReLU after each graph convolution, zeros for slots that are not valid."
    torch.manual_seed(0)
    part, x = GraphFeedForward(6, 5, 0., where), torch.randn(1, 5, 6)
    hidden = torch.tensor([[False, False, True, False, False]])
    links = torch.tensor([[0, 1], [0, 3], [1, 2], [1, 0]])                       # 4 has none
    near = {0: [1, 3], 1: [0], 3: [0], 4: []}

    def graph_layer(conv, x):
        (w1, w2), (b1, b2) = conv.linear.weight.chunk(2), conv.linear.bias.chunk(2)
        out = torch.zeros(5, len(w1))
        for w in near: out[w] = w1 @ x[w] + b1 + sum((w2 @ x[v] + b2) / len(near[v]) for v in near[w])
        return out.relu()
    y = graph_layer(part.linear1, x[0]) if part.first else part.linear1(x[0]).relu()
    y = graph_layer(part.linear2, y) if part.second else part.linear2(y)
    torch.testing.assert_close(part(x, skeleton_matrix([links], hidden))[0][~hidden[0]], y[~hidden[0]])


def test_the_matrix_says_who_is_valid():
    hidden = torch.tensor([[False, True, False], [True, True, True]])
    matrix = skeleton_matrix([torch.tensor([[0, 1], [0, 2]]), None], hidden)
    assert matrix.tolist() == [[[1, 0, 1], [0, 0, 0], [1, 0, 1]], [[1, 0, 0], [0, 0, 0], [0, 0, 0]]]  # slot 0 is opened


# ---- the model -----------------------------------------------------------------------------------

switches = [{}, dict(graph_decoder="post"), dict(graph_decoder="both"), dict(graph_decoder="none"), dict(norm="receiver"),
            dict(norm="symmetric"), dict(identifier="fixed"), dict(stages="one"), dict(encoder="detr"), dict(loss="mse"),
            dict(backbone="resnet18"), dict(backbone="swinv2_tiny", options={"size": 64})]


def small(**options):
    "A small model with answers that differ: the published start leaves all points at their proposal."
    torch.manual_seed(0)
    model = create_model("graphcape", **{**dict(dim=32, heads=4, hidden=64), **options})
    for weight in (model.query_proj.weight, model.input_proj.weight, model.proposer.query_proj.weight): weight.data *= 8
    for branch in model.decoder.branches if model.decoder is not None else ():
        nn.init.normal_(branch[-1].weight, std=.3)
    return model


@pytest.mark.parametrize("options", switches, ids=str)
def test_contract(options):
    model = small(**options)
    assert model.equivariant == (options.get("identifier") is None)
    assert ("permutation" in check_contract(model)) == model.equivariant


@pytest.mark.parametrize("options", switches, ids=str)
def test_every_parameter_is_trained(options):
    model = small(**options).train()
    sum(model.training_step(toy_batch(3, 2, 2)).values()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    small_one = model.config["backbone"] == "small"
    assert [n for n in idle if not (small_one and n.startswith("backbone.side.0"))] == []


def answers(model, batch):
    with torch.no_grad(): return model.eval()(batch).keypoints


def test_eight_at_once_are_eight_alone():
    from cape.models.base import _one_episode, _one_query, _pad_slots
    model, batch = small(), toy_batch(8, 2, 5)
    whole = answers(model, batch)
    for b in range(8): assert (answers(model, _one_episode(batch, b)) - whole[b:b + 1]).abs().max() < 1e-5
    for q in (0, 4): assert (answers(model, _one_query(batch, q)) - whole[:, q:q + 1]).abs().max() < 1e-5
    assert (answers(model, _pad_slots(batch, 60))[..., :5, :] - whole).abs().max() < 1e-5
    assert whole.std(2).min() > 2e-3                                 # or the above would hold of a mixture as well


def with_links(batch, *pairs): return replace(batch, links=tuple(torch.tensor(p).reshape(-1, 2) for p in pairs))


@pytest.mark.parametrize("where", ["pre", "post", "both"])
def test_links_count_and_their_order_does_not(where):
    model, batch = small(graph_decoder=where), toy_batch(2, 1, 3, hidden=0.)
    base = answers(model, batch)                                    # a chain of five
    same = with_links(batch, [[4, 3], [1, 0], [2, 1], [3, 2], [0, 1], [2, 2]], [[0, 1], [1, 2], [2, 3], [3, 4]])
    assert (answers(model, same) - base).abs().max() < 1e-6
    other = answers(model, with_links(batch, [[0, 2], [2, 4]], [[0, 1], [1, 2], [2, 3], [3, 4]]))
    assert (other[0] - base[0]).abs().max() > 1e-3 and torch.equal(other[1], base[1])       # of that episode alone


def test_without_links_each_keypoint_is_for_itself():
    "Then the first half of the graph convolution's weights is a plain layer."
    model, batch = small(), toy_batch(3, 1, 2)
    plain = small(graph_decoder="none")
    state = {}
    for name, tensor in model.state_dict().items():
        state[name.replace("linear1.linear", "linear1")] = tensor.chunk(2)[0] if "linear1.linear" in name else tensor
    plain.load_state_dict(state)
    torch.testing.assert_close(answers(model, with_links(batch, [], [], [])), answers(plain, batch))
    none = replace(batch, links=None)
    assert torch.equal(answers(model, none), answers(model, with_links(batch, [], [], [])))
    assert (answers(model, batch) - answers(plain, batch)).abs().max() > 1e-3


def test_the_demo_s_loop_is_no_link():
    model, batch = small(), toy_batch(1, 1, 1)
    assert torch.equal(answers(model, with_links(batch, [[0, 0]])), answers(model, with_links(batch, [])))


def test_lost_links_are_counted():
    "A keypoint counts only where every support shows it."
    model, batch = small().eval(), toy_batch(2, 2, 1, hidden=0.)
    seen = batch.support_visible.clone()
    seen[1, 1, 2] = False
    support = model.encode_all(batch.support_images, "support")
    prompt = model.adapt(support, batch.support_keypoints, seen, batch.links)
    assert prompt["lost"].tolist() == [0, 2]
    kept = [(0, 1), (3, 4)]
    assert sorted((i, j) for i, j in prompt["graph"][1].nonzero().tolist() if i < j) == kept


@pytest.mark.parametrize("pairs,said", [([[0, 5]], r"episode 1: \(0, 5\) names a keypoint outside 0..4"),
                                        ([[1, 2], [4, 5]], "count from 1: subtract 1"), ([[-1, 0]], "was 1 subtracted")])
def test_bad_links(pairs, said):
    with pytest.raises(DataError, match=said): small()(with_links(toy_batch(2), [[0, 1]], pairs))


@pytest.mark.parametrize("options,said", [
    (dict(graph_decoder="first"), r"graph_decoder must be one of \('pre', 'post', 'both', 'none'\), got 'first'"),
    (dict(norm="mean"), "norm must be"), (dict(identifier="name"), "identifier must be one of"), (dict(hedas=8), "no option hedas"),
    (dict(backbone="swinv2_tiny", stride=32), "maps of stride 16, not 32"), (dict(backbone="swinv2_tiny", weights="imagenet"), "give the file"),
    (dict(backbone="swinv2_tiny", options={"size": 100}), "multiple of 64, got 100")], ids=str)
def test_wrong_options(options, said):
    with pytest.raises(ConfigError, match=said): create_model("graphcape", **options)


def test_published_settings():
    model = create_model("graphcape", backbone="swinv2_tiny")
    assert (model.dim, model.hidden, model.heads, model.sigma, model.kind, model.dropout) == (256, 768, 8, 1., "mse", .1)
    assert (len(model.encoder), len(model.decoder.layers), model.stride, model.identifier.kind) == (3, 3, 16, "none")
    assert model.decoder.layers[0].ffn.linear1.linear.weight.shape == (1536, 256)
    assert model.encoder[0].ffn.linear1.weight.shape == (768, 256) and model.decoder.layers[0].ffn.linear1.norm == "sender"


def test_checkpoint_keeps_the_answers(tmp_path):
    for options in ({}, dict(backbone="swinv2_tiny", options={"size": 64}, graph_decoder="both")):
        model = small(**options).eval()
        again = load_model(save_model(model, tmp_path / "m.safetensors"))
        assert torch.equal(answers(model, toy_batch()), answers(again, toy_batch())) and again.config == model.config


def test_bfloat16():
    model, batch = small().train(), toy_batch(3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16): loss = sum(model.training_step(batch).values())
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, batch = create_model("graphcape", dim=32, heads=4, hidden=64, layers=2), toy_batch(4, points=3, hidden=0.)
    optimizer, first = torch.optim.Adam(model.parameters(), 3e-3), None
    for _ in range(60):
        optimizer.zero_grad()
        loss = sum(model.training_step(batch).values())
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < .5 * first, (first, loss.item())


# ---- Swin-V2 -------------------------------------------------------------------------------------

heads = (3, 6, 12, 24)


def swin_shapes(depths=(2, 2, 6, 2), prefix="", size=256):
    "Names and shapes as the authors of Swin-V2 have them, tables included."
    out = {"patch_embed.proj.weight": (96, 3, 4, 4), "patch_embed.proj.bias": (96,), "norm.weight": (768,), "norm.bias": (768,),
           "patch_embed.norm.weight": (96,), "patch_embed.norm.bias": (96,)}
    for i, depth in enumerate(depths):
        c, side = 96 * 2 ** i, size // 4 // 2 ** i
        w = min(16, side)
        for j in range(depth):
            b = f"layers.{i}.blocks.{j}."
            if j % 2 and side > w: out[b + "attn_mask"] = ((side // w) ** 2, w * w, w * w)
            out |= {b + "attn.relative_coords_table": (1, 2 * w - 1, 2 * w - 1, 2), b + "attn.relative_position_index": (w * w, w * w),
                    b + "attn.logit_scale": (heads[i], 1, 1), b + "attn.q_bias": (c,), b + "attn.v_bias": (c,),
                    b + "attn.cpb_mlp.0.weight": (512, 2), b + "attn.cpb_mlp.0.bias": (512,), b + "attn.cpb_mlp.2.weight": (heads[i], 512),
                    b + "attn.qkv.weight": (3 * c, c), b + "attn.proj.weight": (c, c), b + "attn.proj.bias": (c,),
                    b + "mlp.fc1.weight": (4 * c, c), b + "mlp.fc1.bias": (4 * c,), b + "mlp.fc2.weight": (c, 4 * c), b + "mlp.fc2.bias": (c,)}
            out |= {b + f"norm{n}.{k}": (c,) for n in (1, 2) for k in ("weight", "bias")}
        if i < 3: out |= {f"layers.{i}.downsample.reduction.weight": (2 * c, 4 * c), f"layers.{i}.downsample.norm.weight": (2 * c,),
                          f"layers.{i}.downsample.norm.bias": (2 * c,)}
    return {prefix + k: v for k, v in out.items()}


def random_tensors(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g) * (.5 if len(s) == 1 else max(s[1] if len(s) > 1 else 1, 4) ** -.5) for n, s in shapes.items()}


def test_the_last_window_is_cut_to_the_stage():
    "Attention over the 8 x 8 cells that are there, and no padding; written out."
    torch.manual_seed(0)
    attn = SwinMaps().eval().features[7][1].attn
    nn.init.normal_(attn.qkv.bias)
    x = torch.randn(1, 8, 8, 768)
    q, k, v = F.linear(x.view(64, 768), attn.qkv.weight, attn.qkv.bias * torch.tensor([1., 0., 1.]).repeat_interleave(768)).view(64, 3, 24, 32).unbind(1)
    score = torch.einsum("lhc,mhc->hlm", F.normalize(q, dim=-1), F.normalize(k, dim=-1)) * attn.logit_scale.clamp(max=np.log(100)).exp()
    place = torch.stack(torch.meshgrid(torch.arange(8.), torch.arange(8.), indexing="ij"), -1).view(64, 2)
    away = (place[:, None] - place[None]) / 7 * 8
    bias = 16 * attn.cpb_mlp(away.sign() * (away.abs() + 1).log2() / 3).sigmoid().permute(2, 0, 1)
    wanted = attn.proj(torch.einsum("hlm,mhc->lhc", (score + bias).softmax(-1), v).reshape(64, 768))
    with torch.no_grad(): torch.testing.assert_close(attn(x).view(64, 768), wanted, atol=1e-4, rtol=1e-4)


def test_swin_is_timm_s(tmp_path):
    "timm follows the authors' code; the same tensors under their names."
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("swinv2_tiny_window16_256", num_classes=0).eval()
    state = {}
    for name, tensor in random_tensors({n: s for n, s in swin_shapes().items() if not re.search("relative_|attn_mask", n)}).items():
        own = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        state[name] = 1 + .1 * tensor if "norm" in name and name.endswith("weight") else tensor
        theirs.state_dict()[own].copy_(state[name])
    torch.save({"model": {**state, "head.weight": torch.zeros(1000, 768)}}, tmp_path / "swin.pth")
    ours = make_swin("swinv2_tiny", tmp_path / "swin.pth").eval()
    images = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        wanted = theirs.forward_features(images).permute(0, 3, 1, 2)
        got = ours(images)[16]
    assert wanted.std() > .1
    torch.testing.assert_close(got, F.interpolate(wanted, scale_factor=2, mode="bilinear", align_corners=False), atol=1e-4, rtol=1e-4)


def test_swin_weights_from_a_file(tmp_path):
    state = random_tensors(swin_shapes())
    path = tmp_path / "swin.pth"
    torch.save({"model": state}, path)
    net = make_swin("swinv2_tiny", path)
    assert torch.equal(net.features[1][0].mlp[0].weight, state["layers.0.blocks.0.mlp.fc1.weight"])
    assert torch.equal(net.features[6].reduction.weight, state["layers.2.downsample.reduction.weight"])
    bias = net.features[7][1].attn.qkv.bias.chunk(3)
    for got, name in zip(bias, ("q", None, "v")):
        assert torch.equal(got, torch.zeros(768) if name is None else state[f"layers.3.blocks.1.attn.{name}_bias"])
    assert torch.equal(net.features[1][0].attn.relative_coords_table, SwinMaps().features[1][0].attn.relative_coords_table)
    torch.save({"model": {n: t for n, t in state.items() if n != "layers.1.blocks.1.norm2.bias"}}, path)
    with pytest.raises(CheckpointError, match="missing: features.3.1.norm2.bias"): make_swin("swinv2_tiny", path)
    torch.save({"model": {**state, "layers.0.blocks.0.gate": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="unexpected: layers.0.blocks.0.gate"): make_swin("swinv2_tiny", path)
    torch.save({"optimizer": {}}, path)
    with pytest.raises(CheckpointError, match="missing"): make_swin("swinv2_tiny", path)
    with pytest.raises(MissingFileError): make_swin("swinv2_tiny", tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="missing"): make_swin("swinv2_small", random_file(tmp_path, state))


def random_file(folder, state):
    torch.save({"model": state}, folder / "s.pth")
    return folder / "s.pth"


def test_other_sizes():
    net = SwinMaps(size=128).eval()
    assert [net.features[i][0].attn.window_size for i in (1, 3, 5, 7)] == [[16, 16], [16, 16], [8, 8], [4, 4]]
    with torch.no_grad(): assert net(torch.zeros(1, 3, 128, 128))[16].shape == (1, 768, 8, 8)
    with pytest.raises(DataError, match='made for crops of 128 pixels, got 256; create the model with options={"size": 256}'):
        net(torch.zeros(1, 3, 256, 256))


# ---- names of published weights ------------------------------------------------------------------

def official_shapes(depths=(2, 2, 6, 2), where="pre", prefix="backbone."):
    "What a checkpoint should hold: Swin-V2's names, and those of CapeFormer's head with the parts that changed."
    head = json.loads((here / "capeformer_names.json").read_text())
    out = swin_shapes(depths, prefix)
    for name, shape in head.items():
        if not name.startswith("keypoint_head."): continue
        shape = tuple(768 if n == 2048 else n for n in shape)                   # channels of the backbone, and between layers
        if found := re.fullmatch(r"(.+\.decoder\.layers\.\d\.)linear([12])\.(weight|bias)", name):
            stem, layer, kind = found.groups()
            graph = where == "both" or where == ("pre" if layer == "1" else "post")
            if graph: shape = (2 * shape[0], shape[1], 1) if kind == "weight" else (2 * shape[0],)
            name = f"{stem}ffn{layer}.{'conv.' if graph else ''}{kind}"
        out[name] = shape
    return out


@pytest.mark.parametrize("where", ["pre", "post", "both", "none"])
def test_every_tensor_of_a_checkpoint_is_used(where):
    state = random_tensors(official_shapes(where=where))
    model = from_official_graphcape({"state_dict": state, "meta": {}})
    assert model.graph_decoder == where and not model.training and model.config["backbone"] == "swinv2_tiny"
    tables = "relative_coords_table|relative_position_index|attn_mask"
    given = sum(t.numel() for n, t in state.items() if not re.search(tables, n))
    keys = sum(768 // 8 * 2 ** i * d for i, d in enumerate((2, 2, 6, 2)))           # biases of keys: kept as zeros
    assert given == sum(p.numel() for p in model.parameters()) - keys
    ffn = model.decoder.layers[1].ffn
    stem = "keypoint_head.transformer.decoder.layers.1."
    layers = {1: ffn.linear1, 2: ffn.linear2}
    for i, layer in layers.items():
        name = next(n for n in state if re.fullmatch(stem.replace(".", r"\.") + rf"ffn{i}\.(conv\.)?weight", n))
        weight = layer.linear.weight if "conv" in name else layer.weight
        assert torch.equal(weight, state[name].flatten(1))
    assert torch.equal(model.backbone.norm.weight, state["backbone.norm.weight"])


def test_small_and_other_prefixes():
    small_one = random_tensors(official_shapes((2, 2, 18, 2)))
    assert len(from_official_graphcape(small_one).backbone.features[5]) == 18
    renamed = random_tensors(official_shapes(prefix="encoder_query."))
    model = from_official_graphcape(renamed)
    assert torch.equal(model.backbone.norm.bias, renamed["encoder_query.norm.bias"])


def test_misfits_are_named():
    state = random_tensors(official_shapes())
    lacking = {n: t for n, t in state.items() if n != "keypoint_head.transformer.decoder.layers.0.ffn1.conv.bias"}
    with pytest.raises(CheckpointError, match="missing: decoder.layers.0.ffn.linear1.linear.bias"): from_official_graphcape(lacking)
    with pytest.raises(CheckpointError, match="unexpected: backbone.layers.0.blocks.0.gate"):
        from_official_graphcape({**state, "backbone.layers.0.blocks.0.gate": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="missing: .*v_bias"):
        from_official_graphcape({n: t for n, t in state.items() if n != "backbone.layers.0.blocks.0.attn.v_bias"})
    with pytest.raises(CheckpointError, match="6 or 18 blocks in the third stage, found 0"):
        from_official_graphcape({n: t for n, t in state.items() if not n.startswith("backbone.")})


def test_adjacency_is_the_mask_s():
    "Links of a slot that is opened because all are hidden are none: its neighbours are hidden."
    hidden = torch.ones(1, 3, dtype=torch.bool)
    matrix = skeleton_matrix([torch.tensor([[0, 1]])], hidden)
    assert matrix.sum() == 1 and not adjacency([torch.tensor([[0, 1]])], ~hidden).any()
