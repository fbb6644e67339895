"Keypoint tables, their maps, the number beside a map, and the Python side of the explorer."
import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("anywidget")
import cape  # noqa: E402
from cape.errors import ConfigError, DataError, StorageError  # noqa: E402
from cape.view import embeddings as E  # noqa: E402
from cape.view.maps import EmbeddingExplorer  # noqa: E402


def toy(features, part, category, group="base", error=np.nan, slot=None, photo=None):
    "A table with the given columns; each photo is one grey"
    n = len(features)
    photo = np.arange(n) if photo is None else np.array(photo)
    crops = np.broadcast_to((np.arange(photo.max() + 1) * 5 % 256).astype(np.uint8)[:, None, None, None],
                            (photo.max() + 1, 16, 16, 3))
    return E.KeypointTable(np.asarray(features, np.float32), np.array(list(category)), np.zeros(n, int) if slot is None else np.array(slot),
                           np.array(list(part)), np.broadcast_to(np.array(group), n), photo, np.full((n, 2), .5),
                           np.broadcast_to(np.array(error, float), n), crops)


@pytest.fixture
def heaps():
    "48 keypoints of 8 categories and 3 parts, each part in a direction of its own"
    rng = np.random.default_rng(0)
    part = np.arange(48) % 3                                                 # one of them no page may trip over
    category = np.arange(48) // 6
    group = np.where(category < 6, "base", "novel")
    features = np.eye(5)[part] * 4 + rng.normal(size=(48, 5)) * .1
    return toy(features, np.array(["part_0", "part_1", "</script>"])[part], [f"kind {c}" for c in category], group, rng.random(48) * .3,
               slot=part, photo=np.arange(48) // 3)


@pytest.fixture(scope="module")
def pair():
    data = cape.PoseDataset.load("posezoo", size="mini", split=1, subset="test")
    ids = list(data.categories)
    return {"base": data.select(ids[:4]), "novel": data.select(ids[4:6])}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return cape.create_model("protonet").eval()


# the table

def test_vectors_are_those_of_the_model(pair, model):
    from cape.data.crops import CropLoader
    from cape.models.prototype import exact_heatmaps, pool_features
    table = E.keypoint_features(model, pair, photos=2, keypoints=4, size=64, progress=False)
    source = CropLoader(pair["novel"], 64)
    row = np.flatnonzero(table.group == "novel")[-1]
    kind = next(c for c in pair["novel"].categories.values() if c.name == table.category[row])
    assert kind.parts[table.slot[row]] == table.part[row]
    for i in pair["novel"].by_category[kind.id]:
        crop = source.crops([i])
        if not np.allclose(crop.keypoints[0, table.slot[row]], table.places[row]): continue
        maps, _ = exact_heatmaps(crop.keypoints, crop.visibility > 0, 16)
        with torch.no_grad(): alone = pool_features(model.encode(crop.images)["map"], maps)[0, table.slot[row]]
        np.testing.assert_allclose(table.features[row], alone, atol=1e-5)
        assert pair["novel"][i].visibility[table.slot[row]] == 2
        return
    raise AssertionError("no photo has this keypoint at this place")


def test_rows_depend_on_the_seed_and_not_on_the_model(pair, model):
    same = [E.keypoint_features(m, pair, size=64, seed=s, progress=False)
            for m, s in ((model, 0), (cape.create_model("protonet"), 0), (model, 1))]
    assert all((getattr(same[0], k) == getattr(same[1], k)).all() for k in ("places", "slot", "category", "photo", "group"))
    assert not np.array_equal(same[0].features, same[1].features)
    assert len(same[0]) != len(same[2]) or not np.allclose(same[0].places, same[2].places)


def test_the_error_is_that_of_an_evaluation(pair, model):
    "Against the library's own metric, for every pair of photos that the table uses"
    from cape.data.crops import CropLoader
    from cape.data.episodes import Episode, episode_rng, make_batch
    one = {"base": pair["base"].select(list(pair["base"].categories)[:1])}
    data, kind = one["base"], next(iter(one["base"].categories.values()))
    table = E.keypoint_features(model, one, photos=3, keypoints=99, size=64, progress=False)
    rows = episode_rng(0, kind.id).permutation(data.by_category[kind.id])[:3]
    for n, row in enumerate(rows):
        batch = make_batch(CropLoader(data, 64), [Episode(kind.id, (int(rows[n - 1]),), (int(row),))])
        with torch.no_grad(): found = model(batch).keypoints[0, 0].numpy()
        from cape.data.crops import to_image
        pixels = to_image(found, batch.query_matrix[0, 0].numpy(), 64)
        away = np.hypot(*(pixels - data[row].keypoints).T) / data[row].box_side
        mine = table.photo == n
        expected = np.where(data[int(rows[n - 1])].visible[table.slot[mine]], away[table.slot[mine]], np.nan)
        np.testing.assert_allclose(table.error[mine], expected, atol=1e-4)
        assert np.isfinite(table.error[mine]).any()


def test_a_single_photo_has_no_error(pair, model):
    assert np.isnan(E.keypoint_features(model, pair, photos=1, size=64, progress=False).error).all()


def test_a_model_in_training_stays_so(pair, model):
    model.train()
    try: E.keypoint_features(model, pair, photos=1, size=64, progress=False); assert model.training
    finally: model.eval()


def test_wrong_questions_are_answered_clearly(pair, model):
    for options, said in ((dict(layer="deep"), "no map 'deep'; it has: map"), (dict(photos=0), "at least 1 photo")):
        with pytest.raises(ConfigError, match=said): E.keypoint_features(model, pair, size=64, **options)
    with pytest.raises(ConfigError, match="it has: none"):
        E.keypoint_features(cape.create_model("copy"), pair, size=64, progress=False)


# the number

def test_purity_of_heaps_and_of_noise(heaps):
    score = E.knn_purity(heaps)
    assert score.value == score.best == 1 and .3 < score.chance < .35
    noise = [E.knn_purity(E.replace(heaps, features=np.random.default_rng(i).normal(size=(48, 5)))) for i in range(40)]
    assert abs(np.mean([n.value - n.chance for n in noise])) < .01
    held = sum(n.low < n.chance < n.high for n in noise)
    assert held >= 24, f"{held} of 40 intervals hold chance"      # eight categories are few for a bootstrap


def test_neighbours_of_the_own_category_do_not_count():
    "Every keypoint's twin is in its own category; across categories parts are mixed up"
    table = toy([[1, 0], [1, .01], [0, 1], [.01, 1], [1, .1], [1, .11], [.1, 1], [.11, 1]], "aabbbbaa", "XXXXYYYY")
    assert E.knn_purity(table, k=1).value == 0
    assert E.knn_purity(table, k=1, apart="photo").value > 0


def test_what_cannot_be_matched_is_left_out():
    table = toy(np.eye(4) + .1, "aabc", "XYYX")
    score = E.knn_purity(table, k=1)
    assert np.isnan(score.each).tolist() == [False, False, True, True]
    with pytest.raises(DataError, match="no part occurs in more than one category"):
        E.knn_purity(toy(np.eye(4), "abcd", "XXYY"), k=1)


def test_the_interval_draws_those_who_ask_and_those_who_are_found(heaps):
    from cape.metrics import bootstrap
    table = E.replace(heaps, features=np.random.default_rng(3).normal(size=(48, 5)))
    pairs = [(table.part[i] == table.part[j], table.category[i], table.category[j])
             for i, near in enumerate(E.neighbours(table.features, table.category, 4)) for j in near]
    hit, asks, found = map(list, zip(*pairs))
    assert E.knn_purity(table, k=4)[:3] == pytest.approx(tuple(bootstrap(hit, asks, supports=found)))


def test_neighbours_agree_with_a_plain_loop():
    rng = np.random.default_rng(2)
    rows, label = rng.normal(size=(1100, 3)), rng.integers(5, size=1100)   # more than one portion
    near = E.neighbours(rows, label, 4, "euclidean")
    for i in (0, 700, 1099):
        away = np.where(label == label[i], np.inf, np.linalg.norm(rows - rows[i], axis=1))
        assert near[i].tolist() == np.argsort(away)[:4].tolist()
    assert E.neighbours(rows * rng.random((1100, 1)), label, 4).tolist() == E.neighbours(rows, label, 4).tolist()


@pytest.mark.parametrize("bad, said", [(np.full((9, 2), np.nan), "9 rows not finite"), (np.zeros(9), r"got \(9,\)")])
def test_bad_vectors_are_named(bad, said):
    for ask in (lambda: E.neighbours(bad, np.arange(9)), lambda: E.project(bad)):
        with pytest.raises(DataError, match=said): ask()


# the maps

def test_maps_keep_heaps_apart(heaps):
    for kind in ("pca", "tsne"):
        points = E.project(heaps.features, kind, perplexity=8, progress=False)
        assert points.shape == (48, 2) and E.knn_purity(heaps, points=points).value > .95, kind


def test_the_cache_is_by_content_and_survives_damage(heaps, tmp_path, monkeypatch):
    made = E.project(heaps.features, "tsne", tmp_path, perplexity=8, progress=False)
    file, = tmp_path.iterdir()
    monkeypatch.setattr(E, "_tsne", lambda *a: pytest.fail("computed again"))
    assert E.project(heaps.features, "tsne", tmp_path, perplexity=8).tobytes() == made.tobytes()
    for changed in (dict(perplexity=9), dict(perplexity=8, seed=1), dict(perplexity=8, steps=300)):
        with pytest.raises(pytest.fail.Exception): E.project(heaps.features, "tsne", tmp_path, **changed)
    with pytest.raises(pytest.fail.Exception): E.project(heaps.features * [1, 1, 1, 1, 2], "tsne", tmp_path, perplexity=8)
    def array(values): np.save(out := io.BytesIO(), values); return out.getvalue()
    wrong = [array(made[1:]), array(made * np.float32(np.nan)), array(made.astype(float))]
    for torn in (b"", file.read_bytes()[:60], file.read_bytes()[:-4], b"no array", *wrong):
        file.write_bytes(torn)
        monkeypatch.setattr(E, "_tsne", lambda *a: made)
        assert E.project(heaps.features, "tsne", tmp_path, perplexity=8).tobytes() == made.tobytes()
        assert np.load(file).tobytes() == made.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == [file.name]              # nothing left behind


def test_a_cache_that_cannot_be_is_said_before_the_work(heaps, tmp_path, monkeypatch):
    monkeypatch.setattr(E, "_tsne", lambda *a: pytest.fail("computed first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot keep maps there"): E.project(heaps.features, cache=tmp_path / "file/maps", perplexity=8)


def test_tsne_shows_its_progress(heaps, monkeypatch, capsys):
    monkeypatch.setenv("CAPE_PROGRESS", "lines")
    steps = []
    from cape.progress import Lines
    monkeypatch.setattr(Lines, "update", lambda self, n=1: (steps.append(n), print("a line of the bar")))
    E.project(heaps.features, perplexity=8, steps=300)
    said = capsys.readouterr().out
    assert len(steps) >= 3 and 200 <= sum(steps) <= 300, steps
    assert said.count("a line of the bar") == len(steps) and "[t-SNE]" not in said


# super-keypoints and pictures

def test_super_keypoints_join_what_is_alike(heaps):
    table = E.super_keypoints(heaps)
    assert len(set(table.cluster)) == 3
    for p in set(table.part): assert len(set(table.cluster[table.part == p])) == 1      # novel ones as well
    with pytest.raises(DataError, match="no row is of the group 'old'"): E.super_keypoints(heaps, group="old")


def test_colours_go_to_those_asked_for(heaps):
    groups = E.groups_of(heaps, "part")
    assert (E._colours(groups, E._chosen(groups, ["</script>"], 7))[groups.names.index("part_1")] == .8).all()
    with pytest.raises(ConfigError, match="no group 'part_9'"): E.draw_maps(heaps, {"m": heaps.places}, groups=["part_9"])
    bands = E.groups_of(E.replace(heaps, error=np.r_[.01, .07, .15, .5, np.nan, np.zeros(43)]), "error")
    assert bands.of[:5].tolist() == [0, 1, 2, 3, 4] and bands.names[4] == "not scored"
    for by in ("part", "category", "error", "group"):
        assert len(E.draw_maps(heaps, {"m": heaps.features[:, :2]}, by).axes) == 1


def test_groups_come_commonest_first():
    groups = E.groups_of(toy(np.eye(6), "acbbbc", "XYZXYZ"), "part")
    assert groups.names == ["b", "c", "a"] and groups.of.tolist() == [2, 1, 0, 0, 0, 1]


def test_patches_are_centred_on_their_keypoints():
    table = toy(np.eye(2), "ab", "XY")
    crops = np.zeros((2, 16, 16, 3), np.uint8)
    crops[0, 4, 12], crops[1, 15, 0] = 255, 200
    table = E.replace(table, crops=crops, places=np.array([[12, 4], [0, 15]]) / 16)
    patches = E.cut_patches(table, 5 / 16)
    assert patches.shape == (2, 5, 5, 3) and patches[0, 2, 2, 0] == 255 and patches[1, 2, 2, 0] == 200
    assert (patches > 0).sum() == 6


# the explorer

@pytest.fixture
def explorer(heaps):
    return EmbeddingExplorer(E.super_keypoints(heaps), {"one": heaps.features[:, :2], "two": heaps.features[:, 2:4]})


def test_the_page_gets_what_the_table_holds(explorer, heaps):
    assert list(explorer.titles) == ["part", "category", "cluster", "error", "group"]
    for by in ("part", "category", "group"):
        groups = explorer.groups[by]
        assert [groups["names"][g] for g in groups["of"]] == getattr(heaps, by).tolist()
    assert [g == "novel" for g in heaps.group] == [k == 1 for k in explorer.kind]
    sheet = Image.open(io.BytesIO(base64.b64decode(explorer.jpeg)))
    columns, rows = explorer.sheet
    assert sheet.size == (columns * 16, rows * 16) and columns * rows >= 16
    for photo in (0, 7, 15):
        x, y = photo % columns * 16 + 8, photo // columns * 16 + 8
        assert abs(sheet.getpixel((x, y))[0] - photo * 5) < 6
    for i, near in enumerate(explorer.near): assert heaps.category[i] not in heaps.category[near]


def test_a_number_stands_beside_every_map(explorer, heaps):
    for title in explorer.maps:
        note = explorer.notes[title]["part"]
        here = E.knn_purity(heaps, points=explorer.given[title]).value
        assert str(E.knn_purity(heaps)) in note and f"{here:.3f} in this map" in note and (title == "one" or here < .99)
        assert "no number says anything" in explorer.notes[title]["cluster"]
        assert re.search(r"base 0\.\d+, novel 0\.\d+", explorer.notes[title]["error"])


def test_a_selection_comes_back(explorer, heaps):
    explorer.selected = [3, 5]
    assert explorer.selection.part.tolist() == heaps.part[[3, 5]].tolist()
    assert "2 selected" in repr(explorer)


def test_without_a_kernel_there_is_a_picture(explorer):
    data, _ = explorer._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"}
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).width > 500


def test_a_page_holds_everything(explorer, tmp_path):
    text = explorer.save(tmp_path / "page.html", "</title><script>alert(1)</script>").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert not re.search(r"""(src|href)=["']|https?://(?!www\.w3\.org)""", text)           # asks no server
    assert text.count("</script>") == 1
    values = json.loads(re.search(r"const values = (.*), heard", text)[1])
    assert values["groups"] == json.loads(json.dumps(explorer.groups)) and values["jpeg"] == explorer.jpeg
    with pytest.raises(StorageError, match="cannot be written"):
        (tmp_path / "file").write_text(""); explorer.save(tmp_path / "file/page.html")


@pytest.mark.parametrize("maps, by, said", [({}, "part", "no maps"), ({"m": np.zeros((3, 2))}, "part", "map 'm' has shape"),
                                            (None, "colour", "by must be one of")])
def test_an_explorer_says_what_is_wrong(heaps, maps, by, said):
    with pytest.raises((DataError, ConfigError), match=said):
        EmbeddingExplorer(heaps, {"m": heaps.places} if maps is None else maps, by)
