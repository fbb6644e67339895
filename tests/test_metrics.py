"Guards of `cape.metrics`: the published codes' numbers, and laws that no example in the chapter shows."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cape import metrics as M
from cape.errors import ConfigError, DataError

GOLDEN = Path(__file__).parent / "golden" / "golden_metrics.npz"


@pytest.fixture(scope="module")
def golden():
    "Predictions, truth, mask and norm of 36 pairs, and what CapeFormer's and POMNet's code say of them."
    with np.load(GOLDEN) as z: g = {k: z[k] for k in z.files}
    return g | {"metrics": json.loads(str(g["metrics"]))}


@pytest.fixture
def scored():
    "Random distances with a mask in which some pairs are empty."
    rng = np.random.default_rng(3)
    d, mask = rng.uniform(0, .6, (50, 7)), rng.random((50, 7)) < .6
    mask[::9] = False
    return d, mask


def test_published_codes(golden):
    g, want = golden, golden["metrics"]
    d = M.distances(g["predicted"], g["truth"], g["norm"], g["mask"])
    score = M.mpck(d, g["mask"], M.MPCK_FIVE, official=True)
    got = {f"PCK@{t:g}": v for t, v in score.by_threshold.items()} | {
        "mPCK": float(score), "AUC": float(M.auc(d, g["mask"], official=True)),
        "NME": float(M.nme(d, g["mask"], official=True)), "PCK": score[.2],
        "EPE": float(M.epe(g["predicted"], g["truth"], g["mask"], official=True))}
    assert got.keys() == want.keys()
    for name in want: assert got[name] == pytest.approx(want[name], rel=1e-7), name
    assert round(got["PCK@0.2"], 7) == .6731833


def test_empty_pairs(scored):
    d, mask = scored
    ours, theirs = M.pck(d, mask, .2), M.pck(d, mask, .2, official=True)
    assert ours.empty == theirs.empty == 6 and ours.pairs == 44 and theirs.pairs == 50
    assert theirs.value == pytest.approx(ours.value * 44 / 50)
    assert "6 empty left out" in str(ours) and "6 empty scored 0" in str(theirs)
    assert np.isnan(M.pck(d, np.zeros_like(mask), .2).value)
    assert M.nme(d, np.zeros_like(mask), official=True).value == 0


def test_strictly_less():
    assert M.pck([[.2]], [[True]], .2).value == 0
    assert M.pck([[.2]], [[True]], np.nextafter(.2, 1)).value == 1


@pytest.mark.parametrize("average", ["pair", "keypoint"])
def test_padding_changes_nothing(scored, average):
    d, mask = scored
    wide = np.pad(d, ((0, 0), (0, 5)), constant_values=np.nan), np.pad(mask, ((0, 0), (0, 5)))
    for metric in (M.pck, M.mpck, M.auc, M.nme):
        assert metric(*wide, average=average) == metric(d, mask, average=average)


def test_scores_print_their_thresholds(scored):
    assert "@0.05,0.1,0.15,0.2 " in str(M.mpck(*scored))
    five = str(M.mpck(*scored, M.MPCK_FIVE))
    assert "five" in five and "@0.05,0.1,0.15,0.2,0.25 " in five
    assert "0 to 0.95" in str(M.auc(*scored))


def test_breakdowns_add_up(scored):
    d, mask = scored
    kind = np.arange(50) % 3
    total = M.pck(d, mask, .2, "keypoint").value * mask.sum()
    parts = M.per_keypoint(d, mask, kind, .2)
    assert sum(np.nansum(share * count) for share, count in parts.values()) == pytest.approx(total)
    hidden = np.random.default_rng(0).random(mask.shape) < .3
    both = M.by_occlusion(d, mask, hidden, .2)
    assert both["occluded"].value * (mask & hidden).sum() + both["visible"].value * (mask & ~hidden).sum() \
        == pytest.approx(total)
    assert both["occluded"].value == pytest.approx((d[mask & hidden] < .2).mean())
    means, counts = zip(*M.per_category(M.pair_scores(d, mask, .2)[:, 0], kind).values())
    assert sum(counts) == 44 and np.average(means, weights=counts) == pytest.approx(M.pck(d, mask, .2).value)


def test_bootstrap_equals_a_plain_loop():
    "The weights-and-sums form against resampling written out: same mean and same spread."
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 40, 300)
    values = rng.normal(photo % 5, 1.)
    fast = M.bootstrap(values, photo, n=4000)
    groups = [values[photo == p] for p in np.unique(photo)]
    slow = [np.concatenate([groups[i] for i in rng.integers(0, 40, 40)]).mean() for _ in range(4000)]
    assert fast.mean == pytest.approx(values.mean())
    assert fast[1:] == pytest.approx(np.quantile(slow, [.025, .975]), abs=.03)


