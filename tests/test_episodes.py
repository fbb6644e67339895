"Episodes: the published pairs, and the laws that make them reproducible."
import dataclasses, json, pickle, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from cape.errors import ConfigError, DataError
from cape.data.annotations import PoseDataset
from cape.data.crops import Augment, CropCache
from cape.data import episodes as E

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import synth_mp100  # noqa: E402


@pytest.fixture(scope="module")
def gold():
    with np.load(GOLDEN / "golden_data_pomnet.npz") as z: return {k: z[k] for k in z.files}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("synth")
    for info in synth_mp100.annotations()["images"]:
        path = root / info["file_name"]
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(synth_mp100.image(info)).save(path)
    return root


@pytest.fixture(scope="module")
def data(root): return PoseDataset.from_dict(synth_mp100.annotations(), root, "synth")


def same(a, b):
    "All fields of two batches, bit for bit."
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, tuple): assert len(x) == len(y) and all(torch.equal(i, j) for i, j in zip(x, y)), field.name
        elif isinstance(x, torch.Tensor): assert torch.equal(x, y), field.name
        else: assert x == y, field.name
    return True


def test_published_test_pairs(gold, data):
    assert {str(c): rows for c, rows in data.by_category.items()} == json.loads(str(gold["cat2obj"]))
    for shots in (1, 5):
        test = E.TestEpisodes(data, shots, queries=4, episodes=3, protocol="official", size=32)
        assert np.array_equal(test.rows, gold[f"test_pairs_{shots}shot"])


def test_published_training_pairs(gold, data):
    for shots, epochs in ((1, 2), (5, 1)):
        pairs = E.official_train_pairs(data.by_category, shots, epochs)
        for epoch in range(epochs): assert np.array_equal(pairs[epoch], gold[f"train_pairs_{shots}shot_epoch{epoch}"])


