"""The parts of POMNet and CapeFormer against vectors of the official codes, PyTorch's own layers, and the laws of sets."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cape.data.crops import make_heatmaps
from cape.errors import ConfigError, DataError
from cape.layers.attention import (Attention, DecoderLayer, EncoderLayer, Identifier, keypoint_features, shrink_maps,
                                   sine_grid, sine_points, usable_mask)

close = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden(): return np.load(Path(__file__).parent / "golden/golden_functions.npz")


# Position codes

@pytest.mark.parametrize("h, w", [(8, 8), (1, 100), (5, 3)])
def test_the_codes_of_a_map_are_the_official_ones(golden, h, w):
    official = torch.from_numpy(golden[f"sine_{h}x{w}"])                    # (256,h,w)
    assert torch.allclose(sine_grid(h, w).T.reshape(256, h, w), official, atol=1e-6, rtol=0)


def test_the_codes_of_points_are_the_official_ones(golden):
    points, official = (torch.from_numpy(golden[f"coord_enc_{name}"]) for name in ("in", "out"))
    assert torch.allclose(sine_points(points), official, atol=1e-6, rtol=0)


def test_fixed_identifiers_are_the_official_ones(golden):
    official = torch.from_numpy(golden["sine_1x100"])[:, 0].T               # (100,256)
    assert torch.allclose(Identifier()(3, 100), official.expand(3, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [6, 7, 255])
def test_channels_that_four_does_not_divide_are_an_error(dim):
    for make in (lambda: sine_points(torch.zeros(1, 2), dim), lambda: sine_grid(2, 2, dim), lambda: Identifier(dim=dim)):
        with pytest.raises(ConfigError, match=f"multiple of 4 channels, got {dim}"): make()


# Identifiers

@pytest.mark.parametrize("kind", Identifier.kinds)
def test_the_codes_of_few_slots_are_the_first_of_all(kind):
    identifier = Identifier(kind, dim=16).eval()
    few, every = identifier(2, 7), identifier(2, 100)
    assert few.shape == (2, 7, 16)
    assert torch.equal(few, every[:, :7])
    assert torch.equal(few[0], few[1])


def test_shuffled_identifiers_are_settled_in_evaluation_and_dealt_out_in_training():
    identifier, fixed = Identifier("shuffled", dim=16, slots=20), Identifier("fixed", dim=16, slots=20)(1, 20)[0]
    first, again = identifier.train()(2, 20), identifier(2, 20)
    settled = identifier.eval()(2, 20)
    assert not torch.equal(first, again) and not torch.equal(first[0], first[1])
    assert torch.equal(settled, identifier(2, 20))
    assert torch.equal(settled[:1], Identifier("shuffled", dim=16, slots=20).eval()(1, 20))
    in_order = lambda codes: sorted(map(tuple, codes.tolist()))
    for codes in (first[0], first[1], again[0], settled[0]):               # the same codes, each once
        assert in_order(codes) == in_order(fixed) and not torch.equal(codes, fixed)


def test_only_learned_identifiers_are_learned_or_saved():
    assert {kind: list(Identifier(kind).state_dict()) for kind in Identifier.kinds} == {
        "fixed": [], "learned": ["codes"], "shuffled": [], "none": []}
    learned = Identifier("learned", dim=8)
    learned(1, 3).sum().backward()
    assert (learned.codes.grad.abs().sum(1) > 0).tolist() == [True] * 3 + [False] * 97
    assert not Identifier("none", dim=8)(1, 3).any()


def test_unknown_identifiers_and_too_many_slots_are_errors():
    with pytest.raises(ConfigError, match="got 'sines'"): Identifier("sines")
    for kind in Identifier.kinds:
        with pytest.raises(DataError, match="101 keypoints.*100.*slots=101"): Identifier(kind)(1, 101)


# Pooling

def official_pooling(features, maps):
    "Up-sample, then the mean under each map."
    large = F.interpolate(features, size=maps.shape[-2:], mode="bilinear", align_corners=False)
    weights = maps / (maps.sum((-2, -1), keepdim=True) + 1e-8)
    return (weights[:, :, None] * large[:, None]).sum((-2, -1))


@pytest.mark.parametrize("cells", [(8, 8), (4, 8), (7, 5), (64, 64), (2, 3)])
def test_shrunk_gaussians_pool_as_up_sampled_features_do(cells):
    features = torch.randn(2, 5, *cells)
    maps, _ = make_heatmaps(torch.rand(2, 6, 2), torch.ones(2, 6))
    assert torch.allclose(keypoint_features(features, maps), official_pooling(features, maps), **close)


def test_other_ways_of_up_sampling_pool_otherwise():
    features, (maps, _) = torch.randn(1, 5, 8, 8), make_heatmaps(torch.rand(1, 6, 2), torch.ones(1, 6))
    large = F.interpolate(features, size=64, mode="bilinear", align_corners=True)
    aligned = (maps / maps.sum((-2, -1), keepdim=True)).flatten(2) @ large.flatten(2).mT
    assert (keypoint_features(features, maps) - aligned).abs().max() > .01


def test_an_empty_map_pools_zeros_and_constants_stay_what_they_are():
    maps, _ = make_heatmaps(torch.tensor([[[.5, .5], [.01, .99]]]), torch.tensor([[1, 1]]))
    pooled = keypoint_features(torch.full((1, 3, 8, 8), 7.), torch.cat([maps, torch.zeros_like(maps[:, :1])], 1))
    assert torch.allclose(pooled, torch.tensor([7., 7., 0.])[None, :, None].expand(1, 3, 3), **close)


def test_gradients_flow_through_maps_after_a_use_in_inference_mode():
    size = (3, 7)                                                           # a matrix no other test has made
    with torch.inference_mode(): shrink_maps(torch.rand(11, 13), size)
    maps = torch.rand(11, 13, requires_grad=True)
    shrink_maps(maps, size).sum().backward()
    assert torch.allclose(maps.grad, torch.ones(11, 13), **close)


def test_pooling_sends_gradients_into_the_features():
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    maps, _ = make_heatmaps(torch.rand(1, 3, 2), torch.ones(1, 3))
    keypoint_features(features, maps).sum().backward()
    assert torch.allclose(features.grad.sum(), torch.tensor(6.), **close)   # 2 channels x 3 keypoints x weight 1


# Attention and layers

def layers(**options):
    "A call of (tokens, mask) for both kinds of layer."
    memory, places = torch.randn(3, 9, 16), sine_grid(3, 3, 16)
    encoder, decoder = (kind(16, 4, 32).eval() for kind in (EncoderLayer, DecoderLayer))
    return {"encoder": lambda t, m=None, at=slice(None): encoder(t, torch.zeros(16), m),
            "decoder": lambda t, m=None, at=slice(None): decoder(t, memory[at], places, m)}


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_tokens_are_a_set(name):
    layer, tokens, order = layers()[name], torch.randn(3, 6, 16), torch.tensor([5, 0, 3, 1, 2, 4])
    hidden = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False, True] * 3])
    out = layer(tokens, hidden)
    assert torch.allclose(layer(tokens[:, order], hidden[:, order]), out[:, order], **close)
    one = torch.cat([layer(tokens[i:i + 1], hidden[i:i + 1], slice(i, i + 1)) for i in range(3)])
    assert torch.allclose(one, out, **close)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_masked_tokens_change_nothing(name):
    layer, tokens = layers()[name], torch.randn(3, 6, 16)
    hidden = torch.tensor([[False] * 4 + [True] * 2] * 3)
    changed = tokens.clone()
    changed[:, 4:] = 100 * torch.randn(3, 2, 16)
    out = layer(tokens, hidden)[:, :4]
    assert torch.allclose(layer(changed, hidden)[:, :4], out, **close)
    assert torch.allclose(layer(tokens[:, :4]), out, **close)
    assert not torch.allclose(layer(changed)[:, :4], out, atol=.01)         # without the mask they do


def test_layers_without_codes_are_those_of_pytorch():
    tokens, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    encoder, decoder = EncoderLayer(16, 4, 32).eval(), DecoderLayer(16, 4, 32).eval()
    names = lambda layer: {n.replace("ffn.", "").replace("cross_attn", "multihead_attn"): t
                           for n, t in layer.state_dict().items()}
    theirs = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    theirs.load_state_dict(names(encoder))
    assert torch.allclose(encoder(tokens, torch.zeros(16)), theirs(tokens), **close)
    theirs = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True).eval()
    theirs.load_state_dict(names(decoder))
    assert torch.allclose(decoder(tokens, memory, torch.zeros(16)), theirs(tokens, memory), **close)


def test_where_the_encoder_adds_codes():
    x, pos = torch.randn(2, 9, 16), sine_grid(3, 3, 16)
    for position in ("qk", "all"):
        layer = EncoderLayer(16, 4, 32, position=position).eval()
        content = x + pos if position == "all" else x
        y = layer.norm1(content + layer.self_attn(x + pos, x + pos, content))
        assert torch.allclose(layer(x, pos), layer.norm2(y + layer.ffn(y)), **close)


def test_the_decoder_adds_codes_to_the_keys_of_the_image_alone():
    tokens, memory, pos = torch.randn(2, 5, 16), torch.randn(2, 9, 16), sine_grid(3, 3, 16)
    layer = DecoderLayer(16, 4, 32).eval()
    t = layer.norm1(tokens + layer.self_attn(tokens, tokens, tokens))
    t = layer.norm2(t + layer.cross_attn(t, memory + pos, memory))
    assert torch.allclose(layer(tokens, memory, pos), layer.norm3(t + layer.ffn(t)), **close)


def test_switches_remove_what_they_say():
    tokens, memory, pos, see = torch.randn(1, 5, 16), torch.randn(1, 9, 16), sine_grid(3, 3, 16), {}
    blind = DecoderLayer(16, 4, 32, cross_attention=False).eval()
    assert torch.allclose(blind(tokens, memory, pos, see=see, name="a"), blind(tokens, memory + 1, pos), **close)
    alone = DecoderLayer(16, 4, 32, self_attention=False).eval()
    assert torch.allclose(alone(tokens, memory, pos, see=see, name="b")[:, :1], alone(tokens[:, :1], memory, pos), **close)
    assert sorted(see) == ["a.self", "b.cross"]
    assert not [n for n in blind.state_dict() if "cross" in n or "norm2" in n]
    assert not [n for n in alone.state_dict() if "self" in n or "norm1" in n]


def test_seen_weights_are_shares_and_looking_changes_nothing():
    tokens, memory, pos, see = torch.randn(2, 5, 16), torch.randn(2, 9, 16), sine_grid(3, 3, 16), {}
    hidden, layer = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]), DecoderLayer(16, 4, 32).eval()
    out = layer(tokens, memory, pos, hidden, see, "layer 1")
    assert torch.allclose(layer(tokens, memory, pos, hidden), out, **close)
    assert {n: tuple(w.shape) for n, w in see.items()} == {"layer 1.self": (2, 4, 5, 5), "layer 1.cross": (2, 4, 5, 9)}
    for weights in see.values(): assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 5), **close)
    assert (see["layer 1.self"][1, :, :, 3:] == 0).all() and (see["layer 1.self"][0] > 0).all()


def test_keys_and_values_of_other_widths():
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 9, 24), torch.randn(2, 9, 16)
    attention = Attention(32, 8, keys=24, values=16)
    assert attention(q, k, v).shape == (2, 5, 32)
    assert attention.k_proj_weight.shape == (32, 24) and attention.v_proj_weight.shape == (32, 16)


def test_a_sample_without_any_keypoint():
    tokens, hidden = torch.randn(3, 4, 16), torch.tensor([[True] * 4, [False, True, True, False], [True] * 4])
    attention = Attention(16, 4).eval()
    assert attention(tokens, tokens, tokens, hidden, {})[0].isnan().all()  # the fault that is guarded against
    usable = usable_mask(hidden)
    assert usable.tolist() == [[False, True, True, True], [False, True, True, False], [False, True, True, True]]
    assert hidden[0].all()                                                  # the caller's mask stays as it was
    for grad in (True, False):
        for see in (None, {}):
            with torch.set_grad_enabled(grad): out = attention(tokens, tokens, tokens, usable, see)
            assert out.isfinite().all()


def test_options_that_cannot_work_are_errors():
    with pytest.raises(ConfigError, match="10 channels.*4 heads"): Attention(10, 4)
    with pytest.raises(ConfigError, match="got 'v'"): EncoderLayer(16, 4, position="v")


def test_bfloat16_autocast_comes_near_float32():
    features, (maps, _) = torch.randn(2, 16, 8, 8), make_heatmaps(torch.rand(2, 6, 2), torch.ones(2, 6))
    encoder, decoder, pos = EncoderLayer(16, 4, 32), DecoderLayer(16, 4, 32), sine_grid(8, 8, 16)
    identifier = Identifier("learned", 16)
    encoder.eval(), decoder.eval()
    def network():
        memory = encoder(features.flatten(2).mT, pos)
        return decoder(keypoint_features(features, maps) + identifier(2, 6), memory, pos, see={}, name="")
    exact = network()
    with torch.autocast("cpu", torch.bfloat16): rough = network()
    assert 0 < (rough - exact).abs().max() < .1
    rough.float().square().sum().backward()
    trained = [*encoder.parameters(), *decoder.parameters(), identifier.codes]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
