"Crops, targets and augmentation against what the official codes computed (tests/golden), and laws of the warp."
import json, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from cape.errors import CapeError, ConfigError, DataError
from cape.data.annotations import PoseDataset
from cape.data import crops as C

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import inputs, synth_mp100  # noqa: E402


@pytest.fixture(scope="module")
def gold():
    with np.load(GOLDEN / "golden_data_pomnet.npz") as z: return {k: z[k] for k in z.files}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("synth")
    coco = synth_mp100.annotations()
    for info in coco["images"]:
        path = root / info["file_name"]
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(synth_mp100.image(info)).save(path)
    return PoseDataset.from_dict(coco, root, "synth")


def official(gold, case, role):
    "What the official pipeline was given and gave for one image of one item."
    pick = (lambda k: gold[f"{case}_query_{k}"]) if role == "q" else (lambda k: gold[f"{case}_sample_{k}"][int(role[1:])])
    return pick("center"), pick("scale"), float(pick("rotation"))


ROLES = [("test1_item5", r) for r in ("s0", "q")] + [("test5_item2", r) for r in ("s0", "s1", "s2", "s3", "s4", "q")] + \
        [("train1_item3_npseed5", r) for r in ("s0", "q")]

def instance_of(gold, case, role):
    "Which instance it was: the one with that centre."
    centre = official(gold, case, role)[0]
    return int(np.abs(gold["db_center"] - centre).sum(1).argmin())


def test_affine_equals_official():
    args = json.loads((GOLDEN / "affine.json").read_text())
    for (centre, scale, rotation), wanted in zip(args["arguments"], args["matrices"]):
        got = C.square_matrix(np.array(centre), 200 * scale[0], 256, rotation)
        assert np.abs(got - wanted).max() < 1e-12


def test_centres_and_scales_equal_official(gold):
    for i, box in enumerate(gold["db_bbox"]):
        want = C.square_matrix(gold["db_center"][i], np.float32(200) * gold["db_scale"][i, 0], 256)
        assert np.array_equal(C.crop_matrix(box, 256), want)


@pytest.mark.parametrize("case,role", ROLES)
def test_crop_equals_official(gold, data, case, role):
    centre, scale, rotation = official(gold, case, role)
    instance = instance_of(gold, case, role)
    matrix = C.square_matrix(centre, np.float32(200) * scale[0], 256, rotation)
    pixels = C._to_tensor(C._warp_fixed_point(data.image(instance), matrix, 256))
    image = C.normalise(pixels).numpy()
    step = 4 if role == "q" else 8
    wanted = gold[f"{case}_img_{role}_stride{step}"]
    difference = np.abs(image[:, ::step, ::step] - wanted)
    assert difference.max() < 0.02, (difference > .02).mean()
    assert np.abs(image.mean((1, 2)) - gold[f"{case}_img_{role}_mean"]).max() < 1e-3


