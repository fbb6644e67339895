"""Super-keypoints: the published clustering exactly, the laws of both clusterings, their scores, and what is refused."""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from cape.errors import ConfigError, DataError
from cape.layers.superkeypoints import (cluster_scores, decision_graph, density_peaks, greedy_peaks, keypoint_means,
                                        purity)

BOTH = pytest.mark.parametrize("cluster", [density_peaks, greedy_peaks])


@pytest.fixture(scope="module")
def golden(): return np.load(Path(__file__).parent / "golden" / "escape_cluster.npz")


def table(seed, categories=14, groups=9, dim=16, noise=.35):
    "Noisy copies of a few directions, some in each category, and a stray point in each."
    rng = np.random.default_rng(seed)
    centres, points, category, truth = rng.normal(size=(groups, dim)), [], [], []
    for c in range(categories):
        some = rng.permutation(groups)[:rng.integers(2, groups + 1)]
        points += [centres[g] + noise * rng.normal(size=dim) for g in some] + [rng.normal(size=dim)]
        category += [c] * (len(some) + 1)
        truth += [*some, groups + c]
    return np.array(points), np.array(category), np.array(truth)


def same_partition(a, b): return adjusted_rand_score(a, b) == 1


@pytest.mark.parametrize("threshold", [.6, .8, .9])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_published_labels_and_vectors(golden, threshold, kind):
    made = greedy_peaks(kind(golden["points"]), kind(golden["category"]), threshold)
    np.testing.assert_array_equal(made.labels, golden[f"labels_thr{threshold}"])
    np.testing.assert_array_equal(made.vectors, golden[f"superkeypoints_thr{threshold}"])
    assert made.vectors.dtype == np.float32 and made.labels.dtype == np.int64


def test_golden_holds_take_overs(golden):
    "Members that an earlier founder had within reach: else the vectors would prove little"
    points, category = golden["points"], golden["category"]
    made, unit = greedy_peaks(points, category), points / np.linalg.norm(points, axis=1, keepdims=True)
    alike = unit @ unit[made.peaks].T
    earlier = [(alike[i, :made.labels[i]] > .8).any() for i in range(len(points))]
    assert sum(earlier) >= 10


def test_a_cluster_can_lose_all_members():
    "By taking over: it keeps its number and its founder's vector"
    angles = np.radians([8, 97, 98, 102, 103, 107, 113])
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    made = greedy_peaks(points, [1, 0, 0, 3, 3, 2, 2], np.cos(np.radians(30)), 2)
    assert len(made) == 5 and set(made.labels) == {2, 3, 4}
    assert made.labels.max() == len(made) - 1 and len(made.members(0)) == len(made.members(1)) == 0
    np.testing.assert_allclose(made.vectors, points[made.peaks], atol=1e-6)


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_one_category_never_twice_and_every_point_once(cluster, seed):
    points, category, _ = table(seed)
    made = cluster(points, category)
    assert max(Counter(zip(category, made.labels)).values()) == 1
    assert made.labels.max() == len(made) - 1
    assert sorted(np.concatenate([made.members(z) for z in range(len(made))])) == list(range(len(points)))
    assert len(made) >= Counter(category).most_common(1)[0][1]


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_permuting_points_permutes_labels(cluster, seed):
    points, category, _ = table(seed)
    order = np.random.default_rng(seed).permutation(len(points))
    assert same_partition(cluster(points, category).labels[order], cluster(points[order], category[order]).labels)


@BOTH
def test_same_again_and_names_of_categories_do_not_matter(cluster):
    points, category, _ = table(0)
    first, names = cluster(points, category), [f"kind {c}" for c in category]
    for again in (cluster(points, category), cluster(torch.as_tensor(points), names)):
        np.testing.assert_array_equal(first.labels, again.labels)
        np.testing.assert_array_equal(first.vectors, again.vectors)


@BOTH
@pytest.mark.parametrize("scale", [1e-30, 7, 1e30])
def test_length_means_nothing_to_a_cosine(cluster, scale):
    points, category, _ = table(1)
    lengths = np.random.default_rng(0).uniform(.2, 5, (len(points), 1))
    expected = cluster(points, category).labels
    np.testing.assert_array_equal(cluster(points * scale, category).labels, expected)
    np.testing.assert_array_equal(cluster(points * lengths, category).labels, expected)


