"""A device that is not the processor, simulated: its tensors say they are elsewhere, compute here, and refuse to meet the processor's.

A machine without a GPU can so find what a GPU would stumble over: a tensor made in the wrong place. Run as a script it prints what each
of its checks found, as JSON. What it changes in torch stays changed, so it has a process of its own."""
import contextlib
import copy
import json
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["ACCELERATE_TORCH_DEVICE"] = "far:0"
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend



class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self): return [torch.bfloat16]


_setup_privateuseone_for_python_backend("far", Backend())
torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` keeps the parameters' identity, as on a GPU
FAR = torch.device("far", 0)
MOVES = {"aten::_to_copy", "aten::copy_"}                     # may read from one device and write to another
PICKS = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}  # take indices from the processor, as on a GPU


class Far(torch.Tensor):
    "A tensor on the device; its numbers are in `held`"
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, device=FAR)
    def __init__(self, held): self.held = held
    def __repr__(self): return f"Far({self.held})"
    def tolist(self): return self.held.tolist()
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return carried_out(func, args, kwargs or {})


class Simulated(TorchDispatchMode):
    "Inside, the device exists"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return carried_out(func, args, kwargs or {})


def carried_out(func, args, kwargs):
    "An operation on the held numbers, its result on the device where it belongs there; *Raises* `RuntimeError` where two devices meet"
    name, leaves = func._schema.name, tree_leaves((args, kwargs))
    there = any(isinstance(t, Far) for t in leaves)
    here = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, Far) and t.dim()]  # a GPU takes numbers from here
    if there and here and name not in MOVES and not (name in PICKS and isinstance(args[0], Far)):
        raise RuntimeError(f"two devices: {func} met {[tuple(t.shape) for t in here]} on the processor")
    wanted = kwargs.get("device")
    if wanted is not None: kwargs, there = {**kwargs, "device": torch.device("cpu")}, torch.device(wanted).type == "far"
    elif name == "aten::copy_": there = isinstance(args[0], Far)
    args_here, kwargs_here = tree_map(lambda t: t.held if isinstance(t, Far) else t, (args, kwargs))
    out = func(*args_here, **kwargs_here)
    if name.endswith("_") and isinstance(args[0], torch.Tensor): return args[0]
    return tree_map(lambda t: Far(t) if there and isinstance(t, torch.Tensor) else t, out)


def from_numbers(make):
    "`torch.tensor` does not ask the mode where its result shall be"
    def made(*args, device=None, **kwargs):
        out = make(*args, **kwargs)
        return out if device is None else out.to(device)
    return made


torch.tensor, torch.as_tensor = from_numbers(torch.tensor), from_numbers(torch.as_tensor)

import cape  # noqa: E402
import cape.learner  # noqa: E402
from cape.data.crops import CropCache  # noqa: E402
from cape.data.episodes import TestEpisodes  # noqa: E402
from cape.escape_recipe import fit_escape  # noqa: E402
from cape.learner import Learner, train_config  # noqa: E402
from cape.models.base import create_model, list_models, load_model, toy_batch  # noqa: E402
from cape.models.inference import quick  # noqa: E402
from cape.runs import fresh_model  # noqa: E402

OPTIONS = dict(prototype=dict(base={i: 7 for i in range(4)}), padded=dict(model="capeformer"),
               escape=dict(base={i: 7 for i in range(4)}, labels=[i % 12 for i in range(28)], supers=12))


def pool(threads, name): return ThreadPoolExecutor(threads, name, initializer=lambda: Simulated().__enter__())


def toy(name):
    torch.manual_seed(0)
    made = create_model(name, **OPTIONS.get(name, {}))
    return made.fit(zoo("test")) if name == "meanpose" else made


def method(name):
    "Answers, what `look` shows, loss terms and gradients, here and there"
    batch = TestEpisodes(zoo("test"), 1, 2, 1, size=64).batch(range(2)) if name == "meanpose" else toy_batch(2)
    found = []
    for where in ("cpu", "far"):
        with Simulated() if where == "far" else contextlib.nullcontext():
            torch.manual_seed(1)
            model, moved = toy(name).to(where).eval(), batch.to(where)
            model.look = True
            with torch.no_grad(): answer = model(moved)
            learns = any(p.requires_grad for p in model.parameters())
            torch.manual_seed(2)
            terms = model.train().training_step(moved) if learns else {}
            if learns: sum(terms.values()).backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            made = [answer.keypoints, answer.confidence, *terms.values(), *grads.values()]
            found.append(({str(t.device.type) for t in made}, [t.detach().cpu() for t in made], len(grads)))
    (_, here, _), (places, there, grads) = found
    assert places == {"far"}, places
    return dict(gradients=grads, gap=max((a - b).abs().max().item() for a, b in zip(here, there)))


def zoo(subset): return cape.PoseDataset.load("posezoo", size="mini", split=1, subset=subset)


SHORT = dict(steps=3, size=32, batch=4, precision="float32", log_every=1, pck_every=2, val_every=2, val_episodes=1, val_queries=1)


def training(folder):
    "A run with validation, and a score: the same weights and points as on the processor"
    weights, points, config = {}, {}, train_config("tiny", **SHORT)
    for where in ("cpu", "far"):
        cape.learner.ThreadPoolExecutor = pool if where == "far" else ThreadPoolExecutor
        with Simulated() if where == "far" else contextlib.nullcontext():
            if where == "cpu": os.environ.pop("ACCELERATE_TORCH_DEVICE")
            else: os.environ["ACCELERATE_TORCH_DEVICE"] = "far:0"; fresh_state()
            run = config.replace(device="cpu") if where == "cpu" else config
            said = Learner(fresh_model("prototype", run, zoo("train")), zoo("train"), zoo("val"), run, folder / where).fit()
            assert said["device"].startswith(where), said["device"]
            model = load_model(folder / where / "last.safetensors").to(where)
            weights[where] = {n: t.cpu() for n, t in model.state_dict().items()}
            report = cape.evaluate(model, zoo("test"), shots=2, episodes=2, queries=2, size=32)
            points[where] = torch.as_tensor(report.points).nan_to_num()
            assert report.settings["device"].startswith(where)
    return dict(weights=max((a.float() - weights["far"][n].float()).abs().max().item() for n, a in weights["cpu"].items()),
                points=(points["cpu"] - points["far"]).abs().max().item())


def fresh_state():
    "Accelerate keeps its device for the life of a process"
    from accelerate.state import AcceleratorState, PartialState
    AcceleratorState._reset_state(True); PartialState._reset_state()


def recipe(folder):
    "ESCAPE's stages: trained there, features of the base categories read there"
    cape.learner.ThreadPoolExecutor = pool
    where, read = [], cape.escape_recipe.base_features
    def watched(model, *args):
        where.append(next(model.parameters()).device.type)
        return read(model, *args)
    cape.escape_recipe.base_features = watched
    with Simulated():
        made = fit_escape(zoo("train"), train_config("tiny", **{**SHORT, "steps": 2, "val_every": 0}), folder, vectors="means", tied=False)
        answer = made.model.to("far")(TestEpisodes(zoo("test"), 1, 1, 1, size=32).batch(range(2)).to("far"))
        return dict(features=where, answer=answer.keypoints.device.type)


def using(folder):
    "Crops kept there, the quick copy, and the estimator with photos"
    data, found = zoo("test"), {}
    plain, cache = CropCache(data, 32), CropCache(data, 32)
    with Simulated():
        cache.patches = cache.patches.to("far")
        found["crops"] = (cache.crops([0, 1], device="far").images.cpu() - plain.crops([0, 1]).images).abs().max().item()
        model = load_model("posezoo/capeformer")
        copied = quick(copy.deepcopy(model).to("far"))
        batch = TestEpisodes(data, 1, 1, 1, size=96).batch(range(2))
        found["quick"] = (copied(batch.to("far")).keypoints.cpu() - quick(model)(batch).keypoints).abs().max().item()
        pose = lambda device: cape.PoseEstimator("posezoo/capeformer", device=device).fit(
            [data.path(0)], [data[0].keypoints], [data[0].visible]).predict([data.path(1), data.path(2)])
        found["estimator"] = max(abs(a.keypoints - b.keypoints).max() for a, b in zip(pose("far"), pose("cpu")))
    return found


class Careless(torch.nn.Module):
    "Makes a tensor without saying where"
    def forward(self, x): return x + torch.arange(len(x))


def control(folder):
    "What the simulation must find, and what it must let pass"
    with Simulated():
        try: Careless()(torch.ones(3, device="far")); said = ""
        except RuntimeError as e: said = str(e)
        fine = torch.ones(3, device="far") * torch.tensor(2.) + torch.ones(3, device="far")[torch.tensor([0, 1, 1])]
        return dict(said=said, fine=fine.tolist(), device=str(fine.device))


def main(folder):
    checks = dict(control=control, training=training, recipe=recipe, using=using) | {
        name: lambda _, name=name: method(name) for name in list_models()}
    for name, check in checks.items():
        try: result = check(folder / name)
        except Exception as e: result = dict(error=f"{type(e).__name__}: {str(e)[:400]}", where=traceback.format_exc()[-1500:])
        print("FOUND", json.dumps([name, result], default=float), flush=True)


if __name__ == "__main__": main(Path(sys.argv[1]))
