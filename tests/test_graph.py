"Links, graph convolution and breadth-first lists: hand-worked cases, FMMP's own lists, and what bad links do."
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from cape.errors import ConfigError, DataError
from cape.layers.graph import (GraphConv, adjacency, bfs, bfs_batch, draw_structure, edge_auc, lost_links, normalise)

star = torch.tensor([[0, 1], [0, 2]])
three = torch.ones(1, 3, dtype=torch.bool)
values = torch.tensor([[[1.], [10.], [100.]]])


def random_case(seed, batch=4, slots=9, pairs=12, hidden=.25):
    "Links with repetitions, loops and turned pairs, and slots of which some are hidden."
    g = torch.Generator().manual_seed(seed)
    links = [torch.randint(slots, (int(n), 2), generator=g) for n in torch.randint(pairs, (batch,), generator=g)]
    return links, torch.rand(batch, slots, generator=g) >= hidden


# ---- adjacency -----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_adjacency_is_what_a_loop_makes(seed):
    links, valid = random_case(seed)
    wanted = torch.zeros(*valid.shape, valid.shape[1])
    for b, pairs in enumerate(links):
        for i, j in pairs.tolist():
            if i != j and valid[b, i] and valid[b, j]: wanted[b, i, j] = wanted[b, j, i] = 1
    assert torch.equal(adjacency(links, valid), wanted)
    lost = [len({frozenset(p) for p in pairs.tolist() if p[0] != p[1] and not valid[b, p].all()}) for b, pairs in enumerate(links)]
    assert lost_links(links, valid).tolist() == lost
    order = torch.randperm(len(links[0]), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(adjacency([links[0][order].flip(1)], valid[:1])[0], wanted[0])


def test_no_links_in_every_way():
    for none in (None, [None], [torch.zeros(0, 2, dtype=torch.long)], [torch.zeros(0)], [[]]):
        assert not adjacency(none, three).any() and adjacency(none, three).shape == (1, 3, 3)
        assert lost_links(none, three).tolist() == [0]
        assert bfs_batch(none, three, 2).tolist() == [[[0, 0], [1, 1], [2, 2]]]


def test_a_link_of_a_keypoint_to_itself_is_none():
    "The published demo adds (0, 0) where there is no skeleton."
    assert not adjacency([torch.tensor([[0, 0]])], three).any()


@pytest.mark.parametrize("pairs,said", [
    ([[0, 1], [1, 7]], r"episode 1: \(1, 7\) names a keypoint outside 0..2 \(3 keypoints, counted from 0\)$"),
    ([[1, 2], [2, 3]], r"\(2, 3\).*seem to count from 1: subtract 1"),
    ([[-1, 0], [0, 1]], r"\(-1, 0\).*was 1 subtracted from links that count from 0 already"),
    ([[-2, 0]], r"\(-2, 0\) names a keypoint outside 0..2 \(3 keypoints, counted from 0\)$"),
    ([[0., 1.]], r"expected whole numbers of the shape \(E, 2\), got torch.float32"),
    ([[0, 1, 2]], r"of the shape \(E, 2\), got torch.int64 of the shape \(1, 3\)"), ([0, 1], r"of the shape \(2,\)")], ids=str)
@pytest.mark.parametrize("use", [adjacency, lost_links, bfs_batch])
def test_bad_links_are_named(use, pairs, said):
    with pytest.raises(DataError, match=said): use([star, torch.tensor(pairs)], three.expand(2, 3))


def test_a_list_too_few():
    for use in (adjacency, bfs_batch):
        with pytest.raises(DataError, match="expected 2 lists, one an .*, got 1"): use([star], three.expand(2, 3))


# ---- shares --------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm,heard", [("sender", [110, .5, .5]), ("receiver", [55, 1, 1]), ("none", [110, 1, 1]),
                                        ("symmetric", [110 / 2**.5, 2**-.5, 2**-.5])])