@pytest.mark.parametrize("scale, shift", [(1e-30, 0), (1e30, 0), (3, 100)])
def test_euclidean_knows_neither_scale_nor_origin(scale, shift):
    points, category, _ = table(1)
    expected = density_peaks(points, category, metric="euclidean").labels
    np.testing.assert_array_equal(density_peaks(points * scale + shift, category, metric="euclidean").labels, expected)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("seed", range(4))
def test_separated_groups_are_found(metric, seed):
    points, category, truth = table(seed, noise=.02)
    stray = truth >= 9
    made = density_peaks(points[~stray], category[~stray], metric=metric)
    assert same_partition(made.labels, truth[~stray])
    assert same_partition(greedy_peaks(points[~stray], category[~stray]).labels, truth[~stray])
    for z in range(len(made)):
        np.testing.assert_allclose(made.vectors[z], points[~stray][made.members(z)].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_without_the_constraint_founders_are_the_points_above_the_curve(seed):
    points, own = table(seed)[0], np.arange(len(table(seed)[0]))
    density, distance = decision_graph(points, own)
    counts = []
    for t in np.linspace(.02, .7, 30):
        made = density_peaks(points, own, t)
        np.testing.assert_array_equal(np.sort(made.peaks), np.flatnonzero(density > t / distance))
        counts.append(len(made))
    assert (np.diff(counts) <= 0).all() and counts[0] > counts[-1]


def test_the_graph_is_the_one_that_clusters():
    points, category, _ = table(2)
    density, distance = decision_graph(points, category)
    made = density_peaks(points, category)
    np.testing.assert_array_equal(density, made.density)
    np.testing.assert_array_equal(distance, made.distance)
    assert np.isinf(distance[density.argmax()]) and ((0 <= density) & (density <= 1)).all()


def test_graph_against_loops():
    points, category, _ = table(3)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    apart = np.linalg.norm(unit[:, None] - unit, axis=-1)
    foreign = category[:, None] != category
    apart /= np.sqrt((apart[foreign] ** 2).mean())
    density, distance = decision_graph(points, category, 4)
    for i in range(len(points)):
        near = np.sort(apart[i][foreign[i]])[:4]
        assert density[i] == pytest.approx(np.exp(-(near ** 2).mean()), abs=1e-8)
        denser = apart[i][foreign[i] & (density > density[i])]
        assert distance[i] == pytest.approx(denser.min() if len(denser) else np.inf, abs=1e-8)


@BOTH
def test_with_the_constraint_the_number_is_not_monotone(cluster):
    "Some table has a step against the trend, which is why the text does not promise it"
    sign = 1 if cluster is density_peaks else -1
    grid = np.linspace(.05, .6, 40) if sign == 1 else np.linspace(.3, .95, 40)
    counts = [[len(cluster(*table(seed, noise=.6)[:2], t)) for t in grid] for seed in range(4)]
    steps = np.diff(counts, axis=1) * sign
    assert (steps > 0).any() and (steps.sum(1) < 0).all()


@BOTH
def test_duplicates(cluster):
    points = np.repeat(np.random.default_rng(0).normal(size=(4, 8)), 5, 0)      # 4 places, 5 categories at each
    made = cluster(points, np.tile(np.arange(5), 4))
    np.testing.assert_array_equal(made.labels, np.repeat(made.labels[::5], 5))
    assert len(made) == 4
    np.testing.assert_array_equal(np.sort(made.peaks), [0, 5, 10, 15])           # of equals, the first
    assert len(cluster(np.ones((9, 3)), np.arange(9))) == 1                      # all the same
    assert len(cluster(np.zeros((9, 3)), np.arange(9))) in (1, 9)                # no direction at all


@BOTH
def test_one_category_is_all_singletons(cluster):
    made = cluster(table(0)[0], np.zeros(len(table(0)[0])))
    assert len(made) == len(made.labels) == len(np.unique(made.labels))
    np.testing.assert_allclose(made.vectors, table(0)[0][made.peaks], rtol=1e-6)


@BOTH
@pytest.mark.parametrize("change, error, words", [
    (dict(vectors=np.full((9, 3), np.nan)), DataError, r"rows \[0, 1, 2, 3, 4\] of 9 are not finite"),
    (dict(vectors=np.full((9, 3), np.inf)), DataError, "not finite"),
    (dict(vectors=np.ones((6, 3)), category=np.arange(6)), DataError, "6 neighbours of a point need 7 points, got 6"),
    (dict(vectors=np.ones((0, 3)), category=[]), DataError, "got 0"),
    (dict(vectors=np.ones(9)), DataError, r"\(N, C\)"),
    (dict(vectors=[["a"] * 3] * 9), DataError, "expected numbers"),
    (dict(category=np.arange(8)), DataError, "one label for each of 9 vectors, got \\(8,\\)"),
    (dict(category=np.zeros((9, 1))), DataError, "one label"),
    (dict(k=0), ConfigError, "k must be"), (dict(k=2.5), ConfigError, "got 2.5"), (dict(k=True), ConfigError, "k must"),
    (dict(threshold=np.nan), ConfigError, "threshold"), (dict(threshold=-2), ConfigError, "threshold"),
])
def test_faults(cluster, change, error, words):
    rng = np.random.default_rng(0)
    with pytest.raises(error, match=words):
        cluster(**{**dict(vectors=rng.normal(size=(9, 3)), category=np.arange(9)), **change})


def test_unknown_metric():
    with pytest.raises(ConfigError, match="cosine or euclidean, got 'dot'"):
        density_peaks(np.ones((9, 3)), np.arange(9), metric="dot")


def test_tensors_that_carry_gradients_are_welcome():
    points, category, _ = table(0)
    asked = torch.tensor(points, requires_grad=True)
    np.testing.assert_array_equal(density_peaks(asked, torch.as_tensor(category)).labels, density_peaks(points, category).labels)


def test_means_do_not_depend_on_batches():
    torch.manual_seed(0)
    vectors, weight, rows = torch.randn(8, 5, 3), (torch.rand(8, 5) > .4).float(), torch.randint(0, 7, (8, 5))
    whole, seen = keypoint_means([(vectors, weight, rows)], 9)
    parted, _ = keypoint_means(zip(vectors.split(3), weight.split(3), rows.split(3)), 9)
    torch.testing.assert_close(whole, parted)
    for n in range(9):
        on = (rows == n) & (weight > 0)
        expected = vectors[on].mean(0) if on.any() else torch.zeros(3)
        torch.testing.assert_close(whole[n], expected)
        assert seen[n] == on.sum()


def test_scores_are_those_of_scikit_learn_and_perfect_ones_are_one():
    _, category, truth = table(0)
    labels = np.random.default_rng(0).permutation(50)[truth]
    perfect = cluster_scores(labels, truth, category, 40)
    assert perfect["purity"].value == perfect["ari"].value == 1 and perfect["ari"].chance < .1
    assert perfect["ari"].low == perfect["ari"].high == 1
    labels = density_peaks(*table(0)[:2]).labels
    made = cluster_scores(labels, truth, category, 40)
    assert made["ari"].value == adjusted_rand_score(truth, labels)
    assert made["purity"].value == sum(Counter(truth[labels == z]).most_common(1)[0][1] for z in set(labels)) / len(labels)
    assert made == cluster_scores(torch.as_tensor(labels), [str(t) for t in truth], category, 40)


def test_unrelated_labels_score_as_chance():
    rng = np.random.default_rng(0)
    category = np.repeat(np.arange(60), 6)
    labels, truth = (np.concatenate([rng.permutation(6) for _ in range(60)]) for _ in range(2))
    made = cluster_scores(labels, truth, category)
    for score in made.values(): assert score.low - .02 < score.chance < score.high + .02
    assert made["purity"].chance > .15 and abs(made["ari"].chance) < .02


def test_the_interval_is_as_wide_as_it_should_be():
    "One point a category, all in one cluster: purity is a mean over categories, whose standard error is known"
    rng, widths = np.random.default_rng(0), []
    for _ in range(10):
        truth = rng.random(200) < .8
        score = cluster_scores(np.zeros(200), truth, np.arange(200), 400)["purity"]
        widths.append((score.high - score.low) / (2 * 1.96 * (score.value * (1 - score.value) / 200) ** .5))
    assert .9 < np.mean(widths) < 1.1


@pytest.mark.parametrize("labels, parts, category, words", [
    ([0, 1, 2], ["a", "b"], [0, 1, 2], "parts: expected one for each keypoint, \\(3,\\), got \\(2,\\)"),
    ([0, 1, 2], ["a", "b", "c"], [0, 1], "category"), ([], [], [], "labels"),
    ([0, 1, 2], ["a", "b", "c"], [5, 5, 5], "needs two of them, got 1")])
def test_scores_refuse(labels, parts, category, words):
    with pytest.raises(DataError, match=words): cluster_scores(labels, parts, category)


def test_purity_by_hand(): assert purity(list("aabbb"), [0, 0, 0, 1, 1]) == .8