@pytest.mark.parametrize("case,role", ROLES)
def test_targets_equal_official(gold, data, case, role):
    centre, scale, rotation = official(gold, case, role)
    instance = data[instance_of(gold, case, role)]
    matrix = C.square_matrix(centre, np.float32(200) * scale[0], 256, rotation)
    units = torch.tensor(C.to_crop(instance.keypoints.astype(np.float64), matrix, 256), dtype=torch.float32)
    maps, weight = C.make_heatmaps(units, torch.tensor(instance.visible))
    n = len(units)
    assert np.array_equal(weight.numpy(), gold[f"{case}_weight_{role}"][:n])
    assert np.abs(maps.sum((1, 2)).numpy() - gold[f"{case}_target_{role}_sum"][:n]).max() < 1e-4
    if role == "q": assert np.array_equal(maps[0].numpy(), gold[f"{case}_target_q_kpt0"])
    else:
        peak = np.stack([maps.flatten(1).argmax(1) % 64, maps.flatten(1).argmax(1) // 64], 1)
        assert np.array_equal(peak, gold[f"{case}_target_{role}_peak"][:n])


def test_joints_of_a_training_query_equal_official(gold, data):
    case = "train1_item3_npseed5"
    centre, scale, rotation = official(gold, case, "q")
    instance = data[instance_of(gold, case, "q")]
    matrix = C.square_matrix(centre, np.float32(200) * scale[0], 256, rotation)
    got = C.apply_matrix(matrix, instance.keypoints.astype(np.float64))[instance.visible]
    assert np.abs(got - gold[f"{case}_query_joints"][:len(instance.keypoints)][instance.visible]).max() < 1e-3


def test_official_draws(gold):
    rng = np.random.RandomState(11)
    draws = [C.Augment.official().draw(rng) for _ in range(64)]
    assert np.array_equal(np.float32([d[0] for d in draws]), gold["augment_scale_npseed11"])
    assert np.array_equal(np.array([d[1] for d in draws]), gold["augment_rotation_npseed11"])


def test_training_item_from_the_global_seed(gold, data):
    "The whole of one official training item: draws, matrix, pixels."
    case, rng = "train1_item3_npseed5", np.random.RandomState(5)
    for role in ("s0", "q"):
        scale, rotation = C.Augment().draw(rng)
        centre, wanted, turned = official(gold, case, role)
        i = instance_of(gold, case, role)
        assert rotation == turned
        assert np.array_equal(C.crop_matrix(data[i].clean_box, 256, scale=scale, rotation=rotation),
                              C.square_matrix(centre, np.float32(200) * wanted[0], 256, turned))


def test_heatmaps_equal_official_bit_for_bit():
    rng = np.random.default_rng(3)
    xy = rng.uniform(-60, 320, (2, 3, 40, 2)).astype(np.float32)
    xy[0, 0, :6] = [[-2.1, 5], [-25.9, 30], [-26.1, 30], [-30, 100], [277.9, 12], [278.1, 12]]
    seen = rng.random((2, 3, 40)) < .8
    maps, weight = C.make_heatmaps(torch.tensor(xy) / 256, torch.tensor(seen))
    for b in range(2):
        for s in range(3):
            target, w = inputs.msra_heatmaps(xy[b, s], seen[b, s], K=40)
            assert np.array_equal(maps[b, s].numpy(), target) and np.array_equal(weight[b, s].numpy(), w[:, 0])


def test_hidden_points_do_not_matter_to_heatmaps():
    keypoints, visible = torch.rand(5, 2), torch.tensor([1, 1, 0, 1, 0]).bool()
    spoilt = torch.where(visible[:, None], keypoints, torch.nan)
    for a, b in zip(C.make_heatmaps(keypoints, visible), C.make_heatmaps(spoilt, visible)): assert torch.equal(a, b)


def test_matrix_functions_agree_for_arrays_and_tensors():
    matrix = C.crop_matrix(np.array([[3, 4, 50, 60], [0, 1, 7, 5]]), 64, scale=[1, .9], rotation=[10, -20])
    points = np.random.default_rng(0).uniform(0, 60, (2, 5, 2))
    assert np.allclose(C.to_image(C.to_crop(points, matrix, 64), matrix, 64), points, atol=1e-9)
    t = torch.tensor(matrix)
    assert np.allclose(C.to_crop(torch.tensor(points), t, 64), C.to_crop(points, matrix, 64), atol=1e-12)
    assert np.allclose(C.chain_matrices(t, C.invert_matrix(t))[:, :, :2], np.eye(2), atol=1e-12)
    assert np.array_equal(C.crop_matrix(np.array([3, 4, 50, 60]), 64, rotation=10), matrix[0])


def test_shifting_the_image_shifts_nothing_in_the_crop():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
    moved = np.zeros((140, 180, 3), np.uint8)
    moved[30:120, 40:160] = image
    for antialias in (True, False):
        for size in (32, 128):
            a = C.crop_image(image, (10, 5, 70, 60), size, rotation=20, antialias=antialias).image.int()
            b = C.crop_image(moved, (50, 35, 70, 60), size, rotation=20, antialias=antialias).image.int()
            assert (a - b).abs().max() <= (0 if antialias is False and size == 32 else 2)


@pytest.mark.parametrize("width", [60, 900])
def test_a_spot_lands_where_the_matrix_says(width):
    "Both roads to a patch: copied pixels (60) and reduced ones (900)."
    centre = np.array([.55, .45]) * width
    y, x = np.mgrid[:width, :width]
    light = 250 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * (.05 * width) ** 2))
    image = np.repeat(light.round().astype(np.uint8)[..., None], 3, -1)
    crop = C.crop_image(image, (.1 * width, .1 * width, .8 * width, .7 * width), 128)
    v, u = np.mgrid[:128, :128]
    seen = crop.image[0].numpy().astype(float)
    found = np.array([(seen * u).sum(), (seen * v).sum()]) / seen.sum()
    assert np.abs(found - C.apply_matrix(crop.matrix, centre[None])[0]).max() < 0.03


