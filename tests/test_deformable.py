"""Deformable attention against the published modules and a loop, its gradients, and what is refused."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cape.errors import CheckpointError, ConfigError, DataError
from cape.layers.deformable import DeformableAttention, compass, sample_maps, stack_branches

here, prefix = Path(__file__).parent / "golden", "predictor.support_layers.0.deform_attn."
sizes = dict(sampling_offsets=192, attention_weights=96, value_proj=256, output_proj=256)


def module(name):
    spec = importlib.util.spec_from_file_location(name, here / f"{name}.py")
    it = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(it)
    return it


fill = module("escape_fill")
draw = lambda tag, *shape: torch.from_numpy(fill.generator(tag).standard_normal(shape).astype(np.float32))
filled = lambda name, *shape: torch.from_numpy(np.array(fill.fill_tensor(prefix + name, shape)))


@pytest.fixture(scope="module")
def golden(): return {k: torch.from_numpy(v) for k, v in np.load(here / "fmmp_modules.npz").items()}


@pytest.fixture(scope="module")
def state():
    "The eight official modules of one layer."
    names = {f"attn_layers.{m}.{layer}": rows for m in range(8) for layer, rows in sizes.items()}
    return {f"{n}.{kind}": filled(f"{n}.{kind}", *shape) for n, rows in names.items()
            for kind, shape in (("weight", (rows, 256)), ("bias", (rows,)))}


@pytest.fixture(scope="module")
def official(state):
    layer = DeformableAttention(256, 8, 3, 4, branches=8)
    layer.load_state_dict(stack_branches(state, "attn_layers."))
    return layer.requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    "Queries (2,12,256), and three maps of what the vectors hold as one row of 1344 cells."
    cells = draw("mod/values", 2, 1344, 256).split([64, 256, 1024], 1)
    return draw("mod/query", 2, 12, 256), [c.mT.unflatten(-1, (s, s)) for c, s in zip(cells, (8, 16, 32))]


def test_published_module(golden, official, inputs):
    "The first of the eight, its places and its answer"
    (query, maps), see = inputs, {}
    answer = official(query, golden["ref"], official.values(maps), see=see, name="a")
    torch.testing.assert_close(see["a.points"][:, :, 0], golden["msdeform_loc"], atol=1e-6, rtol=0)
    torch.testing.assert_close(answer[:, :, 0], golden["msdeform_out"], atol=1e-5, rtol=0)
    assert (golden["ref"] < 0).any() and (golden["ref"] > 1).any()


def test_published_structure(golden, official, inputs):
    "Eight modules as eight branches, each with the reference of another keypoint"
    query, maps = inputs
    reference = torch.stack([r[i[:, :8]] for r, i in zip(golden["ref"], golden["idx"][:, 0])])
    first, *others = official(query, reference, official.values(maps)).unbind(2)
    weight, bias = filled("projector.0.weight", 256, 1792), filled("projector.0.bias", 256)
    answer = first + F.relu(F.linear(torch.cat(others, -1), weight, bias))
    torch.testing.assert_close(answer, golden["structured_out"], atol=1e-5, rtol=0)
    alone = official(query, golden["ref"], official.values(maps)).unbind(2)
    wrong = alone[0] + F.relu(F.linear(torch.cat(alone[1:], -1), weight, bias))
    assert (wrong - golden["structured_out"]).abs().max() > .1


def test_published_samples(golden, inputs):
    "The mean of one sample a level: FMMP's first keypoint features"
    found = [sample_maps(m[:, None], golden["ref"][:, None])[:, 0] for m in inputs[1]]
    torch.testing.assert_close(sum(found) / 3, golden["ref_feat"], atol=1e-5, rtol=0)


def read(grid, x, y):
    "Value (D,) of a map (D,h,w) at x, y in crop units, cell by cell."
    _, h, w = grid.shape
    x, y, out = x * w - .5, y * h - .5, torch.zeros(len(grid))
    for i in (int(np.floor(x)), int(np.floor(x)) + 1):
        for j in (int(np.floor(y)), int(np.floor(y)) + 1):
            if 0 <= i < w and 0 <= j < h: out += (1 - abs(x - i)) * (1 - abs(y - j)) * grid[:, j, i]
    return out


def stirred(*shape, seed=0, spread=.5):
    torch.manual_seed(seed)
    layer = DeformableAttention(*shape)
    with torch.no_grad():
        for p in layer.parameters(): p.add_(spread * torch.randn_like(p))
    return layer


@pytest.mark.parametrize("heads,levels,points,branches", [(1, 1, 1, 1), (2, 1, 4, 1), (2, 3, 2, 1), (4, 2, 3, 5)])
def test_equals_a_loop(heads, levels, points, branches):
    layer = stirred(8, heads, levels, points, branches).requires_grad_(False)
    maps = [torch.randn(2, 8, 3 + l, 5 + 2 * l) for l in range(levels)]
    query, reference, scale = torch.randn(2, 3, 8), 1.6 * torch.rand(2, 3, branches, 2) - .3, 2 * torch.rand(2, 3, 1)
    fast = layer(query, reference, layer.values(maps), scale).reshape(2, 3, branches, 8)
    offsets = layer.sampling_offsets(query).reshape(2, 3, branches, heads, levels, points, 2)
    weights = layer.attention_weights(query).reshape(2, 3, branches, heads, -1).softmax(-1)
    weights, D = weights.reshape(offsets.shape[:-1]), 8 // heads
    for b, k, m in np.ndindex(2, 3, branches):
        out = torch.zeros(8)
        for h, l, p in np.ndindex(heads, levels, points):
            rows = slice(m * 8 + h * D, m * 8 + (h + 1) * D)
            value = torch.einsum("dc,chw->dhw", layer.value_proj.weight[rows], maps[l][b])
            value = value + layer.value_proj.bias[rows, None, None]
            at = reference[b, k, m] + scale[b, k] * offsets[b, k, m, h, l, p] / torch.tensor([*value.shape[:0:-1]])
            out[h * D:(h + 1) * D] += weights[b, k, m, h, l, p] * read(value, *at.tolist())
        out = layer.output_proj.weight[m] @ out + layer.output_proj.bias[m]
        torch.testing.assert_close(fast[b, k, m], out, atol=2e-5, rtol=1e-4)


def test_compass():
    "Direction 2 pi m / heads, p cells away, in the order head, level, point, xy"
    made = compass(8, 3, 4).view(8, 3, 4, 2)
    angles = torch.atan2(made[..., 1], made[..., 0]) % (2 * np.pi)
    expected = (torch.arange(8) * np.pi / 4)[:, None, None].expand(8, 3, 4)
    away = (angles - expected + np.pi) % (2 * np.pi) - np.pi
    assert away.abs().max() < 1e-5
    torch.testing.assert_close(made.abs().amax(-1), torch.arange(1., 5).expand(8, 3, 4))
    layer = DeformableAttention(16, 4, 2, 3, branches=2)
    assert torch.equal(layer.sampling_offsets.bias.view(2, -1), compass(4, 2, 3).expand(2, -1))
    assert not layer.sampling_offsets.weight.any() and not layer.attention_weights.weight.any()


def test_xavier_of_each_branch_alone():
    "A stack of many branches begins as wide as one"
    torch.manual_seed(0)
    for branches in (1, 8):
        layer = DeformableAttention(64, 8, 1, 4, branches)
        for p in (layer.value_proj.weight, layer.output_proj.weight):
            assert p.std().item() == pytest.approx((2 / 128) ** .5, rel=.05)


def test_gradients():
    layer = stirred(4, 2, 2, 2, 2, seed=2).double()
    tensors = torch.randn(1, 2, 4), torch.rand(1, 2, 2, 2), torch.randn(1, 4, 3, 4), torch.randn(1, 4, 5, 6), torch.rand(1, 2, 1)
    run = lambda q, r, coarse, fine, s: layer(q, r, layer.values([coarse, fine]), s)
    assert torch.autograd.gradcheck(run, [t.double().requires_grad_() for t in tensors])


@pytest.mark.parametrize("place", [-9., 4., 1e6, 1e30, -1e30])
def test_far_outside_reads_nothing(place):
    layer = stirred(8, 2, 2, 4)
    maps = [torch.randn(1, 8, s, s) for s in (4, 8)]
    answer = layer(torch.randn(1, 3, 8), torch.full((1, 3, 2), place), layer.values(maps))
    answer.sum().backward()
    torch.testing.assert_close(answer, layer.output_proj.bias.expand_as(answer))
    assert not layer.sampling_offsets.weight.grad.any()


def test_scale_stretches_the_offsets():
    layer, query = stirred(8, 2, 1, 4), torch.randn(2, 3, 8)
    values, reference = layer.values([torch.randn(2, 8, 6, 6)]), torch.rand(2, 3, 2)
    middle = reference[:, :, None, None, None, None]
    reach = lambda f: layer.places(query, reference, values, torch.full((2, 3, 1), f))[0] - middle
    torch.testing.assert_close(reach(1.7), 1.7 * reach(1.), atol=1e-5, rtol=1e-4)
    assert reach(0.).abs().max() < 1e-6 < reach(1.).abs().max()


def test_one_branch_and_shared_reference():
    layer, query, maps = stirred(8, 2, 1, 2, 3), torch.randn(2, 3, 8), [torch.randn(2, 8, 6, 6)]
    values, reference = layer.values(maps), torch.rand(2, 3, 2)
    each = layer(query, reference[:, :, None].expand(-1, -1, 3, -1), values)
    assert torch.equal(layer(query, reference, values), each) and each.shape == (2, 3, 3, 8)
    single = DeformableAttention(8, 2, 1, 2)
    cut = {n: p[:1] if n.startswith("output") else p[:len(p) // 3] for n, p in layer.state_dict().items()}
    single.load_state_dict(cut)
    torch.testing.assert_close(single(query, reference, single.values(maps)), each[:, :, 0])


def test_bfloat16_keeps_places():
    "Under autocast the places are in float32: the answer differs by the rounding of values only"
    layer = stirred(32, 4, 2, 4, spread=.1).requires_grad_(False)
    maps, see, half = [torch.randn(1, 32, s, s) for s in (8, 32)], {}, {}
    query, reference = torch.randn(1, 5, 32), torch.rand(1, 5, 2)
    full = layer(query, reference, layer.values(maps), see=see, name="a")
    with torch.autocast("cpu", torch.bfloat16): low = layer(query, reference, layer.values(maps), see=half, name="a")
    assert half["a.points"].dtype == half["a.weights"].dtype == torch.float32
    assert (half["a.points"] - see["a.points"]).abs().max() < .01 and (low - full).abs().max() < .1 * full.abs().max()


def test_stacking_names_what_is_missing(state):
    for lost in ("attn_layers.5.output_proj.bias", "attn_layers.0.sampling_offsets.weight"):
        with pytest.raises(CheckpointError, match=lost.replace(".", r"\.")):
            stack_branches({n: t for n, t in state.items() if n != lost}, "attn_layers.")
    with pytest.raises(CheckpointError, match="no modules"): stack_branches({}, "attn_layers.")


def test_refused():
    with pytest.raises(ConfigError, match="dim=10, heads=4"): DeformableAttention(10, 4)
    with pytest.raises(ConfigError, match="branches=0"): DeformableAttention(8, 2, branches=0)
    layer = DeformableAttention(8, 2, 2, 2, 3)
    values = layer.values([torch.randn(1, 8, 4, 4)] * 2)
    with pytest.raises(DataError, match="2 levels got 3"): layer.values([torch.randn(1, 8, 4, 4)] * 3)
    for shape in ((1, 4, 2), (1, 5, 2, 2), (1, 5, 3), (2, 5, 2)):
        with pytest.raises(DataError, match="references"): layer(torch.randn(1, 5, 8), torch.rand(shape), values)
    with pytest.raises(DataError, match="2 levels got values of 1"): layer(torch.randn(1, 5, 8), torch.rand(1, 5, 2), values[:1])