def test_official_draws_leave_global_generators_alone(data):
    import random
    random.seed(5); np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    E.TestEpisodes(data, protocol="official", queries=3, size=32), E.official_train_pairs(data.by_category, 1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("make", [
    lambda d, seed: E.TrainEpisodes(d, 2, 3, seed=seed, size=32), lambda d, seed: E.TrainImages(d, seed=seed, size=32),
    lambda d, seed: E.TestEpisodes(d, 2, 3, 4, seed=seed, size=32)])
def test_pure_in_seed_and_index(data, make):
    a, b, other = make(data, 3), make(data, 3), make(data, 4)
    b[5], b[0], b[11]                                   # history must not matter
    for i in (7, 0, 11): assert same(a[i], b[i])
    same(a[7], pickle.loads(pickle.dumps(b))[7])
    assert [a.episode(i) for i in range(12)] != [other.episode(i) for i in range(12)]


def test_every_episode_has_its_own_numbers():
    draws = {E.episode_rng(s, i, t).random() for s in range(3) for i in range(20) for t in range(3)}
    assert len(draws) == 180


def test_augmentation_does_not_shift_the_choice(data):
    a, b = (E.TrainEpisodes(data, 1, 2, size=32, augment=augment) for augment in (Augment(colour=.2), Augment.none()))
    assert [a.episode(i) for i in range(20)] == [b.episode(i) for i in range(20)]
    assert not torch.equal(a[0].query_keypoints, b[0].query_keypoints) and torch.equal(a[0].query_index, b[0].query_index)


def test_batch_equals_its_episodes_one_by_one(data):
    for sampler in (E.TrainEpisodes(data, 2, 3, size=32), E.TestEpisodes(data, 1, 3, 4, size=32)):
        assert same(sampler.batch(range(9)), E.EpisodeBatch.collate([sampler[i] for i in range(9)]))


def test_cached_batches_equal_one_by_one(data):
    cache = CropCache(data, 32, Augment.official(), progress=False)
    train = E.TrainEpisodes(data, 1, 2, size=32, cache=cache)
    a, b = train.batch(range(9)), E.EpisodeBatch.collate([train[i] for i in range(9)])
    assert torch.equal(a.query_keypoints, b.query_keypoints)
    assert torch.allclose(a.query_images, b.query_images, atol=1e-5)


def test_cache_and_files_give_the_same_geometry(data):
    cache = CropCache(data, 32, Augment.official(), progress=False)
    plain, cached = (E.TrainEpisodes(data, 1, 2, size=32, cache=c).batch(range(6)) for c in (None, cache))
    assert torch.equal(plain.query_keypoints, cached.query_keypoints)
    assert torch.equal(plain.query_matrix, cached.query_matrix)
    same(plain, E.TrainEpisodes(data, 1, 2, size=32, cache=cache).batch(range(6), cache=E.CropLoader(data, 32)))


def test_workers_change_nothing(data):
    train = E.TrainEpisodes(data, 1, 2, size=32)
    loader = torch.utils.data.DataLoader(train, 3, num_workers=2, collate_fn=E.EpisodeBatch.collate, sampler=range(12))
    for i, batch in enumerate(loader): assert same(batch, train.batch(range(3 * i, 3 * i + 3)))


def test_queries_are_never_their_own_support(data):
    for sampler in (E.TrainEpisodes(data, 3, 2, size=32), E.TestEpisodes(data, 5, 15, 30, size=32)):
        for i in range(90):
            episode = sampler.episode(i)
            chosen = [*episode.support, *episode.query]
            assert len(set(chosen)) == len(chosen)
            assert {data[j].category_id for j in chosen} == {episode.category}


def test_training_is_balanced(data):
    train = E.TrainEpisodes(data, 1, 1, size=32)
    assert len(train) == 3 * 15
    counts = np.bincount([train.episode(i).category for i in range(len(train))])
    assert counts[[42, 3, 7]].tolist() == [15] * 3
    images = E.TrainImages(data, size=32)
    for epoch in range(2):
        assert sorted(images.episode(epoch * 35 + i).query[0] for i in range(35)) == list(range(35))
    assert images.batch([0, 1]).support_images.shape == (2, 0, 3, 32, 32)


def test_contents_of_a_batch(data):
    test = E.TestEpisodes(data, 2, 3, 2, size=48)
    batch = test.batch([0, 2, 5])                       # 8, 19 and 5 keypoints
    assert (batch.shots, batch.queries, batch.num_keypoints, len(batch)) == (2, 3, 19, 3)
    assert batch.valid.sum(1).tolist() == [8, 19, 5] and batch.category.tolist() == [42, 3, 7]
    for b in range(3):
        for q in range(3):
            instance = data[int(batch.query_index[b, q])]
            n = len(instance.keypoints)
            assert batch.query_visible[b, q, :n].tolist() == instance.visible.tolist()
            assert batch.query_occluded[b, q, :n].tolist() == (instance.visibility == 1).tolist()
            assert not batch.query_visible[b, q, n:].any() and batch.query_box_side[b, q] == instance.box_side
            back = E_to_image(batch, b, q)[:n]
            assert np.abs(back - instance.keypoints)[instance.visible].max() < 1e-3
    geometry = test.batch([0, 2, 5], images=False)
    assert geometry.query_images is None and torch.equal(geometry.query_keypoints, batch.query_keypoints)


def E_to_image(batch, b, q):
    from cape.data.crops import to_image
    return to_image(batch.query_keypoints[b, q].double(), batch.query_matrix[b, q], batch.size).numpy()


def test_fewer_queries_are_padded(data):
    test = E.TestEpisodes(data, 1, 10, 1, size=32)      # 15, 9 and 11 instances: 10, 8 and 10 queries
    assert [test[i].queries for i in range(3)] == [10, 8, 10] and not test.skipped
    batch = test.batch(range(3))
    assert batch.is_query.sum(1).tolist() == [10, 8, 10]
    assert not batch.query_visible[1, 8:].any() and torch.equal(batch.query_images[1, :8], test[1].query_images[0])
    assert same(batch, E.EpisodeBatch.collate([test[i] for i in range(3)]))


def test_categories_with_too_few_instances(data, root):
    coco = synth_mp100.annotations(per_cat=(14, 9, 11))
    seen = [a for a in coco["annotations"] if a["category_id"] == 7]
    coco["annotations"] = [a for a in coco["annotations"] if a not in seen[1:]]
    single = PoseDataset.from_dict(coco, root, "single")
    test = E.TestEpisodes(single, 1, 5, 2, size=32)
    assert test.skipped == {7: 1} and set(test.categories) == {42, 3}
    assert E.TrainEpisodes(single, size=32).skipped == {7: 1}
    with pytest.raises(DataError, match="category 7 has 1"): E.TestEpisodes(single, 1, 5, 2, protocol="official", size=32)
    with pytest.raises(DataError, match="16 instances"): E.TestEpisodes(single, 15, size=32)


def test_test_episodes_do_not_depend_on_other_categories(data, root):
    coco = synth_mp100.annotations()
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != 42]
    coco["categories"] = coco["categories"][1:]
    part = PoseDataset.from_dict(coco, root, "part")
    ids = lambda d: {(e.category, *(d[i].id for i in (*e.support, *e.query))) for e in E.TestEpisodes(d, 1, 5, 4, size=32).episodes}
    assert ids(part) == {row for row in ids(data) if row[0] != 42}