@pytest.mark.parametrize("size", [40, 200])
def test_cache_equals_loader(data, size):
    "The same crops from patches as from the photos, for plain crops to a grey level."
    cache, loader = C.CropCache(data, size, progress=False), C.CropLoader(data, size, keep=True)
    a, b = cache.crops(range(len(data))), loader.crops(range(len(data)))
    assert torch.equal(a.keypoints, b.keypoints) and torch.equal(a.matrix, b.matrix)
    assert (a.images - b.images).abs().max() < 0.5 / 255 / .224 + 1e-4
    assert torch.equal(b.images, loader.crops(range(len(data))).images)


def test_augmented_crops_stay_inside_the_patch(data):
    "A white image has no black where the photo goes on: the patch is large enough for the widest draw."
    class White:
        instances, categories = [i for i in data.instances], data.categories
        def __len__(self): return len(self.instances)
        def image(self, i): return np.full((4000, 4000, 3), 255, np.uint8)
    white = White()
    from dataclasses import replace
    white.instances = [replace(i, box=(1500., 1500., s, s / 2), width=4000, height=4000, image_id=n)
                       for n, (i, s) in enumerate(zip(data.instances[:4], (20., 90., 300., 900.)))]
    augment = C.Augment(scale=.25, rotation=22.5)
    cache = C.CropCache(white, 96, augment, progress=False)
    for rotation in (-45, -20, 0, 45):
        images = C.denormalise(cache.crops(range(4), 1.25, rotation).images)
        assert images.min() == 255, rotation


def test_colour_changes_pixels_only(data):
    loader = C.CropLoader(data, 32)
    plain, changed = loader.crops([0, 1]), loader.crops([0, 1], colour=[[1, 1, 1], [.5, 1, 1]])
    assert (plain.images[0] - changed.images[0]).abs().max() < 1e-4
    assert (plain.images[1] - changed.images[1]).abs().max() > .1
    assert torch.equal(plain.keypoints, changed.keypoints)


def test_errors_name_the_thing(data, tmp_path):
    with pytest.raises(DataError, match="uint8"): C.crop_image(np.zeros((4, 4, 3)), (0, 0, 2, 2), 16)
    with pytest.raises(DataError, match="positive side"): C.crop_matrix((0, 0, np.nan, 2), 16)
    with pytest.raises(ConfigError, match="GB"): C.CropCache(data, 96, memory_limit=1e-4)
    with pytest.raises(ConfigError, match="scale must lie"): C.Augment(scale=2)
    with pytest.raises(DataError, match="0 to 34"): C.CropLoader(data, 32).crops([35])
    broken = PoseDataset.from_dict(synth_mp100.annotations(), tmp_path, "broken")
    with pytest.raises(CapeError, match="img_500.png"): C.CropCache(broken, 32, progress=False)
