"Fine-tune and MAML: the steps are the right ones, each episode's its own, and nothing but the prompt changes."
import copy

import pytest
import torch
from torch.func import functional_call, vmap

from cape.errors import ConfigError
from cape.learner import Learner, train_config
from cape.models.adaptation import MAML, FineTune, PointHead, adam, descend, sgd
from cape.models.base import _one_episode, check_contract, create_model, load_model, save_model, toy_batch
from cape.models.prototype import place_loss

BOTH = pytest.mark.parametrize("name", ["finetune", "maml"])


def fresh(name, seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, slots=8, **options).eval()


def prompt_of(model, batch):
    support = model.encode_all(batch.support_images, "support")
    return model.adapt(support, batch.support_keypoints, batch.support_visible, batch.links)


def support_loss(model, batch):
    "Loss on the support after `adapt`, one an episode."
    with torch.no_grad():
        prompt, support = prompt_of(model, batch), model.encode_all(batch.support_images, "support")
        scores = model.locate(prompt, support).similarity
        return model.episode_losses(scores, *model.targets(batch.support_keypoints, batch.support_visible,
                                                           scores.shape[-1]))


@BOTH
@pytest.mark.parametrize("options", [{}, {"loss": "mse", "decode": "soft"}, {"adapt": "all", "steps": 2},
                                     {"backbone": "resnet18", "steps": 2}])
def test_contract(name, options):
    check_contract(fresh(name, **options))


def test_outputs_stay_with_their_slots():
    "Keypoints in another order are other outputs: no law of permutation, and the class says so."
    from cape.models.base import _deviations
    assert not FineTune.equivariant and not MAML.equivariant
    model = fresh("finetune", steps=0)
    model.equivariant = True
    with torch.no_grad(): assert _deviations(model, toy_batch(2, 1, 1))["permutation"] > .01


@BOTH
@pytest.mark.parametrize("part", ["head", "all"])
def test_a_batch_is_its_episodes(name, part):
    model, batch = fresh(name, adapt=part, steps=5), toy_batch(3, 2, 1)
    with torch.no_grad():
        together = model(batch)
        for b in range(3):
            alone = model(_one_episode(batch, b))
            assert torch.allclose(alone.similarity[0], together.similarity[b], atol=1e-4)


@BOTH
@pytest.mark.parametrize("part", ["head", "all"])
def test_no_step_is_the_network_itself(name, part):
    model, batch = fresh(name, adapt=part, steps=0), toy_batch(2, 1, 2)
    with torch.no_grad():
        wanted = model.network(batch.query_images.flatten(0, 1))[:, :5]
        assert torch.allclose(model(batch).similarity.flatten(0, 1), wanted, atol=1e-5)
        model.steps = 3
        assert not torch.allclose(model(batch).similarity.flatten(0, 1), wanted, atol=1e-3)


def test_one_step_by_hand():
    "One cell is right, the softmax over 4 cells is uniform: gradient of a logit is chance minus target."
    features = torch.tensor([[1., 0, 0, 0], [0, 1., 0, 0]]).view(1, 1, 2, 2, 2)     # two channels of 2 x 2 cells
    head = PointHead(2, 2, 1, bias=False)
    with torch.no_grad():
        head.first.weight.copy_(torch.eye(2)), head.first.bias.zero_(), head.last.weight.zero_()
    start = {n: p.detach()[None].clone().requires_grad_() for n, p in head.named_parameters()}
    target = torch.zeros(1, 1, 1, 2, 2)
    target[..., 0, 0] = 1.
    loss = lambda w: vmap(place_loss)(vmap(lambda w, f: functional_call(head, w, (f,)))(w, features), target,
                                      torch.ones(1, 1, 1))
    moved = descend(loss, start, sgd(dict.fromkeys(start, 2.)), 1)
    assert torch.allclose(moved["last.weight"], torch.tensor([[[1.5, -.5]]]), atol=1e-6)  # -2 (1/4 - 1), -2 / 4
    assert torch.equal(moved["first.weight"], start["first.weight"])                      # behind a zero layer