def test_fingerprint_changes_with_data_order_and_choice(data, root):
    make = lambda d=data, **k: E.TestEpisodes(d, **{**dict(queries=5, episodes=4, size=32), **k}).fingerprint
    coco = synth_mp100.annotations()
    coco["annotations"][0]["keypoints"][0] += 1
    moved = PoseDataset.from_dict(coco, root, "synth")
    swapped = synth_mp100.annotations()
    swapped["images"][0], swapped["images"][1] = swapped["images"][1], swapped["images"][0]
    swapped = PoseDataset.from_dict(swapped, root, "synth")
    prints = [make(), make(seed=1), make(protocol="official"), make(shots=2), make(queries=4), make(moved), make(swapped)]
    assert make() == prints[0] and len(set(prints)) == len(prints)


def test_collate_padding_changes_nothing(data):
    test = E.TestEpisodes(data, 1, 3, 2, size=32)
    small, large = test[4], test[2]                     # 5 and 19 keypoints
    both = E.EpisodeBatch.collate([small, large])
    for name in ("support_keypoints", "query_keypoints"): assert torch.equal(getattr(both, name)[0, :, :5], getattr(small, name)[0])
    for name in ("support_visible", "query_visible", "query_occluded"):
        assert torch.equal(getattr(both, name)[0, :, :5], getattr(small, name)[0]) and not getattr(both, name)[0, :, 5:].any()
    assert both.valid[0].tolist() == [True] * 5 + [False] * 14
    assert torch.equal(both.links[0], small.links[0])


def test_to_moves_everything_and_frozen(data):
    batch = E.TestEpisodes(data, 1, 3, 1, size=32)[0].to("meta")
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor): assert tensor.device.type == "meta", field.name
    with pytest.raises(dataclasses.FrozenInstanceError): batch.size = 3


def test_who_brings_tensors():
    batch = E.EpisodeBatch(support_images=torch.zeros(2, 1, 3, 16, 16), support_keypoints=torch.rand(2, 1, 4, 2),
                           query_images=torch.zeros(2, 5, 3, 16, 16))
    assert (batch.queries, batch.size, batch.query_visible) == (5, 16, None)
    assert batch.valid.all() and batch.support_visible.all() and batch.is_query.all()
    with pytest.raises(DataError, match="query_visible.*\\(2, 5, 4\\)"):
        E.EpisodeBatch(support_keypoints=torch.rand(2, 1, 4, 2), query_images=torch.zeros(2, 5, 3, 16, 16), size=16,
                       query_visible=torch.ones(2, 5, 3, dtype=torch.bool))
    with pytest.raises(DataError, match="links"):
        E.EpisodeBatch(support_keypoints=torch.rand(2, 1, 4, 2), links=(torch.zeros(0, 2).long(),))


def test_errors(data):
    with pytest.raises(ConfigError, match="negative"): E.TrainEpisodes(data, seed=-1, size=32)
    with pytest.raises(ConfigError, match="protocol"): E.TestEpisodes(data, protocol="mine", size=32)
    with pytest.raises(ConfigError, match="32 px"): E.TrainEpisodes(data, size=64, cache=CropCache(data, 32, progress=False))
    with pytest.raises(IndexError): E.TestEpisodes(data, queries=3, episodes=1, size=32)[3]
    with pytest.raises(DataError, match="empty"): E.EpisodeBatch.collate([])
