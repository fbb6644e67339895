"""The prototype baseline against what the official code computed, and the laws of the contract for both methods."""
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from cape.data.crops import make_heatmaps
from cape.models.base import (box_filter, check_contract, create_model, decode_quarter, load_model, peaks, save_model,
                              toy_batch)
from cape.models.prototype import (PrototypeBaseline, exact_heatmaps, from_official_baseline, odd_kernel,
                                   official_prefixes, pool_features, similarity)

here = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def fill():
    spec = importlib.util.spec_from_file_location("escape_fill", here / "escape_fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden(): return np.load(here / "escape_baseline.npz")


def official_state():
    "The official name and the shape of every tensor, as our mapping has them."
    back = {new: old for old, new in official_prefixes.items()}
    own = PrototypeBaseline("resnet50", base={0: 1093}, official=True).state_dict()
    official = lambda n: next(old + n[len(new):] for new, old in back.items() if n.startswith(new))
    return {official(n): tuple(t.shape) for n, t in own.items()}


@pytest.fixture(scope="module")
def model(fill):
    state = {n: torch.from_numpy(np.array(fill.fill_tensor(n, s))) for n, s in official_state().items()}
    return from_official_baseline(state, base={1: 100, 2: 9, 3: 291, 4: 17, 5: 676})


def test_the_names_and_shapes_are_those_of_the_released_files(golden):
    lines = "\n".join(sorted(f"{n} {s}" for n, s in official_state().items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == str(golden["names_sha256"])


@pytest.fixture(scope="module", params=["e1", "e5"])
def case(request, model, fill, golden):
    "Features, prompt and prediction of one golden case, beside its vectors."
    g = {k[3:]: golden[k] for k in golden.files if k.startswith(request.param)}
    shots = len(g["points_px"])
    images = lambda tags: torch.from_numpy(np.stack([fill.image(f"{request.param}/{t}") for t in tags]))
    with torch.no_grad():
        support = {"map": model.encode(images([f"s{i}" for i in range(shots)]))["map"][None]}
        query_images = images(["q0", "q1"])
        query = {"map": model.encode(query_images)["map"][None]}
        points, visible = torch.from_numpy(g["points_px"])[None] / 256, torch.from_numpy(g["visible"])[None] > 0
        prompt = model.adapt(support, points, visible)
        answer, c5 = model.locate(prompt, query), model.backbone(query_images)[32]
        return dict(g=g, query=query, prompt=prompt, answer=answer, c5=c5)


def close(ours, theirs, eps=1e-4): np.testing.assert_allclose(np.asarray(ours), theirs, atol=eps, rtol=0)


def test_backbone_and_features(case):
    close(case["c5"][:, ::16, ::3, ::3], case["g"]["c5_q_grid"])
    close(case["query"]["map"][0][:, :, 5::16, 3::16], case["g"]["feat_q_grid"])


def test_prototypes(case): close(case["prompt"]["prototypes"][0], case["g"]["mle_prototypes"])


def test_heatmaps(case):
    scores = case["answer"].similarity[0]
    close(scores[:, :2, ::2, ::2], case["g"]["mle_heatmap"])
    close(box_filter(scores, 15)[:1, :2, ::2, ::2], case["g"]["mle_heatmap_smooth"])


def test_peaks_and_points(case):
    g, sure = case["g"], case["g"]["mle_peak_margin"] > 1e-3
    assert sure.mean() > .5
    cell = peaks(box_filter(case["answer"].similarity[0], 15))[1]
    assert ((cell[..., 1] * 64 + cell[..., 0]).numpy() == g["mle_peak_index"])[sure].all()
    side = np.array([1.9, 1.28])[:, None, None] * 200
    centre = np.array([[310.5, 201.25], [128., 128.]])[:, None]
    image = case["answer"].keypoints[0].double().numpy() * side + centre - side / 2
    never = ~(g["visible"] > 0).any(0)
    sure = sure & ~never
    np.testing.assert_allclose(image[sure], g["mle_preds"][..., :2][sure], atol=1e-2)
    assert (case["answer"].confidence[0, :, never] == 0).all()


def test_loss(model, fill, golden):
    "Image i uses prototype rows 100.. and 400..; hidden are {2} and {0,5,16}."
    images = torch.from_numpy(np.stack([fill.image(f"loss/{i}") for i in (0, 1)]))
    points, seen = torch.zeros(2, 68, 2), torch.zeros(2, 68, dtype=torch.bool)
    for i, (count, hidden) in enumerate(((9, [2]), (17, [0, 5, 16]))):
        points[i, :count] = torch.from_numpy(golden[f"loss_points_px_{i}"]) / 256
        seen[i, :count] = True
        seen[i, hidden] = False
    for slots in (68, 17):   # slots beyond the batch's largest category change nothing
        batch = type("Images", (), dict(query_images=images[:, None], query_keypoints=points[:, None, :slots],
                                        query_visible=seen[:, None, :slots], category=torch.tensor([2, 4])))
        with torch.no_grad(): close(model.training_step(batch)["heatmap"], golden["loss_mse_loss"], 1e-5)


@pytest.mark.parametrize("name,options", [
    ("protonet", {}), ("protonet", dict(metric="cosine", loss="mse")), ("prototype", {}),
    ("prototype", dict(loss="mse", normalise=False)), ("prototype", dict(train="episodes", decode="quarter")),
    ("prototype", dict(backbone="resnet18", dim=32, official=True))])
def test_contract(name, options):
    torch.manual_seed(0)
    check_contract(create_model(name, **options))


@pytest.mark.parametrize("options", [{}, {"train": "episodes"}, {"loss": "mse"}, {"official": True}])
def test_every_parameter_is_trained(options):
    torch.manual_seed(0)
    model = create_model("prototype", base={0: 5, 1: 5, 2: 5}, **options)
    sum(model.training_step(toy_batch(6, 1, 1, 5, 64)).values()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == (["table"] if options.get("train") == "episodes" else [])


def test_rows_of_a_padded_batch_are_the_same_rows():
    model = PrototypeBaseline(base={7: 3, 9: 2})
    assert torch.equal(model.rows(torch.tensor([9]), 2), model.rows(torch.tensor([9]), 6)[:, :2])
    assert torch.equal(model.rows(torch.tensor([9]), 2)[0], model.table[3:5])


def test_checkpoint_keeps_base_and_answers(tmp_path):
    model = create_model("prototype", base={3: 5, 8: 4}).eval()
    again = load_model(save_model(model, tmp_path / "m.safetensors", split=1))
    batch = toy_batch()
    with torch.no_grad(): assert torch.equal(model(batch).keypoints, again(batch).keypoints)
    assert again.base == {3: 5, 8: 4} and again.meta == {"split": 1}


def test_exact_and_rounded_maps_agree_at_cell_centres():
    points = torch.tensor([[[20., 31.], [40., 10.]]]) / 64
    ours, _ = exact_heatmaps(points, torch.ones(1, 2), 64)
    theirs, _ = make_heatmaps(points, torch.ones(1, 2), 64)
    assert torch.allclose(ours * (theirs > 0), theirs, atol=1e-6)


def test_shifting_the_query_by_cells_shifts_the_answer():
    torch.manual_seed(0)
    features = torch.randn(1, 1, 8, 16, 16)
    own = torch.randn(1, 3, 8)
    first = decode_quarter(similarity(own, features, "cosine"), None)
    moved = decode_quarter(similarity(own, features.roll((1, 2), (3, 4)), "cosine"), None)
    step = ((moved - first) * 16).round()
    assert torch.equal(step % 16, torch.tensor([2., 1.]).expand_as(step))


def test_pooling_ignores_empty_maps_and_kernels_are_odd():
    assert torch.equal(pool_features(torch.randn(2, 4, 8, 8), torch.zeros(2, 3, 8, 8)), torch.zeros(2, 3, 4))
    assert all(odd_kernel(s, w) % 2 == 1 for s in (0, 5, 15, 20) for w in (6, 8, 24, 64))