def test_the_model_takes_that_step():
    "One SGD step of `adapt` equals the step of a copy of the network with torch's own optimiser."
    model, batch = fresh("finetune", steps=1, optimizer="sgd", lr=.7), toy_batch(1, 2, 1, 5)
    prompt, twin = prompt_of(model, batch), copy.deepcopy(model)
    loss = twin.map_loss(twin.network(batch.support_images[0])[:, :5], batch.support_keypoints[0],
                         batch.support_visible[0])["place"]
    loss.backward()
    torch.optim.SGD(twin.network.head.parameters(), lr=.7).step()
    for n, p in twin.network.head.named_parameters():
        assert torch.allclose(prompt[n][0], p[:5] if n.startswith("last") else p, atol=1e-6), n


def test_adam_is_torchs_adam():
    torch.manual_seed(0)
    start, goal = torch.randn(2, 3), torch.randn(2, 3)
    ours = descend(lambda w: (w["x"] - goal).square().sum(1), {"x": start.clone().requires_grad_()},
                   adam(.1, eps=1e-5), 20)["x"]
    theirs = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([theirs], lr=.1, eps=1e-5)
    for _ in range(20):
        optimiser.zero_grad()
        (theirs - goal).square().sum().backward()
        optimiser.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name,options", [("finetune", {}), ("finetune", {"optimizer": "sgd", "lr": .3}), ("maml", {}),
                                          ("finetune", {"loss": "mse"}), ("finetune", {"adapt": "all"}),
                                          ("maml", {"adapt": "all", "lr": .03})])
def test_the_loss_on_the_support_falls(name, options):
    model, batch, losses = fresh(name, **options), toy_batch(3, 2, 1), []
    for model.steps in (0, 2, 10): losses.append(support_loss(model, batch))
    assert (losses[1] < losses[0]).all() and (losses[2] < losses[1]).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradient_is_that_of_finite_differences(steps):
    "In float64, with respect to weights and step size; first order is another one."
    torch.manual_seed(steps)
    head, batch = PointHead(3, 4, 2).double(), 2
    support, query, target = (torch.randn(batch, 1, n, 5, 5).double() for n in (3, 3, 2))
    ask = lambda w, f: vmap(lambda w, f: functional_call(head, w, (f,)))(w, f)
    measure = lambda w, f: (ask(w, f) - target).square().mean((1, 2, 3, 4))

    def outer(first, rate, second_order=True):
        start = {n: p.detach().expand(batch, *p.shape).clone().requires_grad_() for n, p in head.named_parameters()}
        start["first.weight"] = first.expand(batch, *first.shape)
        update = sgd(dict.fromkeys(start, rate))
        return measure(descend(lambda w: measure(w, support), start, update, steps, second_order), query).sum()

    first = head.first.weight.detach().clone().requires_grad_()
    rate = torch.tensor(.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outer, (first, rate), eps=1e-6, atol=1e-7)
    exact, = torch.autograd.grad(outer(first, rate), first)
    rough, = torch.autograd.grad(outer(first, rate, False), first)
    assert (exact - rough).norm() > .01 * exact.norm()


def test_first_order_is_not_second_order_in_the_model():
    slopes = {}
    for first_order in (False, True):
        model = fresh("maml", first_order=first_order).train()
        sum(model.training_step(toy_batch(3, 1, 1)).values()).backward()
        slopes[first_order] = model.network.head.first.weight.grad.clone()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    away = (slopes[True] - slopes[False]).norm() / slopes[False].norm()
    assert .001 < away < 1.5


def test_fixed_step_size_is_not_trained():
    model = fresh("maml", learn_lr=False)
    sum(model.training_step(toy_batch(2, 1, 1)).values()).backward()
    assert not model.log_lr.requires_grad and model.log_lr.grad is None


