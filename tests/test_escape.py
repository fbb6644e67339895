"""ESCAPE against what the official code computed; the contract for every switch; the recipe, killed and changed; matches."""
import hashlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_cells

from cape.data.crops import CropLoader
from cape.errors import CheckpointError, ConfigError, DataError, TrainingError
from cape.escape_recipe import base_features, cluster_means, fit_escape, stage_key
from cape.evaluation import evaluate
from cape.layers.superkeypoints import density_peaks, greedy_peaks
from cape.learner import Learner, train_config
from cape.matches import FromFeatures, encode_data, match_score, oracle_matches, part_table
from cape.models.base import CapeModel, box_filter, check_contract, create_model, load_model, peaks, save_model, toy_batch
from cape.models.escape import Escape, from_official_escape, posterior
from cape.models.official import load_official

here = Path(__file__).parent / "golden"
net = "keypoint_head.matching_network."


def close(ours, theirs, eps=1e-4): np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=eps, rtol=0)


# ---- what the official code computed

@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("escape_fill", here / "escape_fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_shapes(supers=120):
    "The official name and the shape of every tensor, as our mapping has them."
    number = {name: i for i, name in enumerate("self_x ff_x self_y ff_y cross_x last_x cross_y last_y".split())}
    plain = {"extractor.backbone.": "backbone.", "extractor.head.": "deconv.deconv_layers.", "second.backbone.": net + "backbone.",
             "second.head.": net + "deconv.deconv_layers.", "network.omega": "keypoint_head.omega",
             "network.embed_keypoints.": net + "to_embedding1.", "network.embed_supers.": net + "to_embedding2.",
             "network.bin_score": net + "bin_score", "means": "keypoint_head.superkeypoints"}

    def official(own):
        part = re.match(r"network\.layers\.(\d+)\.(\w+)\.(.+)", own)
        if not part: return next(old + own[len(new):] for new, old in plain.items() if own.startswith(new))
        inside = "net." if part[3][0].isdigit() else ""
        return f"{net}GAT.layers.{part[1]}.{number[part[2]]}.{inside}{part[3]}"
    return {official(n): tuple(t.shape) for n, t in Escape(supers=supers, official=True).state_dict().items()}


@pytest.fixture(scope="module")
def golden():
    "All vectors by case and name, of the three files they lie in."
    files = [np.load(here / f"escape_{n}.npz") for n in ("baseline", "match", "model")]
    return {k: f[k] for f in files for k in f.files}


@pytest.fixture(scope="module")
def state(fill): return {n: torch.from_numpy(np.array(fill.fill_tensor(n, s))) for n, s in official_shapes().items()}


@pytest.fixture(scope="module")
def model(state): return load_official("escape", state)


def test_names_and_shapes_are_those_of_the_released_files(state):
    lines = "\n".join(sorted(f"{n} {tuple(t.shape)}" for n, t in state.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == str(np.load(here / "escape_model.npz")["names_sha256"])


@pytest.fixture(scope="module", params=["e1", "e5"])
def case(request, model, fill, golden):
    "Features and points of one golden case, beside its vectors; and which keypoints are seen at all."
    g = {k[3:]: v for k, v in golden.items() if k.startswith(request.param)}
    images = lambda tags: torch.from_numpy(np.stack([fill.image(f"{request.param}/{t}") for t in tags]))
    with torch.no_grad():
        support = model.encode_all(images([f"s{i}" for i in range(len(g["points_px"]))])[None], "support")
        query = model.encode_all(images(["q0", "q1"])[None], "query")
    given = support, torch.from_numpy(g["points_px"])[None] / 256, torch.from_numpy(g["visible"])[None] > 0
    return dict(g=g, given=given, query=query, seen=(g["visible"] > 0).any(0), shots=len(g["points_px"]))


def test_prototypes_of_all_three(case, model):
    g, seen = case["g"], case["seen"]
    with torch.no_grad():
        for method, name in (("mle", "mle_prototypes"), ("map", "map_ref_prototypes"), ("escape", "escape_prototypes")):
            prompt = model.by(method).adapt(*case["given"])
            close(prompt["prototypes"][0, seen], g[name][seen])
            assert prompt["seen"][0].tolist() == seen.tolist() and (prompt["prototypes"][0, ~seen] == 0).all()
    close(prompt["shares"][0], g["match_assignment"])


def test_features_and_map_assignment(case, model):
    g = case["g"]
    close(case["query"]["map"][0][:, :, 5::16, 3::16], g["feat_q_grid"])
    assert "second" not in case["query"]
    chosen = model.by("map").match(*case["given"])[0]
    theirs = torch.from_numpy(g["map_ref_assignment"])
    assert torch.equal(chosen.argmax(-1)[case["seen"]], theirs[case["seen"]]) and (theirs[~case["seen"]] == -1).all()


def test_scores_and_tokens_reach_the_network(case, model):
    scores, seen = model.scores(*case["given"])
    assert scores.shape[:3] == case["given"][2].shape == seen.shape
    mean = (scores * seen[..., None]).sum(1) / seen.sum(1).clamp(min=1)[..., None]
    close(mean[0].detach(), case["g"]["match_scores"], 3e-4)


def test_peaks_and_points(case, model):
    g, seen = case["g"], case["seen"]
    with torch.no_grad(): answer = model.locate(model.adapt(*case["given"]), case["query"])
    sure = (g["escape_peak_margin"] > 1e-3) & seen
    assert sure[:, seen].mean() > .5
    cell = peaks(box_filter(answer.similarity[0], 15))[1]
    assert ((cell[..., 1] * 64 + cell[..., 0]).numpy() == g["escape_peak_index"])[sure].all()
    side = np.array([1.9, 1.28])[:, None, None] * 200
    centre = np.array([[310.5, 201.25], [128., 128.]])[:, None]
    image = answer.keypoints[0].double().numpy() * side + centre - side / 2
    np.testing.assert_allclose(image[sure], g["escape_preds"][..., :2][sure], atol=1e-2)
    assert (answer.confidence[0, :, ~seen] == 0).all() and (answer.keypoints[0, :, ~seen] == .5).all()


def test_equation_10_is_not_the_code_for_five_shots(case, model):
    "The official vectors' notes: shares averaged after Sinkhorn differ by up to .118 at 5 shots; at one they are the same."
    with torch.no_grad(): ours = model.by("escape", average="shares").match(*case["given"])[0]
    gap = np.abs(ours.numpy() - case["g"]["match_assignment"]).max()
    assert gap < 1e-4 if case["shots"] == 1 else abs(gap - .118) < 2e-3


def test_the_published_network_needs_68_tokens(case, model):
    slots = model.network.slots
    model.network.slots = None
    try:
        with torch.no_grad(): ours = model.match(*case["given"])[0]
    finally: model.network.slots = slots
    assert slots == 68 and np.abs(ours.numpy() - case["g"]["match_assignment"]).max() > .1


def test_loss(state, fill, golden):
    "Image i has categories' keypoints with hidden {2} and {0,5,16}."
    points, seen = torch.zeros(2, 68, 2), torch.zeros(2, 68, dtype=torch.bool)
    for i, (count, hidden) in enumerate(((9, [2]), (17, [0, 5, 16]))):
        points[i, :count] = torch.from_numpy(golden[f"loss_points_px_{i}"]) / 256
        seen[i, :count] = True
        seen[i, hidden] = False
    labels = [int(z) for i in (0, 1) for z in golden[f"loss_superkeypoint_index_{i}"]]
    made = Escape(supers=120, official=True, base={5: 9, 3: 17}, labels=labels).eval()
    made.load_state_dict(load_official("escape", state).state_dict())
    images = torch.from_numpy(np.stack([fill.image(f"loss/{i}") for i in (0, 1)]))[:, None]
    for slots in (68, 17):
        batch = type("Images", (), dict(query_images=images, query_keypoints=points[:, None, :slots],
                                        query_visible=seen[:, None, :slots], category=torch.tensor([5, 3])))
        with torch.no_grad(): close(made.training_step(batch)["matching"], golden["loss_matching_loss"], 1e-4)


def test_published_files_that_do_not_fit(state):
    gone = {n: t for n, t in state.items() if n != "keypoint_head.superkeypoints"}
    with pytest.raises(CheckpointError, match="missing keypoint_head.superkeypoints"): from_official_escape(gone)
    with pytest.raises(CheckpointError, match="unexpected: spare"): from_official_escape(state | {"spare": torch.ones(1)})
    with pytest.raises(CheckpointError, match="wrong shape.*network.omega"):
        from_official_escape(state | {"keypoint_head.omega": torch.ones(7, 256)})


# ---- the model

def small(**options):
    torch.manual_seed(0)
    made = Escape(supers=12, **options).eval()
    made.means.normal_()
    return made


SWITCHES = [{}, dict(method="mle"), dict(method="map"), dict(method="map", alpha=None, ratio=3.), dict(average="shares"), dict(own=False),
            dict(extractor=dict(name="protonet", loss="mse", metric="dot")), dict(extractor=dict(name="prototype", loss="mse", normalise=False)),
            dict(network=dict(dim=32, layers=1, heads=2, width=8, hidden=16, codes="coordinates")),
            dict(official=False, extractor=dict(name="prototype", backbone="resnet18", dim=16, official=True))]


@pytest.mark.parametrize("options", SWITCHES, ids=str)
@pytest.mark.parametrize("shots", [1, 3])
def test_contract(options, shots): check_contract(small(**options), shots=shots)


@pytest.mark.parametrize("method", ["map", "escape"])
def test_distinct_super_keypoints_in_a_category_and_nothing_for_the_unseen(method):
    made = small(method=method)
    batch = toy_batch(3, 2, 2, 8, hidden=.4)
    seen = batch.support_visible.clone()
    seen[0] = False
    seen[1, :, 3] = False
    with torch.no_grad():
        support = made.encode_all(batch.support_images, "support")
        shares = made.match(support, batch.support_keypoints, seen)
        prompt = made.adapt(support, batch.support_keypoints, seen)
    assert shares.sum(1).max() <= 1 + 1e-4 and torch.isfinite(shares).all()
    close(shares.sum(-1), seen.any(1).float(), 1e-3)
    if method == "map": assert set(shares.unique().tolist()) == {0., 1.}
    assert (prompt["prototypes"][~seen.any(1)] == 0).all()
    spoiled = torch.where(seen[..., None], batch.support_keypoints, torch.nan)
    with torch.no_grad(): again = made.adapt(support, spoiled, seen)
    for name, value in prompt.items(): assert torch.equal(again[name], value), name


def test_more_keypoints_than_super_keypoints_is_told():
    batch, made = toy_batch(1, 1, 1, 13, hidden=0.), small(method="map")
    with pytest.raises(DataError, match="13 visible keypoints for 12 super-keypoints"): made(batch)


def test_posterior_is_the_maximum():
    g = torch.Generator().manual_seed(0)
    shots, prior, seen = 3, torch.randn(4, generator=g), torch.randn(4, generator=g)
    for ratio in (.2, 1., 5.):
        place = torch.zeros(4, requires_grad=True)
        cost = lambda z: shots * (z - seen).square().sum() / ratio + (z - prior).square().sum()
        step = torch.optim.LBFGS([place], max_iter=50)
        def closure():
            step.zero_grad()
            loss = cost(place)
            loss.backward()
            return loss
        step.step(closure)
        close(posterior(seen, prior, torch.tensor(shots), None, ratio), place.detach(), 1e-4)
    assert torch.equal(posterior(seen, prior, torch.tensor(1)), .5 * seen + .5 * prior)


def test_more_shots_outvote_the_prior_only_with_the_papers_alpha():
    batch, told = toy_batch(1, 4, 1, 5, hidden=0.), torch.tensor([[0, 1, 2, 3, 4]])
    for alpha, grows in ((None, True), (.5, False)):
        made, way = small(method="map", alpha=alpha, ratio=2.), []
        with torch.no_grad():
            support = made.encode_all(batch.support_images)
            one = {k: v[:, :1].expand(-1, 4, -1, -1, -1) for k, v in support.items()}      # the same image again and again
            for n in (1, 4):
                given = {k: v[:, :n] for k, v in one.items()}, batch.support_keypoints[:, :1].expand(-1, n, -1, -1)
                seen = torch.ones(1, n, 5, dtype=torch.bool)
                own = F.normalize(made.by("mle").adapt(*given, seen)["prototypes"], dim=-1)
                way.append((made.adapt(*given, seen, assigned=told)["prototypes"] - own).norm(dim=-1).mean().item())
        assert (way[1] < .7 * way[0]) == grows
        if not grows: assert way[1] == pytest.approx(way[0], rel=1e-4)


def test_ways_share_weights_and_are_written_into_checkpoints(tmp_path):
    made = small()
    way = made.by("map", alpha=None)
    assert (made.method, made.alpha, way.method, way.alpha) == ("escape", .5, "map", None)
    assert way.network is made.network and way.roles_differ is False and made.roles_differ is True
    again, batch = load_model(save_model(way, tmp_path / "m.safetensors")), toy_batch()
    assert (again.method, again.alpha) == ("map", None)
    with torch.no_grad(): assert torch.equal(again(batch).keypoints, way(batch).keypoints)
    with torch.no_grad(): assert not torch.equal(made(batch).keypoints, way(batch).keypoints)


def test_shares_can_be_looked_at():
    made, batch = small(), toy_batch()
    with torch.no_grad():
        assert made(batch).attention == {}
        made.look = True
        shares = made(batch).attention["shares"]
    assert shares.shape == (2, 1, 5, 12)


def trained_once(made, size=6):
    batch = toy_batch(size, 0, 1, 5, categories=(0, 1))
    sum(made.train().training_step(batch).values()).backward()
    return batch


LEARNS = dict(base={0: 5, 1: 5}, labels=[0, 1, 2, 3, 4, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("options", [{}, dict(own=False), dict(extractor=dict(name="prototype", loss="mse"))], ids=str)
def test_every_parameter_that_is_not_frozen_is_trained(options):
    made = small(**options, **LEARNS)
    trained_once(made)
    free = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert not any(n.startswith("extractor") for n in free) and "network.omega" in free
    assert not [n for n, p in free.items() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("drift", [False, True])
def test_the_frozen_extractor_drifts_only_where_asked(drift):
    made = small(drift=drift, **LEARNS)
    before = {n: t.clone() for n, t in made.extractor.state_dict().items()}
    trained_once(made)
    moved = {n for n, t in made.extractor.state_dict().items() if not torch.equal(t, before[n])}
    assert made.extractor.training == drift
    assert moved == ({n for n in before if "running_" in n or "num_batches" in n} if drift else set())


@pytest.mark.parametrize("make,words", [
    (lambda: Escape(method="em"), "method must be one of .* got 'em'"), (lambda: Escape(average="votes"), "average must be one of"),
    (lambda: Escape(alpha=1.5), "alpha must be None or in \\[0,1\\], got 1.5"), (lambda: Escape(ratio=0), "ratio must be above 0, got 0"),
    (lambda: Escape(extractor=dict(name="copy")), "got 'copy'"), (lambda: Escape(extractor=dict(name="proto")), "no model is called 'proto'"),
    (lambda: Escape(base={1: 3}, labels=[0, 1]), "2 entries for 3 base keypoints"),
    (lambda: Escape(supers=2, base={1: 2}, labels=[0, 2]), "run from 0 to 2; there are 2"),
    (lambda: Escape(extractor=dict(dim=8)), "name"), (lambda: small().by("map", own=False), "not own"),
    (lambda: small().by("best"), "got 'best'")])
def test_bad_options(make, words):
    with pytest.raises(ConfigError, match=words): make()


def test_training_on_unknown_categories_is_told():
    with pytest.raises(DataError, match=r"categories \[0, 1\]; known: none, give base"): trained_once(small())


# ---- the recipe

@pytest.fixture(scope="module")
def base_data(posezoo_mini):
    from cape.data.annotations import PoseDataset
    data = PoseDataset.load("posezoo", size="mini", split=1, subset="train")
    return data.select(categories=list(data.categories)[:4])


TINY = train_config("tiny", size=32, batch=4, steps=3, warmup=1, val_every=0, pck_every=0, save_every=1, log_every=1)
NET = dict(own=False, network=dict(dim=16, layers=1, heads=2, width=8, hidden=16, slots=None), iterations=5)


class Counted(Learner):
    "Notes the folder of every training."
    runs = []
    def fit(self):
        self.runs.append(self.out.name.split("-")[0])
        return super().fit()


@pytest.fixture
def runs():
    Counted.runs.clear()
    return Counted.runs


def recipe(data, out, learner=Counted, config=TINY, **changes):
    return fit_escape(data, config, out, learner=learner, **{"threshold": .5, "start": "before", **NET, **changes})


def same(a, b): return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


@pytest.fixture(scope="module")
def whole(base_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("escape")
    return folder, recipe(base_data, folder, Learner)


def test_all_stages_are_made_and_read_back(whole, base_data, runs):
    folder, made = whole
    assert list(made.folders) == ["baseline", "clusters", "tied", "prior", "matching"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in made.folders.values())
    again = recipe(base_data, folder)
    assert runs == [] and same(made.model, again.model) and torch.equal(made.labels, again.labels)
    assert not made.model.training and len(made.labels) == sum(c.num_keypoints for c in base_data.categories.values())
    assert torch.equal(made.model.means, made.extractor.table.detach()) and made.model.ratio > 0
    assert same(made.model.extractor, made.extractor)


def test_labels_are_those_of_the_clustering(whole, base_data):
    _, made = whole
    first = load_model(made.folders["baseline"] / "last.safetensors")
    owner = np.repeat(list(first.base), list(first.base.values()))
    assert made.labels.tolist() == greedy_peaks(first.table.detach(), owner, .5).labels.tolist()
    owned = [z for c in base_data.categories for z in made.model.owners[c]]
    assert owned == made.labels.tolist()
    for c in base_data.categories: assert len(set(made.model.owners[c])) == len(made.model.owners[c])


@pytest.mark.parametrize("change,redone", [
    (dict(config=TINY.replace(max_minutes=9., save_every=2)), []), (dict(config=TINY.replace(lr=2e-3)), ["baseline", "tied", "matching"]),
    (dict(changes={"baseline": {"steps": 2}}), ["baseline", "tied", "matching"]), (dict(changes={"matching": {"lr": 2e-3}}), ["matching"]), (dict(changes={"tied": {"steps": 2}}), ["tied", "matching"]),
    (dict(threshold=.6), ["tied", "matching"]), (dict(cluster="density", threshold=None), ["tied", "matching"]),
    (dict(vectors="means"), ["tied", "matching"]), (dict(tied=False), ["matching"]), (dict(iterations=4), ["matching"]),
    (dict(extractor=dict(name="prototype", dim=32)), ["baseline", "tied", "matching"])], ids=str)
def test_a_change_redoes_what_depends_on_it(whole, base_data, runs, tmp_path, change, redone):
    import shutil
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    made = recipe(base_data, folder, **change)
    assert runs == redone
    recipe(base_data, folder)                             # and the old ones are still there
    assert runs == redone and len(made.folders) == (4 if change.get("tied") is False else 5)


def test_other_data_is_another_run(whole, base_data, runs):
    ids = list(base_data.categories)[:3]
    recipe(base_data.select(categories=ids), whole[0])
    assert runs == ["baseline", "tied", "matching"]


@pytest.mark.parametrize("stage,at", [("baseline", 2), ("tied", 0), ("matching", 1), ("matching", 2)])
def test_killed_at_any_moment_it_ends_in_the_same_weights(whole, base_data, tmp_path, stage, at):
    class Killed(Learner):
        def _record(self, *a):
            if self.out.name.startswith(stage) and self.step > at: raise KeyboardInterrupt
            super()._record(*a)
    with pytest.raises(KeyboardInterrupt): recipe(base_data, tmp_path, Killed)
    done = recipe(base_data, tmp_path)
    assert same(done.model, whole[1].model)


def test_time_limit_is_told_and_gone_on_from(whole, base_data, tmp_path):
    with pytest.raises(TrainingError, match="baseline-.* stopped by its time limit at step .* of 3; call again"):
        recipe(base_data, tmp_path, config=TINY.replace(max_minutes=1e-9))
    assert same(recipe(base_data, tmp_path).model, whole[1].model)


def test_torn_files_are_told(whole, base_data, tmp_path):
    import shutil
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    torn = next(folder.glob("clusters-*")) / "clusters.safetensors"
    torn.write_bytes(torn.read_bytes()[:30])
    with pytest.raises(CheckpointError, match="clusters.safetensors: torn .* delete it"): recipe(base_data, folder)
    torn.unlink()
    assert same(recipe(base_data, folder).model, whole[1].model)


def test_an_extractor_that_is_ready(base_data, tmp_path, runs):
    torch.manual_seed(0)
    ready = create_model("protonet")
    made = recipe(base_data, tmp_path, extractor=ready, vectors="means", tied=False, cluster="density", threshold=.3)
    assert runs == ["matching"] and same(made.model.extractor, ready) and made.extractor is ready
    recipe(base_data, tmp_path, extractor=ready, vectors="means", tied=False, cluster="density", threshold=.3)
    assert runs == ["matching"]
    ready.log_scale.data += 1                             # other weights: another run
    recipe(base_data, tmp_path, extractor=ready, vectors="means", tied=False, cluster="density", threshold=.3)
    assert runs == ["matching"] * 2
    for change in (dict(tied=True, vectors="means"), dict(tied=False, vectors="rows")):
        with pytest.raises(ConfigError, match="protonet has no table of these base keypoints"):
            recipe(base_data, tmp_path, extractor=ready, **change)


def test_a_second_extractor_begins_as_asked(base_data, tmp_path):
    few = dict(vectors="means", tied=False, own=True, changes={"matching": {"steps": 1, "lr": 1e-12}})
    for start, alike in (("before", True), ("anew", False)):
        made = recipe(base_data, tmp_path, start=start, **few)
        name = "backbone.stem.0.weight"
        gap = (made.model.second.state_dict()[name] - made.model.extractor.state_dict()[name]).abs().max()
        assert (gap < 1e-6) == alike


def test_tied_training_begins_with_the_super_keypoints(base_data, tmp_path):
    made = recipe(base_data, tmp_path, changes={"tied": {"steps": 1, "lr": 1e-12}})
    from safetensors.torch import load_file
    groups = load_file(made.folders["clusters"] / "clusters.safetensors")
    close(made.extractor.table.detach(), groups["vectors"], 1e-6)
    assert made.extractor.shared.tolist() == groups["labels"].tolist()


@pytest.mark.parametrize("change,words", [
    (dict(cluster="kmeans"), "cluster must be one of"), (dict(vectors="both"), "vectors must be"), (dict(start="later"), "start must be"),
    (dict(changes={"stage4": {}}), "changes may be baseline, tied, matching; got stage4"), (dict(alpha=.3), "got alpha.*chosen afterwards"),
    (dict(changes={"tied": {"step": 1}}), "no field 'step'"), (dict(extractor=dict(name="prototyp")), "did you mean")])
def test_recipe_with_wrong_words(whole, base_data, change, words):
    with pytest.raises(ConfigError, match=words): recipe(base_data, whole[0], Learner, **change)


def test_keys_do_not_depend_on_what_changes_no_weight():
    assert stage_key(config=TINY) == stage_key(config=TINY.replace(workers=0, log_every=7))
    assert stage_key(config=TINY) != stage_key(config=TINY.replace(seed=1))


def test_base_features_give_means_and_variances(base_data):
    torch.manual_seed(0)
    extractor, first, count = create_model("protonet", metric="cosine").eval(), {}, 0
    for c in base_data.categories.values(): first[c.id], count = count, count + c.num_keypoints
    for batch in (5, 64):
        parts = list(base_features(extractor, base_data, first, 32, batch))
        found = torch.cat([v[w > 0] for v, w, _ in parts])
        rows = torch.cat([r[w > 0] for _, w, r in parts])
        close(found[:, -1], found[:, :-1].square().sum(-1), 1e-5)
        close(found[:, -1], torch.ones(len(found)), 1e-5)                    # a cosine's vectors have length 1
        assert rows.min() >= 0 and rows.max() < count
        for i in (0, len(base_data) - 1):
            k = base_data.categories[base_data.instances[i].category_id]
            assert first[k.id] + k.num_keypoints <= count
    labels = torch.tensor([0, 0, 1])
    close(cluster_means(torch.tensor([[0.], [2], [9]]), labels, torch.tensor([0, 2])), [[1.], [9.]])


# ---- answers from features, and matches

@pytest.fixture(scope="module")
def novel(posezoo_mini):
    from cape.data.annotations import PoseDataset
    data = PoseDataset.load("posezoo", size="mini", split=1, subset="test")
    return data.select(categories=list(data.categories)[:3])


@pytest.mark.parametrize("method", ["mle", "map", "escape"])
def test_from_features_are_the_answers_of_the_model(novel, method):
    made = Escape(supers=40, method=method).eval()
    made.means.normal_()
    features = encode_data(made, novel, 32)
    score = lambda m: evaluate(m, novel, shots=2, episodes=3, queries=9, size=32, progress=False)
    ours, theirs = score(FromFeatures(made, features)), score(made)
    np.testing.assert_allclose(ours.points, theirs.points, atol=2e-3)
    np.testing.assert_allclose(ours.confidence, theirs.confidence, atol=1e-4)
    assert ours.fingerprint == theirs.fingerprint


def test_assigned_super_keypoints_reach_their_keypoints(novel):
    made = Escape(supers=40, method="map", alpha=0.).eval()
    made.means.normal_()
    asked, adapt = {}, made.adapt
    def spy(support, keypoints, visible, links=None, assigned=None):
        asked["points"], asked["assigned"] = keypoints, assigned
        return adapt(support, keypoints, visible, links, assigned)
    made.adapt = spy
    told = {c: torch.arange(k.num_keypoints) for c, k in novel.categories.items()}
    batch = toy_batch(1, 1, 1, 9, categories=(list(told)[0],))
    from dataclasses import replace
    batch = replace(batch, support_index=torch.tensor([[0]]), query_index=torch.tensor([[1]]), support_keypoints=torch.arange(18.).view(1, 1, 9, 2) / 20)
    with torch.no_grad(): FromFeatures(made, encode_data(made, novel, 32), told)(batch)
    order = asked["assigned"][0]
    assert order.tolist() != sorted(order.tolist())                          # shuffled,
    close(asked["points"][0, 0, :, 0] * 20 / 2, order.float(), 1e-4)         # and points with them


def test_parts_and_oracle():
    labels, parts = [0, 0, 0, 1, 1, 2, 3], ["eye", "eye", "ear", "ear", "ear", "paw", "paw"]
    count, right = part_table(labels, parts, ["paw", "paw", "ear", "fin"], 5)
    assert count.tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 2, 0, 0, 0], [0] * 5]
    assert right.tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0] * 5]
    chosen = oracle_matches(count, right).tolist()
    assert sorted(chosen[:2]) == [2, 3] and chosen[2:] == [1, -1]


class Told(CapeModel):
    "Stands in for an `Escape`: shares that a function gives."
    def __init__(self, rule): super().__init__(); self.rule = rule
    def match(self, support, keypoints, visible): return self.rule(keypoints[:, 0], visible[:, 0])


def test_match_score_counts_and_shuffles(novel):
    right = {c: torch.eye(60, dtype=torch.bool)[:k.num_keypoints] for c, k in novel.categories.items()}
    nothing = {"map": torch.zeros(len(novel), 1)}
    flat = lambda p, v: torch.full((*v.shape, 60), 1 / 60.)
    tie = match_score(Told(flat), nothing, novel, right, 32)
    assert tie.value < .35                                # ties, broken by order: of no use once slots are shuffled
    table = CropLoader(novel, 32)
    def knows(points, visible):
        "Finds each point in the annotation, and so its slot."
        crops = table.crops(np.arange(len(novel)), images=False)
        shares = torch.zeros(*visible.shape, 60)
        for m in range(len(points)):
            for k in visible[m].nonzero()[:, 0]:
                near = ((crops.keypoints - points[m, k]).abs().sum(-1) + 9 * (crops.visibility == 0)).flatten().argmin()
                shares[m, k, near % crops.keypoints.shape[1]] = 1
        return shares
    best = match_score(Told(knows), nothing, novel, right, 32)
    assert best.value > .97 and best.chance == pytest.approx(1 / 60) and len(best.each) == 3
    assert best.low <= best.value <= best.high
    with pytest.raises(DataError, match="no keypoint's part"):
        match_score(Told(flat), nothing, novel, {c: r & False for c, r in right.items()}, 32)


def test_published_and_density_are_the_clusterings_of_the_recipe():
    from cape.escape_recipe import _clusterings
    assert _clusterings == {"published": (greedy_peaks, .8), "density": (density_peaks, .3)}


def test_frozen_features_of_a_vision_transformer(base_data, novel, tmp_path, runs):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = create_model("protonet", backbone="vit_small_patch14_dinov2", stride=14, metric="cosine", options=dict(img_size=56))
    few = base_data.select(categories=list(base_data.categories)[:2])
    made = recipe(few, tmp_path, extractor=vit, vectors="means", tied=False, cluster="density", threshold=.3,
                  config=TINY.replace(size=56, steps=2))
    assert runs == ["matching"] and made.model.means.shape[1] == 384
    again = load_model(made.folders["matching"] / "last.safetensors")
    faces = novel.select(categories="klipspringer_face")                     # nine keypoints: fewer than super-keypoints
    report = evaluate(again, faces, shots=1, episodes=1, queries=2, size=56, progress=False)
    assert report.pairs == 2 and np.isfinite(report.points).all()


# ---- the experiment

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "experiments" / "escape.ipynb"


def experiment(folder, seeds):
    "What the notebook writes after two steps a stage; the folder keeps its stages."
    import json
    from run_notebook import run
    few = dict(steps=dict(baseline=2, tied=2, matching=2), seeds=seeds, clusters={"density": .3}, own=False, episodes=1, queries=2,
               alphas=[1.], shots=[1], out=str(folder / "runs"), result=str(folder / "r.json"), figure=str(folder / "f.svg"))
    run(NOTEBOOK, folder / "escape.ipynb", few, 300)
    return json.loads((folder / "r.json").read_text())


def check_experiment(first, seeds):
    labels = {"copy the support", "mean pose", "MLE, baseline", *(f"{w}, density" for w in ("MLE", "MAP", "ESCAPE", "ESCAPE by variances", "oracle"))}
    assert {r["method"] for r in first["rows"]} == labels and len(first["rows"]) == len(labels)
    for row in first["rows"]:
        assert 0 <= row["PCK@0.2"][1] <= row["PCK@0.2"][0] <= row["PCK@0.2"][2] <= 1 and row["pairs"] == 40
        assert np.mean(row["seeds"]) == pytest.approx(row["PCK@0.2"][0]) and len(row["seeds"]) == seeds
        if seeds > 1: assert (row["seeds"][0] == row["seeds"][1]) == (row["method"] in ("copy the support", "mean pose"))
    assert set(first["matching"]) == {"density, Hungarian", "density, network"}
    assert [set(found) for found in first["clusters"]["density"]] == [{"purity", "ari"}] * seeds
    assert set(first["stages"]) == {"baseline", "tied, density", "matching, density"}
    assert all([t["steps"] for t in each] == [2] * seeds for each in first["stages"].values())
    assert {"MAP, density", "ESCAPE, density", "oracle, density"} <= {t["above"] for t in first["tests"]}
    for t in first["tests"]: assert t["low"] <= t["difference"] <= t["high"] and np.mean(t["seeds"]) == pytest.approx(t["difference"])
    assert {"commit", "threads", "machine", "train", "test", "cpu_minutes"} <= set(first["provenance"])
    assert first["curves"]["density"]["MAP"][0] == pytest.approx(next(r for r in first["rows"] if r["method"] == "MLE, density")["PCK@0.2"][0])


def test_the_experiment_writes_all_rows(posezoo_mini, tmp_path):
    check_experiment(experiment(tmp_path, [0]), 1)
    assert (tmp_path / "f.svg").stat().st_size > 1000


@pytest.mark.slow
def test_the_experiment_pools_seeds_and_does_nothing_twice(posezoo_mini, tmp_path):
    first = experiment(tmp_path, [0, 1])
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    check_experiment(first, 2)
    second = experiment(tmp_path, [0, 1])
    assert {p: p.stat().st_mtime_ns for p in there} == there and second["rows"] == first["rows"] and second["matching"] == first["matching"]


@pytest.mark.parametrize("change,words", [(dict(steps=dict(baseline=2)), "steps must name baseline, tied, matching; got baseline"), (dict(seeds=[]), "seeds: give at least one")])
def test_the_experiment_with_wrong_parameters(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words): run_cells(NOTEBOOK, **change, out=str(tmp_path))
