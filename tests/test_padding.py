"""Padding against the published arrays and a slow form of the same rules; and every method in the wrapper."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cape.data.padding import (PADDINGS, count_keypoints, draw_mixup, pad, pad_batch, pad_mixup, pad_uniform, pad_zero,
                               uniform_shares)
from cape.errors import ConfigError, DataError
from cape.evaluation import evaluate
from cape.learner import Learner, seed_step, train_config
from cape.models.base import check_contract, create_model, load_model, save_model, toy_batch
from cape.models.padded import Padded

METHODS = dict(protonet={}, prototype=dict(train="episodes"), pomnet={}, capeformer={}, maml={})


@pytest.fixture(scope="module")
def golden():
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parent / "golden" / "fmmp_padding.npz").items()}


def same(full, golden, case):
    assert torch.equal(full.points[0, 0], golden[f"{case}_points"])
    assert torch.equal(full.visible[0, 0], golden[f"{case}_visible"])
    assert torch.equal(full.links[0][0], golden[f"{case}_links"])


@pytest.mark.parametrize("case", ["A0", "A1", "B0", "B1"])
def test_published_arrays(golden, case):
    "Points, flags and links of both kinds, to the last bit; in case 1 keypoints are hidden"
    links = [golden[f"{case[0]}_skeleton"]]
    points, seen = golden[f"{case}_raw_points"][None, None], golden[f"{case}_raw_visible"][None, None]
    same(pad_uniform(points, seen, links), golden, f"{case}_eqdiv")
    pick = (golden[f"{case}_mix_link_choice"].double() + .5) / len(links[0])
    draws = golden[f"{case}_mix_lambda"][None].numpy(), pick[None].numpy()
    same(pad_mixup(points, seen, links, draws=draws), golden, f"{case}_mix")
    assert (case[1] == "1") == bool((~seen).any())


def test_published_without_room(golden):
    "67 links and two free slots: all stay empty"
    points, seen = golden["C_eqdiv_points"][None, None, :68], golden["C_eqdiv_visible"][None, None, :68]
    full = pad_uniform(points, seen, [torch.tensor([[k, k + 1] for k in range(67)])])
    assert torch.equal(full.points[0, 0], golden["C_eqdiv_points"])
    assert torch.equal(full.visible[0, 0], golden["C_eqdiv_visible"])
    assert len(full.links[0][0]) == golden["C_n_links"] == 67


def slow(points, seen, links, count, slots, ratio, choice):
    "One image, link by link: points (S,2), flags (S,), links."
    out, flags, new = np.zeros((slots, 2), np.float32), np.zeros(slots, bool), []
    out[:count], flags[:count], slot = points[:count], seen[:count], count
    chosen = choice[:slots - count].tolist()
    for link in sorted(set(chosen)):
        (a, b), n = links[link], chosen.count(link)
        shares = np.sort(ratio[slot:slot + n]).astype(np.float32)
        if seen[a] and seen[b]: new += zip([a, *range(slot, slot + n)], [*range(slot, slot + n), b])
        for share in shares:
            out[slot], flags[slot], slot = share * points[a] + (1 - share) * points[b], seen[a] and seen[b], slot + 1
    return out, flags, [*map(list, links), *map(list, new)]


@pytest.mark.parametrize("seed", range(8))
def test_equals_link_by_link(seed):
    "Random skeletons, with repeated links and links from a keypoint to itself"
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    B, G, K, slots = 3, 2, 9, int(rng.integers(9, 40))
    counts = rng.integers(2, K + 1, B)
    points, seen = torch.randn(B, G, K, 2, generator=g), torch.rand(B, G, K, generator=g) > .3
    links = [torch.from_numpy(rng.integers(0, c, (rng.integers(1, 8), 2))) for c in counts]
    draws = draw_mixup(B, slots, generator=g)
    full = pad_mixup(points, seen, links, counts, slots, draws=draws)
    for b, i in np.ndindex(B, G):
        choice = (draws[1][b] * len(links[b])).astype(int)
        p, v, l = slow(points[b, i].numpy(), seen[b, i].numpy(), links[b].tolist(), counts[b], slots, draws[0][b], choice)
        np.testing.assert_array_equal(full.points[b, i], p)
        assert full.visible[b, i].tolist() == v.tolist() and full.links[b][i].tolist() == l
    some = [{tuple(e) for i in range(G) for e in full.links[b][i].tolist()} for b in range(B)]
    assert [{tuple(e) for e in s.tolist()} for s in full.shared] == some


@pytest.mark.parametrize("kind", ["uniform", "mixup"])
def test_letter_of_the_paper(kind):
    "New links lead from start to end in order and replace the link; where an end is hidden the link stays"
    links, g = [torch.tensor([[0, 1], [2, 1]])], torch.Generator().manual_seed(0)
    points = torch.tensor([[[[0., 0.], [1., 0.], [1., 1.]]] * 2])
    seen = torch.tensor([[[True, True, True], [True, True, False]]])
    full = pad(kind, points, seen, links, slots=12, paper=True, draws=draw_mixup(1, 12, generator=g))
    for image, ends in ((0, {(0, 1), (2, 1)}), (1, {(0, 1)})):
        after = {a: b for a, b in full.links[0][image].tolist() if max(a, b) > 2 and a != 2}
        before, where = full.links[0][image].tolist(), full.points[0, image]
        assert [e in before for e in links[0].tolist()] == [tuple(e) not in ends for e in links[0].tolist()]
        walk = [0]
        while walk[-1] != 1: walk.append(after[walk[-1]])
        assert (where[walk, 0].diff() > 0).all() and len(walk) > 3


def test_official_count_overwrites():
    "By the code's rule a keypoint behind the last linked one becomes padding"
    links, points, seen = [torch.tensor([[0, 1]])], torch.rand(1, 1, 3, 2), torch.ones(1, 1, 3, dtype=torch.bool)
    assert count_keypoints(links).tolist() == [2] and count_keypoints(links, seen).tolist() == [3]
    full = pad_uniform(points, seen, links, count_keypoints(links), slots=5)
    assert full.real.tolist() == [[True, True, False, False, False]]
    torch.testing.assert_close(full.points[0, 0, 2], .25 * points[0, 0, 0] + .75 * points[0, 0, 1])


@pytest.mark.parametrize("kind", PADDINGS)
def test_an_episode_pads_alone(kind):
    "Neither the batch nor its longer slots change what an episode gets"
    torch.manual_seed(0)
    points, seen = torch.rand(2, 3, 12, 2), torch.rand(2, 3, 12) > .2
    seen[0, :, 6:], seen[1, 0, 11] = False, True
    links = [torch.tensor([[0, 5], [5, 3]]), torch.tensor([[0, 11], [2, 7], [7, 7]])]
    draws = draw_mixup(2, 20)
    full = pad(kind, points, seen, links, slots=20, draws=draws)
    for b, width in ((0, 6), (0, 9), (1, 12)):
        one = pad(kind, points[b:b + 1, :, :width], seen[b:b + 1, :, :width], links[b:b + 1], slots=20,
                  draws=[d[b:b + 1] for d in draws])
        assert torch.equal(one.points[0], full.points[b]) and torch.equal(one.visible[0], full.visible[b])
        assert all(torch.equal(x, y) for x, y in zip(one.links[0], full.links[b]))


@pytest.mark.parametrize("kind", PADDINGS)
def test_awkward_episodes(kind):
    points, seen = torch.full((1, 2, 4, 2), torch.nan), torch.zeros(1, 2, 4, dtype=torch.bool)
    points[:, :, :3], seen[:, :, 0] = .5, True
    link = torch.tensor([[0, 1]])
    cases = dict(hidden=[link], nothing=None, single=[torch.zeros(0, 2).long()])
    for name, links in cases.items():
        full = pad(kind, points, seen, links, slots=9, draws=draw_mixup(1, 9))
        assert full.points.shape == (1, 2, 9, 2) and full.points.isfinite().all()
        assert full.visible[..., 0].all() and not full.visible[..., 1:].any()
        assert full.used.sum() == (9 if name == "hidden" and kind != "zero" else 2 if name == "hidden" else 1)
    assert pad(kind, points, seen, slots=2, draws=draw_mixup(1, 2)).points.shape == (1, 2, 4, 2)
    many = torch.rand(1, 2, 6, 2)
    full = pad(kind, many, torch.ones(1, 2, 6, dtype=torch.bool), [link], slots=3, draws=draw_mixup(1, 3))
    assert torch.equal(full.points, many) and full.real.all()


def test_refused():
    points, seen, links = torch.rand(1, 1, 3, 2), torch.ones(1, 1, 3, dtype=torch.bool), [torch.tensor([[0, 3]])]
    for count, text in (([3], "names? 0 to 3"), ([4], "4 keypoints, but points for 3")):
        with pytest.raises(DataError, match=text): pad_uniform(points, seen, links, count)
    with pytest.raises(DataError, match="4 keypoints, but points for 3"): pad_uniform(points, seen, links)
    with pytest.raises(DataError, match="name -1 to 0"): pad_uniform(points, seen, [torch.tensor([[0, -1]])])
    with pytest.raises(DataError, match="B link tensors"): pad_zero(points, seen, links * 2)
    with pytest.raises(DataError, match="1 episodes and 9 slots"): pad_mixup(points, seen, slots=9, draws=draw_mixup(2, 9))
    with pytest.raises(ConfigError, match="slots must be at least 1, got 0"): pad_zero(points, seen, slots=0)
    with pytest.raises(ConfigError, match="alpha must be positive, got -1"): draw_mixup(1, alpha=-1)
    with pytest.raises(ConfigError, match="got 'none'"): pad("none", points, seen)


def test_shares():
    for links, room in ((0, 5), (3, 0), (3, 11), (7, 6), (1, 4)):
        number, share = uniform_shares(links, room)
        each = room // links if links else 0
        assert len(number) == len(share) == room and [(number == e).sum() for e in range(links)] == [each] * links
        for e in range(links): np.testing.assert_allclose(np.diff([0, *share[number == e], 1]), 1 / (each + 1), atol=1e-6)


def test_alpha_moves_the_ratios():
    spread = [np.abs(draw_mixup(4, 500, alpha, torch.Generator().manual_seed(0))[0] - .5).mean() for alpha in (.2, 1., 8.)]
    assert spread[0] > .3 > spread[1] > .2 > .15 > spread[2] and abs(spread[1] - .25) < .02


def test_one_step_draws_one_mixup():
    "Equal seed and step, equal padding, of support and query alike; another step, another one"
    batch = toy_batch(3, 2, 2, 5, hidden=0.)
    turn = torch.tensor([[.6, .3], [-.2, .7]])
    batch = replace(batch, query_keypoints=batch.support_keypoints @ turn)
    made = []
    for step in (4, 4, 5):
        seed_step(0, step)
        made.append(pad_batch(batch, "mixup", 30)[0])
    assert torch.equal(made[0].query_keypoints, made[1].query_keypoints)
    assert not torch.equal(made[0].query_keypoints, made[2].query_keypoints)
    torch.testing.assert_close(made[0].query_keypoints, made[0].support_keypoints @ turn)


def test_padded_batch_does_not_leak_the_query():
    "What a query hides changes no support and no link"
    batch, g = toy_batch(2, 2, 1, 6), lambda: torch.Generator().manual_seed(0)
    blind = replace(batch, query_visible=torch.zeros_like(batch.query_visible))
    (a, real), (b, _) = (pad_batch(it, "mixup", 20, generator=g()) for it in (batch, blind))
    assert torch.equal(a.support_keypoints, b.support_keypoints) and torch.equal(a.support_visible, b.support_visible)
    assert all(torch.equal(x, y) for x, y in zip(a.links, b.links)) and not b.query_visible.any()
    assert real.sum(1).tolist() == [6, 6] and a.valid.all() and a.query_visible[..., 6:].any()
    assert torch.equal(a.query_occluded[..., :6], batch.query_occluded)


@pytest.fixture(scope="module")
def methods():
    torch.manual_seed(0)
    return {name: create_model(name, **options).eval() for name, options in METHODS.items()}


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(methods, name, kind):
    check_contract(Padded(methods[name], slots=17, test=kind, train=kind))


@torch.no_grad()
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("name", METHODS)
def test_what_padding_changes(methods, name, kind):
    "Nothing where slots are located alone, nothing with zeros, and something where keypoints see each other"
    batch, plain = toy_batch(3, 2, 2, 5), methods[name]
    ours, theirs = Padded(plain, slots=17, test=kind).eval()(batch), plain(batch)
    seen = batch.support_visible.any(1)[:, None].expand(ours.confidence.shape)
    gap = (ours.keypoints - theirs.keypoints)[seen].abs().max()
    if name in ("protonet", "prototype"): assert gap < 1e-6
    if kind == "zero": assert gap < 1e-5 and (ours.confidence - theirs.confidence).abs().max() < 1e-5
    if name == "capeformer" and kind != "zero": assert gap > 1e-4
    for field in ("keypoints", "confidence", "stages", "similarity"):
        a, b = getattr(ours, field), getattr(theirs, field)
        assert (a is None) == (b is None) and (a is None or a.shape == b.shape)


@torch.no_grad()
@pytest.mark.parametrize("kind", PADDINGS)
def test_slots_that_are_no_keypoints(methods, kind):
    "Where new points stand in a longer batch, the answer is the middle, without confidence"
    batch = toy_batch(2, 1, 2, 8, hidden=0.)
    few, five = [torch.tensor([[0, 1], [1, 4]])], torch.arange(8) < 5
    batch = replace(batch, links=(few[0], batch.links[1]),
                    support_visible=batch.support_visible & torch.stack([five, five | True])[:, None])
    answer = Padded(methods["protonet"], slots=17, test=kind).eval()(batch)
    assert (answer.keypoints[0, :, 5:] == .5).all() and not answer.confidence[0, :, 5:].any()
    assert answer.confidence[0][batch.support_visible[0].expand(2, -1)].all()


@pytest.mark.parametrize("name", METHODS)
def test_training_step(methods, name):
    batch, plain = toy_batch(2, 1, 2, 5), methods[name]
    seed_step(0, 1); zero = Padded(plain, slots=17, train="zero").train().training_step(batch)
    seed_step(0, 1); alone = plain.train().training_step(batch)
    assert list(zero) == list(alone)
    for key in zero: torch.testing.assert_close(zero[key], alone[key], atol=1e-5, rtol=1e-4)
    full, half = (Padded(plain, slots=17, weight=w).train() for w in (1., .5))
    seed_step(0, 1); one = full.training_step(batch)
    seed_step(0, 1); other = half.training_step(batch)
    for key in alone:
        torch.testing.assert_close(one[key], other[key])
        torch.testing.assert_close(.5 * one[f"{key}_padded"], other[f"{key}_padded"])
        assert one[f"{key}_padded"] > 0
    sum(other[f"{key}_padded"] for key in alone).backward()
    assert any(p.grad is not None and p.grad.any() for p in plain.parameters())
    plain.zero_grad(); plain.eval()


def test_identifiers_run_out():
    batch = toy_batch(1)
    with pytest.raises(DataError, match="identifiers for 100"): Padded("capeformer", slots=101)(batch)
    assert Padded("capeformer", dict(slots=101), slots=101)(batch).keypoints.shape[2] == 5


def test_wrapper_refuses():
    with pytest.raises(ConfigError, match="nothing to pad"): Padded("copy")
    with pytest.raises(ConfigError, match="got 'eqdiv'"): Padded("protonet", test="eqdiv")
    with pytest.raises(ConfigError, match="trains on single images"): Padded("prototype").training_step(toy_batch(1))


def test_learner_and_evaluator_take_it(posezoo_mini, tmp_path):
    "A run that stops after each step ends in the weights of one that does not; the answers are those of the method"
    few = posezoo_mini.select(list(posezoo_mini.categories)[:4])
    config = train_config("tiny", steps=4, batch=4, val_every=0, pck_every=0, save_every=2, warmup=0)
    def run(out, *seconds):
        torch.manual_seed(0)
        model = Padded("protonet", slots=30)
        for limit in seconds: Learner(model, few, None, config.replace(max_minutes=limit), out).fit()
        return model
    whole, again = run(tmp_path / "a", 0), run(tmp_path / "b", 1e-9, 1e-9, 1e-9, 1e-9, 0)
    for a, b in zip(whole.state_dict().values(), again.state_dict().values()): assert torch.equal(a, b)
    options = dict(episodes=2, queries=3, size=64, progress=False)
    ours, theirs = (evaluate(m, few, **options) for m in (whole, whole.model))
    np.testing.assert_allclose(ours.points, theirs.points, atol=1e-3)
    uncached = evaluate(whole, few, cached=False, **options)
    np.testing.assert_allclose(uncached.points, ours.points, atol=1e-3)


def test_checkpoint(tmp_path):
    model = Padded("capeformer", dict(slots=40), slots=12, paper=True).eval()
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    assert again.config == model.config and again.config["options"]["slots"] == 40
    batch = toy_batch(1)
    with torch.no_grad(): assert torch.equal(again(batch).keypoints, model(batch).keypoints)