def test_the_star(norm, heard):
    got = normalise(adjacency([star], three), norm) @ values
    np.testing.assert_allclose(got.flatten(), heard, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_shares_add_up(seed):
    adj = adjacency(*random_case(seed))
    linked = (adj.sum(-1) > 0).float()
    torch.testing.assert_close(normalise(adj, "sender").sum(-2), linked)
    torch.testing.assert_close(normalise(adj, "receiver").sum(-1), linked)
    assert torch.equal(normalise(adj, "sender").mT, normalise(adj, "receiver"))
    assert torch.equal(normalise(adj, "symmetric"), normalise(adj, "symmetric").mT)
    directed = adj * torch.rand(adj.shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(normalise(directed, "receiver").sum(-1), linked)


def test_a_learned_matrix_gets_finite_gradients():
    adj = torch.zeros(1, 3, 3, requires_grad=True)
    for norm in ("sender", "receiver", "symmetric"):
        grad, = torch.autograd.grad(normalise(adj * 1., norm).sum(), adj)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("use", [lambda: normalise(torch.zeros(1, 2, 2), "row"), lambda: GraphConv(1, 1, norm="row")])
def test_another_norm(use):
    with pytest.raises(ConfigError, match="norm must be sender, receiver, symmetric or none, got 'row'"): use()


# ---- the layer -----------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["sender", "receiver", "symmetric", "none"])
@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_graph_convolution_is_what_a_loop_makes(norm, decouple, modulated):
    torch.manual_seed(0)
    (links, valid), layer = random_case(1), GraphConv(6, 5, decouple, norm)
    adj = adjacency(links, valid)
    x, m = torch.randn(4, 9, 6), torch.rand(4, 9, 5) if modulated else torch.ones(4, 9, 5)
    weight, bias = layer.linear.weight.split(5), layer.linear.bias.split(5)
    got, links_of = layer(x, adj, valid, m if modulated else None), adj.sum(-1)
    for b in range(4):
        for w in range(9):
            total = m[b, w] * (weight[0] @ x[b, w] + bias[0]) if decouple else torch.zeros(5)
            for v in adj[b, w].nonzero()[:, 0].tolist():
                share = {"sender": 1 / links_of[b, v], "receiver": 1 / links_of[b, w], "none": 1.,
                         "symmetric": (links_of[b, v] * links_of[b, w]) ** -.5}[norm]
                total = total + share * m[b, v] * (weight[-1] @ x[b, v] + bias[-1])
            torch.testing.assert_close(got[b, w], total * valid[b, w], atol=1e-5, rtol=1e-5)


def test_slots_that_are_not_valid_neither_speak_nor_hear():
    torch.manual_seed(0)
    (links, valid), layer = random_case(2), GraphConv(6, 5)
    x = torch.randn(4, 9, 6)
    other = torch.where(valid[..., None], x, 1e3)
    adj = adjacency(links, valid)
    assert torch.equal(layer(x, adj, valid), layer(other, adj, valid))
    assert not layer(other, adj, valid)[~valid].any()


def test_bfloat16():
    layer, adj = GraphConv(6, 5), adjacency([star], three)
    with torch.autocast("cpu", torch.bfloat16): y = layer(torch.randn(1, 3, 6), adj, three)
    y.float().sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(layer.linear.weight.grad).all()


# ---- breadth first -------------------------------------------------------------------------------

def by_queue(pairs, visible, count):
    near = {k: [] for k in range(len(visible))}
    for a, b in pairs.tolist():
        near[a].append(b)
        near[b].append(a)
    out = []
    for k in range(len(visible)):
        found, queue = [k], deque([k])
        while queue:
            who = queue.popleft()
            for other in near[who] if visible[who] else []:
                if other not in found:
                    found.append(other)
                    queue.append(other)
        out.append((found + [k] * count)[:count])
    return torch.tensor(out)


@pytest.mark.parametrize("case", [f"{s}{j}_{kind}" for s in "AB" for j in "01" for kind in ("eqdiv", "mix")])
def test_the_lists_are_the_official_ones(case):
    g = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden/graph_bfs.npz").items()}
    links, visible, wanted = (g[f"{case}_{k}"].long() for k in ("links", "visible", "ref_index"))
    assert torch.equal(bfs(links, visible > 0, 16), wanted)
    assert torch.equal(bfs(links, visible > 0, 8), wanted[:, :8])
    assert not torch.equal(bfs(links.flip(0), visible > 0, 16), wanted)       # the order of links counts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 3, 16])
def test_all_at_once_is_one_by_one(seed, count):
    links, visible = random_case(seed, batch=5, pairs=1 + seed)
    many = bfs_batch(links, visible, count)
    for b in range(5):
        assert torch.equal(many[b], by_queue(links[b], visible[b], count))
        assert torch.equal(many[b], bfs(links[b], visible[b], count))


def test_none_wanted():
    with pytest.raises(ConfigError, match="count must be at least 1, got 0"): bfs(star, three[0], 0)


# ---- guesses -------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_edge_auc_is_scikit_learns(seed):
    from sklearn.metrics import roc_auc_score
    links, valid = random_case(seed, batch=1, pairs=20)
    scores = torch.randint(4, (9, 9), generator=torch.Generator().manual_seed(seed)).float()
    true, score = [], []
    adj = adjacency(links, valid)[0]
    for i in range(9):
        for j in range(i + 1, 9):
            if valid[0, i] and valid[0, j]:
                true.append(adj[i, j].item())
                score.append((scores[i, j] + scores[j, i]).item())
    assert edge_auc(scores, links[0], valid[0]) == pytest.approx(roc_auc_score(true, score))


def test_edge_auc_without_an_answer():
    for links in (torch.zeros(0, 2).long(), torch.tensor([[0, 1], [0, 2], [1, 2]])):
        assert np.isnan(edge_auc(torch.rand(3, 3), links))


def test_lines_are_as_wide_as_scores():
    from matplotlib.figure import Figure
    scores = torch.tensor([[0., 2., .01], [2., 0., 0.], [.01, 2., 0.]])
    for points in (np.eye(3)[:, :2] * 30, torch.eye(3)[:, :2] * 30):
        ax = draw_structure(Figure().subplots(), np.ones((40, 40, 3)), points, scores, width=5.)
        lines = [line for line in ax.lines if len(line.get_xdata()) == 2]
        assert [line.get_linewidth() for line in lines] == [2.5, 5.]
        few = draw_structure(Figure().subplots(), np.ones((40, 40, 3)), points, scores, top=1)
        assert len([line for line in few.lines if len(line.get_xdata()) == 2]) == 1
    hidden = draw_structure(Figure().subplots(), None, points, scores, visible=[True, False, True])
    line, = [line for line in hidden.lines if len(line.get_xdata()) == 2]
    assert list(line.get_xdata()) == [30, 0] and list(line.get_ydata()) == [0, 0]     # of those that are seen


@pytest.mark.parametrize("scores,said", [(-torch.eye(3), "negative"), (torch.full((3, 3), float("nan")), "NaN"),
                                         (torch.eye(2), r"expected \(3, 3\) for 3 keypoints, got \(2, 2\)")])
def test_bad_scores(scores, said):
    from matplotlib.figure import Figure
    with pytest.raises(DataError, match=said): draw_structure(Figure().subplots(), None, torch.rand(3, 2), scores)