def test_bootstrap_laws():
    rng = np.random.default_rng(1)
    values, photo = rng.random(400), np.arange(400) // 4
    plain = M.bootstrap(values, photo)
    assert plain == M.bootstrap(values, photo) != M.bootstrap(values, photo, seed=1)
    assert plain == M.bootstrap(np.r_[values, np.nan], np.r_[photo, 0])            # an empty pair is left out
    assert plain == M.bootstrap(values, np.array([f"{p:04}.jpg" for p in photo]))  # labels may be names
    wide = M.bootstrap(values, photo, level=.99)
    assert wide.low < plain.low and wide.high > plain.high
    assert M.bootstrap(np.ones(400), photo, supports=np.arange(400) % 7) == (1, 1, 1)


def test_supports_are_drawn_again_as_a_plain_loop_does():
    rng = np.random.default_rng(3)
    query, support = rng.integers(0, 12, 300), np.repeat(np.arange(20), 15)
    values = .2 * query / 12 + .3 * support / 20 + rng.normal(0, .1, 300)
    means = []
    for _ in range(4000):
        weight = np.bincount(rng.integers(0, 12, 12), minlength=12)[query] * np.bincount(rng.integers(0, 20, 20), minlength=20)[support]
        means.append((weight * values).sum() / weight.sum())
    found = M.bootstrap(values, query, n=4000, supports=support)
    assert np.allclose(found[1:], np.quantile(means, [.025, .975]), atol=.005)
    slow = M._crossed_sparse(values, query, support, 4000, np.random.default_rng(0))
    assert np.allclose(np.quantile(slow, [.025, .975]), found[1:], atol=.005)
    many = M.bootstrap(np.tile(values, 4), np.arange(1200), supports=np.arange(1200))     # a table would be empty
    assert many.low < many.mean < many.high

def test_bootstrap_of_categories_keeps_each():
    "Category means 0 and 1 without spread inside: a balanced interval has no width, a plain one has."
    values, kind = np.r_[np.zeros(30), np.ones(10)], np.r_[np.zeros(30), np.ones(10)]
    assert M.bootstrap(values, np.arange(40), category=kind) == (.5, .5, .5)
    plain = M.bootstrap(values, np.arange(40))
    assert plain.low < .2 < .3 < plain.high


def test_paired_test_is_antisymmetric_and_balanced():
    rng = np.random.default_rng(2)
    a, b, photo = rng.random(200), rng.random(200), np.arange(200) // 5
    one, other = M.paired_test(a, b, photo), M.paired_test(b, a, photo)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-6)
    assert one.difference == pytest.approx(-other.difference) and one.p == other.p
    kind = (np.arange(200) >= 150).astype(int)
    gain = np.where(kind == 1, .2, 0)
    assert M.paired_test(a + gain, a, photo).difference == pytest.approx(.05)
    assert M.paired_test(a + gain, a, photo, category=kind).difference == pytest.approx(.1)
    assert M.paired_test(a, a, photo).p == 1
    noise = rng.normal(size=400)
    gain = np.r_[noise - noise.mean(), rng.normal(.15, .05, 40)]    # a small category with a sure gain
    kind, photo = (np.arange(440) >= 400).astype(int), np.arange(440)
    assert M.paired_test(gain, 0 * gain, photo, category=kind).p < .02
    assert M.paired_test(gain, 0 * gain, photo).p > .2


Z = np.zeros((2, 3, 2))


@pytest.mark.parametrize("call, error, words", [
    (lambda: M.distances(Z, Z, [1, np.nan]), DataError, "norm must be positive"),
    (lambda: M.distances(Z, Z + np.nan, 1.), DataError, "truth is not finite at pair 0, keypoint 0"),
    (lambda: M.distances(Z + np.inf, Z, 1.), DataError, "predicted is not finite"),
    (lambda: M.distances(Z, Z[:1], 1.), DataError, "2 pairs but truth has 1"),
    (lambda: M.distances(Z[..., 0], Z, 1.), DataError, "expected (pairs, keypoints, 2)"),
    (lambda: M.pck(np.zeros(3), None, .2), DataError, "expected (pairs, keypoints)"),
    (lambda: M.pck([[.1]], [[1]], -1), ConfigError, "thresholds"),
    (lambda: M.bootstrap([1.], [1], level=95), ConfigError, "level"),
    (lambda: M.per_category([1.], [1, 2]), DataError, "one of each a pair"),
    (lambda: M.per_keypoint([[1.]], [[True]], [1, 2]), DataError, "category has shape (2,), expected (1,)"),
    (lambda: M.paired_test([1., 2.], [1., 2.], [0]), DataError, "expected (2,)"),
    (lambda: M.paired_test([1., 2.], [1.], [0, 1]), DataError, "the same pairs in the same order"),
])
def test_clear_errors(call, error, words):
    with pytest.raises(error, match="^[^\n]+$") as e: call()
    assert words in str(e.value)


def test_a_masked_pair_may_have_no_box():
    d = M.distances(np.ones((2, 1, 2)), np.zeros((2, 1, 2)), [10, 0], [[True], [False]])
    assert d[0, 0] == pytest.approx(2 ** .5 / 10) and np.isnan(d[1, 0])


def test_light_import():
    "The module needs numpy alone."
    code = "import sys, cape.metrics; print({'torch', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