@BOTH
def test_too_many_keypoints(name):
    model = fresh(name)
    with pytest.raises(ConfigError, match="9 keypoints.*8 outputs.*slots=9"): model(toy_batch(1, 1, 1, 9))
    with pytest.raises(ConfigError, match="slots=9"): model.training_step(toy_batch(1, 1, 1, 9))


@BOTH
@pytest.mark.parametrize("options", [{"adapt": "tail"}, {"steps": -1}, {"steps": 1.5}, {"slots": 0}, {"lr": 0},
                                     {"lr": "fast"}, {"hidden": 0}, {"loss": "l1"}, {"decode": "hard"}])
def test_bad_options(name, options):
    with pytest.raises(ConfigError, match=f"{name}: {next(iter(options))} must be"): create_model(name, **options)


def test_bad_optimiser():
    with pytest.raises(ConfigError, match="optimizer must be one of"): FineTune(optimizer="lion")
    with pytest.raises(ConfigError, match="no option optimizer"): create_model("maml", optimizer="adam")


@BOTH
def test_checkpoint_keeps_the_answers(name, tmp_path):
    model, batch = fresh(name, steps=2, lr=.01, hidden=16), toy_batch()
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    with torch.no_grad(): assert torch.equal(model(batch).keypoints, again(batch).keypoints)
    assert (again.steps, again.network.head.first.out_features) == (2, 16)


@BOTH
@pytest.mark.parametrize("part", ["head", "all"])
def test_works_without_gradients_and_leaks_nothing(name, part):
    model, batch = fresh(name, adapt=part, steps=2).train(), toy_batch(2, 1, 1)
    model.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    answers = []
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            prompt = prompt_of(model, batch)
            assert not any(t.requires_grad for t in prompt.values())
            answers.append(model(batch).keypoints.clone())
    assert torch.allclose(*answers, atol=1e-5)
    assert torch.allclose(model(batch).keypoints, answers[0], atol=1e-5)         # gradients on: the same answer
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_a_training_step_on_episodes_leaves_modes_alone():
    model = fresh("maml", adapt="all", steps=1).train()
    mean = model.network.backbone.stem[1].running_mean.clone()
    model.training_step(toy_batch(2, 1, 1))
    assert all(m.training for m in model.modules())
    assert not torch.equal(model.network.backbone.stem[1].running_mean, mean)     # statistics are collected


@BOTH
def test_episodes_use_stored_statistics_in_training_too(name):
    model, images = fresh(name, adapt="all"), toy_batch(2, 2, 1).support_images
    asked = lambda: model.maps(model.initial(2, 5), images)
    with torch.no_grad(): assert torch.equal(asked(), (model.train(), asked())[1])


@BOTH
def test_a_frozen_model_adapts_all_the_same(name):
    model, batch = fresh(name, steps=2), toy_batch(2, 1, 1)
    answer = model(batch).keypoints
    assert torch.allclose(model.requires_grad_(False)(batch).keypoints, answer, atol=1e-5)


@BOTH
def test_hidden_keypoints(name):
    model, batch = fresh(name, steps=2), toy_batch(2, 2, 1)
    batch.support_visible[:, :, 1] = False
    with torch.no_grad(): answer = model(batch)
    assert (answer.keypoints[:, :, 1] == .5).all() and (answer.confidence[:, :, 1] == 0).all()


@pytest.mark.parametrize("name,steps", [("finetune", 40), ("maml", 20)])
def test_learner_reduces_the_loss(name, steps, posezoo_mini, tmp_path):
    torch.manual_seed(0)
    config = train_config("tiny", size=32, steps=steps, lr=3e-3, val_every=0, pck_every=steps, log_every=5)
    Learner(create_model(name), posezoo_mini, None, config, tmp_path).fit()
    from cape.learner import read_log
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert losses[-1] < .97 * losses[0]
