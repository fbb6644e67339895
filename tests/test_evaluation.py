"The evaluator: numbers that can be checked by hand, and laws that caching and batching must not break."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cape.data.annotations import PoseDataset
from cape.data.crops import CropLoader, apply_matrix
from cape.data.episodes import TestEpisodes
from cape.errors import CapeError, ConfigError, DataError, MissingFileError
from cape import evaluation, metrics
from cape.evaluation import PORTION, FeatureCache, Report, evaluate, pooled, portion, table
from cape.models.base import CapeModel, Prediction
from test_learner import TestNet, dots_data, fresh

SMALL = dict(episodes=4, queries=3, size=32, progress=False)


class Oracle(CapeModel):
    "Knows the truth and misses keypoint k by `off[k]` of the box's longest side, to the right."
    name, needs_images = "oracle", False
    def __init__(self, off=(0.,)): super().__init__(); self.off = off
    def forward(self, batch):
        point = batch.query_keypoints.clone()
        step = batch.query_box_side * batch.query_matrix[..., 0, 0] / batch.size    # a box's side in crop units
        for k, off in enumerate(self.off): point[:, :, k, 0] += off * step
        return Prediction(point, torch.ones(point.shape[:3]))


class Copy(CapeModel):
    name, needs_images = "copycat", False
    def forward(self, batch):
        point = batch.support_keypoints[:, :1].expand(-1, batch.queries, -1, -1)
        return Prediction(point, torch.ones(point.shape[:3]))


class Counts(TestNet):
    "Counts what it is asked to encode."
    def __init__(self): super().__init__(); self.images = self.calls = self.adapted = 0
    def encode(self, images, role="query"):
        self.images += len(images); self.calls += 1
        return super().encode(images, role)
    def adapt(self, support, keypoints, visible, links=None):
        self.adapted += len(keypoints)
        return super().adapt(support, keypoints, visible, links)


@pytest.fixture(scope="module")
def data(tmp_path_factory): return dots_data(tmp_path_factory.mktemp("dots"), images=7)

def same(a, b, eps=0.):
    assert np.array_equal(a.mask, b.mask) and np.array_equal(a.query, b.query)
    return np.abs(np.nan_to_num(a.distances - b.distances)).max() <= eps


# ---- numbers

def test_truth_scores_one_and_known_offsets_score_by_hand(data):
    assert evaluate(Oracle(), data, **SMALL).pck == {.05: 1., .1: 1., .15: 1., .2: 1.}
    report = evaluate(Oracle((.07, .12, .18, .4)), data, **SMALL)
    for t, hit in ((.05, ()), (.1, (0,)), (.15, (0, 1)), (.2, (0, 1, 2))):
        scored = [report.mask[p] for p in range(report.pairs)]
        pairs = [m[list(hit)].sum() / m.sum() if m.any() else np.nan for m in scored]
        by_category = [np.nanmean(np.array(pairs)[report.category == c]) for c in report.categories]
        assert report.pck[t] == pytest.approx(np.mean(by_category))
    assert np.allclose(report.distances[report.mask], np.broadcast_to([.07, .12, .18, .4], report.mask.shape)[report.mask], atol=1e-5)
    assert report.mpck == pytest.approx(np.mean(list(report.pck.values())))
    assert [s for _, s, n in report.per_keypoint(.1)["dots0"]] == [1, 0, 0, 0]

def test_copy_equals_copying_by_hand(data):
    report = evaluate(Copy(), data, **SMALL)
    source, errors = CropLoader(data, 32), []
    for episode in TestEpisodes(data, 1, 3, 4, 0).episodes:
        (s,), scored = episode.support, []
        given = source.crops([s], images=False)
        for q in episode.query:
            a, b = data[s], data[q]
            units = given.keypoints[0].double().numpy() * 32
            matrix = source.crops([q], images=False).matrix[0].numpy()
            back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
            off = np.linalg.norm(apply_matrix(back, units) - b.keypoints, axis=1) / b.box_side
            errors.append(np.where(a.visible & b.visible, off, np.nan))
    assert np.allclose(report.distances, errors, atol=1e-6, equal_nan=True)

def test_points_come_back_in_image_pixels(data):
    report = evaluate(Oracle(), data, **SMALL)
    truth = np.array([data[q].keypoints for q in report.query])
    assert np.abs(report.points - truth)[report.mask].max() < 1e-3

def test_masks_and_empty_pairs(tmp_path):
    data = dots_data(tmp_path, categories=2, images=6)
    coco = data.to_dict()
    for note in coco["annotations"][:6]:                                # first category: one keypoint each, 0 or 3
        note["keypoints"] = [1. if j % 3 < 2 else (2. if j // 3 == (0 if note["id"] % 2 else 3) else 0.) for j in range(12)]
    data = PoseDataset.from_dict(coco, data.root, "halves")
    own, theirs = (evaluate(Oracle((.3,)), data, official=o, **SMALL) for o in (False, True))
    assert own.empty == theirs.empty > 0
    first = own.category == 1
    met = own.mask[first].any(1)
    assert own.per_category["dots0"]["pck"][.2] == pytest.approx(own.scores(.2)[first][met].mean())
    assert theirs.per_category["dots0"]["pck"][.2] == pytest.approx(np.where(met, own.scores(.2)[first], 0).mean())
    assert "left out" in own.summary() and "scored 0" in theirs.summary()
    assert evaluate(Oracle(), data, protocol="official", episodes=4, queries=3, size=32, progress=False).settings["official"]
    both, some = (evaluate(Oracle(), data, shots=2, mask=m, **SMALL) for m in ("all", "any"))
    assert both.mask.sum() < some.mask.sum() and (some.mask | ~both.mask).all()


# ---- laws

def test_cached_equals_uncached_and_batch_size_changes_nothing(data):
    model = fresh().eval()
    one = evaluate(model, data, shots=2, **SMALL)
    assert same(one, evaluate(model, data, shots=2, cached=False, **SMALL), 1e-5)
    for batch_size in (1, 2, 5, 100): assert same(one, evaluate(model, data, shots=2, batch_size=batch_size, **SMALL), 1e-5)

def test_two_calls_agree_and_another_seed_does_not(data):
    a, b, c = (evaluate(Copy(), data, seed=s, **SMALL) for s in (0, 0, 1))
    assert a.fingerprint == b.fingerprint != c.fingerprint and same(a, b) and a.interval() == b.interval()

def test_every_image_is_encoded_once_and_every_episode_adapted_once(data):
    model = Counts()
    report = evaluate(model, data, **SMALL)
    used = {*report.query.tolist(), *report.support.tolist()}
    assert model.images == len(used) == report.settings["encoded"] and model.adapted == 3 * 4
    lazy = Counts()
    evaluate(lazy, data, cached=False, **SMALL)
    assert lazy.images == 2 * report.pairs and lazy.adapted == report.pairs

def test_little_memory_gives_the_same_numbers(data):
    model, row = fresh().eval(), 8 * 16 * 16 * 4                        # bytes of one image's features
    seen = []
    load = FeatureCache.load
    def watched(self, keys): load(self, keys); seen.append(len(self))
    FeatureCache.load = watched
    try: tight = evaluate(model, data, memory_gb=5.5 * row / 1e9, **SMALL)
    finally: FeatureCache.load = load
    assert max(seen) == 5                                               # room for five; an episode has four images
    wide = evaluate(model, data, **SMALL)
    assert same(tight, wide, 1e-5) and tight.settings["encoded"] > wide.settings["encoded"]

def test_a_processor_works_in_portions_and_the_numbers_stay(data, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [portion(size, 32, cpu) for size in (0, 1, PORTION // 5, PORTION, 9 * PORTION)] == [32, 32, 5, 1, 1]
    assert portion(9 * PORTION, 32, gpu) == 32
    asked = []
    class Watched(TestNet):
        def encode(self, images, role="query"): asked.append(len(images)); return super().encode(images, role)
        def locate(self, prompt, query): asked.append(query["map"].shape[:2].numel()); return super().locate(prompt, query)
    model = fresh(Watched).eval()
    whole, most = evaluate(model, data, **SMALL), max(asked)
    monkeypatch.setattr(evaluation, "PORTION", 2 * 3 * 4 * 32**2)       # two images; features of TestNet are smaller
    asked.clear()
    small = evaluate(model, data, **SMALL)
    assert max(asked) <= 3 < most and asked.count(2) > 3 and same(whole, small, 1e-5)

def test_roles_are_kept_apart(data):
    class TwoEyes(TestNet):
        roles_differ = True
        def encode(self, images, role="query"): return {"map": self.net(images) * (2 if role == "support" else 1)}
    assert same(evaluate(fresh(TwoEyes), data, **SMALL), evaluate(fresh(TwoEyes), data, cached=False, **SMALL), 1e-5)

def test_model_is_left_as_it_was(data):
    model = fresh().train()
    evaluate(model, data, **SMALL)
    assert model.training and all(p.grad is None for p in model.parameters())


# ---- reports

def test_report_survives_its_file(data, tmp_path):
    a = evaluate(Oracle((.07, .12, .18, .4)), data, thresholds=(.05, .2, .333), **SMALL)
    b, other = Report.from_json(a.to_json(tmp_path / "r.json")), evaluate(Copy(), data, thresholds=(.05, .2, .333), **SMALL)
    assert a.pck == b.pck and a.mpck == b.mpck and a.auc == b.auc and a.nme == pytest.approx(b.nme)
    assert a.interval(.2) == b.interval(.2) and a.interval("mpck") == b.interval("mpck")
    assert a.compare(other) == b.compare(other) and a.compare(other, "auc") == b.compare(other, "auc")
    assert a.per_category["dots1"]["pck"] == b.per_category["dots1"]["pck"] and a.per_keypoint() == b.per_keypoint()
    assert [str(s) for s in a.by_occlusion().values()] == [str(s) for s in b.by_occlusion().values()]
    assert {"fingerprint", "torch", "cape", "commit", "seed", "protocol", "seconds"} <= set(b.settings)
    assert (tmp_path / "r.json").read_text().count("NaN") == 0
    with pytest.raises(ConfigError, match="no threshold 0.1234"): b.scores(.1234)

def test_distances_on_a_threshold_survive(data, tmp_path):
    a = evaluate(Oracle(), data, **SMALL)
    a.distances[a.mask] = np.resize([.05, .1, .15, .2, .19999999], a.mask.sum())
    assert Report.from_json(a.to_json(tmp_path / "r.json")).pck == a.pck

def test_damaged_reports_are_named(data, tmp_path):
    path = evaluate(Oracle(), data, **SMALL).to_json(tmp_path / "r.json")
    content = json.loads(path.read_text())
    with pytest.raises(MissingFileError, match="none.json"): Report.from_json(tmp_path / "none.json")
    path.write_text(path.read_text()[:300])
    with pytest.raises(DataError, match="r.json: not a json file"): Report.from_json(path)
    content["arrays"]["bins"]["zip"] = content["arrays"]["bins"]["zip"][:20]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="r.json: not a report"): Report.from_json(path)

def test_only_the_same_pairs_are_compared(data):
    a, b = (evaluate(Oracle(), data, seed=s, **SMALL) for s in (0, 1))
    with pytest.raises(ConfigError, match="not scored on the same pairs .*fingerprint"): a.compare(b)
    with pytest.raises(ConfigError, match="other pairs"): table({"a": a, "b": b})
    worse = evaluate(Oracle((.3,)), data, **SMALL)
    found = a.compare(worse)
    assert found.difference > 0 and found.low > 0 and found.p < .05
    with pytest.raises(ConfigError, match="official: False and True"): a.compare(evaluate(Oracle(), data, official=True, **SMALL))

def test_pooled_reports_are_the_mean_of_their_means(data):
    a, b, other = evaluate(Copy(), data, **SMALL), evaluate(Oracle((.3,)), data, **SMALL), evaluate(Copy(), data, seed=1, **SMALL)
    both = pooled([a, b])
    assert both.pairs == 2 * a.pairs and len(both.distances) == both.pairs
    for metric in (.05, .2, "mpck", "nme"): assert both.value(metric) == pytest.approx((a.value(metric) + b.value(metric)) / 2)
    assert np.allclose(pooled([a, a]).interval(), a.interval(), atol=1e-5)              # nothing is learned from a copy
    assert pooled([a, a]).compare(both).difference == pytest.approx((a.value() - b.value()) / 2)
    with pytest.raises(ConfigError, match="not scored on the same pairs .*fingerprint"): pooled([a, other])

def test_intervals_draw_supports_again_where_there_are_several(data):
    report = evaluate(Copy(), data, **SMALL)
    both, queries = report.interval(), report.interval(supports=False)
    assert both == report.interval(supports=True) != queries
    assert both == metrics.bootstrap(report.scores(), report.query, category=report.category, supports=report.support)
    assert "query images and supports drawn" in report.summary()
    cells = {name: rest for name, *rest in report._cells()}
    assert cells["PCK@0.2"] == list(both)
    other = evaluate(Oracle((.1,)), data, **SMALL)
    assert report.compare(other) == report.compare(other, supports=True) != report.compare(other, supports=False)
    alone = evaluate(Copy(), data, **{**SMALL, "episodes": 1})           # one support a category: nothing to draw
    assert alone.interval() == alone.interval(supports=False) and np.isfinite(alone.interval().low)
    assert "query images drawn" in alone.summary()

def test_intervals_are_fast_at_the_size_of_a_whole_split():
    import time
    rng, n = np.random.default_rng(0), 60_000
    category = np.repeat(np.arange(20), n // 20)
    query, support = category * 100 + rng.integers(0, 100, n), category * 100 + np.repeat(rng.integers(0, 100, n // 15), 15)
    report = Report(dict(official=False), (.2,), {c: str(c) for c in range(20)}, {}, rng.random((n, 1)), np.ones((n, 1), bool),
                    np.zeros((n, 1), bool), np.zeros(n), category, query, support, np.arange(n) // 15)
    begin = time.process_time()
    report.interval(.2)
    assert time.process_time() - begin < 1.5                            # 0.2 s; 10 s with a loop over resamples of all pairs

def test_tables_and_texts(data):
    a = evaluate(Oracle((.07,)), data, **SMALL)
    text = a.summary()
    for word in ("PCK@0.05", "mPCK@0.05,0.1,0.15,0.2", a.fingerprint, f"{a.pairs} pairs", "query images"): assert word in text
    rows = table({"oracle": a, "copy": evaluate(Copy(), data, **SMALL)})
    assert "oracle" in str(rows) and rows.markdown().startswith("|  | PCK@0.05") and "<td>" in rows._repr_html_()
    assert "<table>" in a._repr_html_() and "PCK@0.2" in repr(a)
    assert a.figure().axes and a.figure("categories", {"copy": a}).axes

def test_errors_name_what_is_wrong(data):
    class Blank(Oracle):
        name = "blank"
        def forward(self, batch): return replace(super().forward(batch), keypoints=batch.query_keypoints * float("nan"))
    with pytest.raises(DataError, match="blank predicts a point that is not a finite number: category 'dots0', support"):
        evaluate(Blank(), data, **SMALL)
    with pytest.raises(ConfigError, match="mask must be one of all, any, got 'most'"): evaluate(Copy(), data, mask="most", **SMALL)
    with pytest.raises(ConfigError, match="protocol must be one of cape, official"): evaluate(Copy(), data, protocol="mine", **SMALL)
    with pytest.raises(DataError, match="official protocol needs 1 . 15"): evaluate(Copy(), data, protocol="official", size=32)

def test_missing_image_is_named(tmp_path):
    data = dots_data(tmp_path, categories=1)
    (data.root / "3.png").unlink()
    with pytest.raises(CapeError, match="3.png"): evaluate(fresh(), data, **SMALL)
    assert evaluate(Copy(), data, **SMALL).pairs == 12                  # who does not look needs no image
