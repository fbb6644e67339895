"The learner: what is written can be trusted, whatever happens to the run."
import json, os, resource, signal, socket, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from torch import nn

from cape.data.annotations import PoseDataset
from cape.data.episodes import EpisodeBatch
from cape.errors import CapeError, CheckpointError, ConfigError, DataError, StorageError, TrainingError
from cape.learner import (PRESETS, Learner, TrainConfig, compile_backbones, feed, load_state, lr_at, plot_log, read_log, seed_step,
                          train_config)
from cape.models.base import CapeModel, Prediction, create_model, fold, load_model, read_card, register_model, toy_batch

QUICK = train_config("tiny", size=32, batch=4, steps=12, warmup=3, log_every=1, pck_every=4, val_every=0, save_every=5)


@register_model("testnet")
class TestNet(CapeModel):
    "Two convolutions, GroupNorm, dropout; the loss weighs every episode alike."
    __test__ = False
    def __init__(self, width: int = 8, dropout: float = 0.2):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.GroupNorm(2, width), nn.ReLU(),
                                 nn.Dropout(dropout), nn.Conv2d(width, width, 3, 1, 1))
        self.unused = nn.Linear(2, 2)   # DDP must not stumble over it
    def encode(self, images, role="query"): return {"map": self.net(images)}
    def adapt(self, support, keypoints, visible, links=None):
        at = F.grid_sample(fold(support["map"]), fold(keypoints)[:, :, None] * 2 - 1, align_corners=False)[..., 0].mT
        seen = visible[..., None].float()
        return {"row": (at.view(*visible.shape, -1) * seen).sum(1) / seen.sum(1).clamp(min=1)}
    def locate(self, prompt, query):
        score = torch.einsum("bkc,bqchw->bqkhw", prompt["row"], query["map"])
        chance, (h, w) = score.flatten(-2).softmax(-1).view(score.shape), score.shape[-2:]
        x = (chance.sum(-2) * torch.arange(w, device=score.device)).sum(-1) / w
        y = (chance.sum(-1) * torch.arange(h, device=score.device)).sum(-1) / h
        return Prediction(torch.stack([x, y], -1), chance.flatten(-2).max(-1)[0])
    def loss(self, prediction, batch):
        off = (prediction.keypoints - batch.query_keypoints).abs().sum(-1)
        seen = batch.query_visible.float()
        return {"l1": ((off * seen).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)).mean()}


class Dots:
    "Episode i is a function of i alone."
    def __init__(self, size=32): self.size = size
    def __len__(self): return 40
    def batch(self, indices):
        return EpisodeBatch.collate([toy_batch(1, size=self.size, seed=int(i)) for i in indices])


class Breaks(TestNet):
    "Stops in some way at one step."
    how, at, seen = "raise", 7, 0
    def training_step(self, batch):
        Breaks.seen += 1
        if Breaks.seen == Breaks.at and self.how == "raise": raise RuntimeError("pulled the plug")
        if Breaks.seen == Breaks.at and self.how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        terms = super().training_step(batch)
        if Breaks.seen == Breaks.at and self.how == "nan": terms["l1"] = terms["l1"] * float("nan")
        return terms


def fresh(cls=TestNet, **options):
    torch.manual_seed(0)
    return cls(**options)

def dots_data(folder, categories=3, images=6, size=48, one_image=False):
    "A data set on disk: coloured dots, one photo an instance."
    from PIL import Image
    rng, photos, notes = np.random.default_rng(0), [], []
    (Path(folder) / "images").mkdir(parents=True, exist_ok=True)
    for c in range(categories):
        colours = np.random.default_rng(77 + c).integers(80, 255, (4, 3))
        for _ in range(1 if one_image and c == 0 else images):
            i = len(photos)
            picture, points = rng.integers(0, 40, (size, size, 3)), rng.uniform(6, size - 6, (4, 2)).round()
            for (x, y), colour in zip(points.astype(int), colours): picture[y - 2:y + 3, x - 2:x + 3] = colour
            Image.fromarray(picture.astype(np.uint8)).save(Path(folder) / "images" / f"{i}.png")
            photos.append(dict(id=i, file_name=f"{i}.png", width=size, height=size))
            v = np.where(rng.random(4) < .15, 0, np.where(rng.random(4) < .2, 1, 2))
            v[0] = 2
            flat = np.column_stack([points, v]).ravel().tolist()
            notes.append(dict(id=i, image_id=i, category_id=c + 1, bbox=[2, 2, size - 6, size - 8], iscrowd=0, keypoints=flat,
                              num_keypoints=int((v > 0).sum()), area=1.))
    coco = dict(images=photos, annotations=notes,
                categories=[dict(id=c + 1, name=f"dots{c}", skeleton=[[0, 1], [1, 2]]) for c in range(categories)])
    return PoseDataset.from_dict(coco, Path(folder) / "images", "dots")

def weights(out, name="last"): return load_file(Path(out) / f"{name}.safetensors")

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- settings

def test_unknown_and_wrong_fields_are_named():
    with pytest.raises(ConfigError, match="'stepz'.*steps"): PRESETS["cpu"].replace(stepz=1)
    with pytest.raises(ConfigError, match="lr must be a number >= 0, got 'fast'"): PRESETS["cpu"].replace(lr="fast")
    with pytest.raises(ConfigError, match="batch must be a whole number >= 1, got 0"): PRESETS["cpu"].replace(batch=0)
    with pytest.raises(ConfigError, match="lr must be"): PRESETS["cpu"].replace(lr=float("nan"))
    with pytest.raises(ConfigError, match="precision must be one of float32, bf16"): PRESETS["cpu"].replace(precision="fp16")
    with pytest.raises(ConfigError, match="weights must be None, 'imagenet' or a file, got True"): PRESETS["cpu"].replace(weights=True)
    with pytest.raises(ConfigError, match="no preset 'huge'"): train_config("huge")

def test_presets_survive_json():
    for name, config in PRESETS.items():
        assert config.preset == name
        assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config

def test_paper_schedule():
    config = train_config("paper", "pomnet")
    rate = lambda step: lr_at(step, 2100, config)
    assert rate(0) == pytest.approx(5e-7) and rate(250) == pytest.approx(5e-4 * (1 - .5 * .999))
    assert [rate(s) for s in (500, 1699, 1700, 1999, 2000)] == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5, 5e-6])
    assert lr_at(50, 100, config.replace(schedule="cosine", warmup=0)) == pytest.approx(2.5e-4)

def test_feed_keeps_the_order_in_every_way():
    square = lambda step: torch.tensor(step * step)
    assert [int(b) for b in feed(square, range(3, 9))] == [9, 16, 25, 36, 49, 64]
    assert [int(b) for b in feed(square, range(3, 9), None)] == [9, 16, 25, 36, 49, 64]
    assert [int(b) for b in feed(square, range(3, 9), workers=2)] == [9, 16, 25, 36, 49, 64]


# ---- runs

def test_a_run_writes_what_it_says(tmp_path):
    result = Learner(fresh(), Dots(), None, QUICK, tmp_path / "a").fit()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["last.safetensors", "log.jsonl", "result.json", "state.pt"]
    assert result == json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["stopped"] == "finished" and result["step"] == 12 and result["images"] == 12 * 4 * 2
    assert result["torch"] == torch.__version__ and result["images_per_second"] > 0 and 0 < result["utilisation"] <= 1 and result["config"]["seed"] == 0
    log = read_log(tmp_path / "a")
    assert [l["step"] for l in log] == list(range(1, 13)) and log[0]["lr"] == pytest.approx(1e-6)
    assert [l["step"] for l in log if "train_pck" in l] == [4, 8, 12]
    assert load_model(tmp_path / "a" / "last.safetensors").config["width"] == 8
    assert read_card(tmp_path / "a" / "last.safetensors")["meta"]["size"] == 32
    assert plot_log(tmp_path / "a").axes

def test_a_model_fresh_from_fit_is_evaluated_at_its_size(tmp_path):
    from cape.evaluation import evaluate
    data = dots_data(tmp_path / "data")
    for name, train, size in (("photos", data, 40), ("sampler", Dots(24), 24)):     # a sampler's own size counts
        model = fresh()
        Learner(model, train, None, QUICK.replace(size=40, steps=2, pck_every=0), tmp_path / name).fit()
        assert model.meta["step"] == 2 and evaluate(model, data, episodes=2, queries=2, progress=False).settings["size"] == size
        assert load_model(tmp_path / name / "last.safetensors").meta["size"] == size
    model = fresh(Breaks)
    Breaks.how, Breaks.at, Breaks.seen = "raise", 1, 0
    with pytest.raises(RuntimeError): Learner(model, data, None, QUICK.replace(size=40), tmp_path / "cut").fit()
    assert model.meta["size"] == 40                                     # one stops a run by hand and looks at the model

def test_the_bar_may_be_lines_of_a_log(tmp_path, monkeypatch, capsys):
    from cape import progress
    monkeypatch.setenv("CAPE_PROGRESS", "lines")
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (*progress.Lines.__init__.__defaults__[:-1], 0.))
    Learner(fresh(), Dots(), None, QUICK, tmp_path).fit()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12 and said[-1].startswith("testnet: 12 of 12 step")
    assert all(word in said[-1] for word in ("loss ", "PCK 0.", " images/s"))

def test_same_seed_same_result_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        Learner(fresh(), Dots(), None, QUICK.replace(seed=seed), tmp_path / name).fit()
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))   # dropout draws other numbers

def test_error_then_resume_is_bit_identical(tmp_path, capsys):
    Learner(fresh(), Dots(), None, QUICK, tmp_path / "a").fit()
    Breaks.how, Breaks.at, Breaks.seen = "raise", 8, 0
    with pytest.raises(RuntimeError, match="pulled"): Learner(fresh(Breaks), Dots(), None, QUICK, tmp_path / "b").fit()
    torch.manual_seed(99)                                               # the new model's own weights must not matter
    Learner(TestNet(), Dots(), None, QUICK, tmp_path / "b").fit()
    assert "goes on at step 5 of 12" in capsys.readouterr().out
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert [l["step"] for l in read_log(tmp_path / "b")] == list(range(1, 13))
    losses = [[l["loss"] for l in read_log(tmp_path / name)] for name in "ab"]
    assert losses[0] == losses[1]

def test_finished_run_is_left_alone(tmp_path, capsys):
    Learner(fresh(), Dots(), None, QUICK, tmp_path).fit()
    before = (tmp_path / "last.safetensors").read_bytes()
    assert Learner(fresh(), Dots(), None, QUICK, tmp_path).fit()["step"] == 12
    assert "has finished" in capsys.readouterr().out and (tmp_path / "last.safetensors").read_bytes() == before

def test_time_limit_stops_cleanly_and_goes_on(tmp_path):
    Learner(fresh(), Dots(), None, QUICK, tmp_path / "a").fit()
    limited = QUICK.replace(max_minutes=1e-6, save_every=0)
    first = Learner(fresh(), Dots(), None, limited, tmp_path / "b").fit()
    assert first["stopped"] == "time limit" and first["step"] == 1
    Learner(fresh(), Dots(), None, QUICK, tmp_path / "b").fit()
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))

def test_bf16_trains_and_keeps_float32_weights(tmp_path):
    result = Learner(fresh(), Dots(), None, QUICK.replace(precision="bf16"), tmp_path / "a").fit()
    Learner(fresh(), Dots(), None, QUICK, tmp_path / "b").fit()
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(v.dtype == torch.float32 for v in a.values()) and np.isfinite(result["last"]["loss"])
    assert not same(a, b) and max((a[k] - b[k]).abs().max() for k in a) < .05

def test_compiled_backbones_train_alike_and_change_no_name(tmp_path):
    "By the backend that makes no code: the same graph, in seconds"
    found = {}
    for kind in ("none", "aot_eager"):
        seed_step(0, 0)
        net = create_model("protonet")
        Learner(net, Dots(), None, QUICK.replace(compile=kind, steps=3), tmp_path / kind).fit()
        found[kind] = load_file(tmp_path / kind / "last.safetensors")
    assert found["none"].keys() == found["aot_eager"].keys()
    for name, tensor in found["none"].items(): torch.testing.assert_close(found["aot_eager"][name], tensor, atol=1e-4, rtol=1e-3)
    assert Learner(net, Dots(), None, QUICK.replace(steps=3), tmp_path / "aot_eager").fit()["step"] == 3  # it may go on without
    assert [n.split(".")[-1] for n in compile_backbones(create_model("pomnet"), "eager")] == ["support_backbone", "query_backbone"]
    with pytest.raises(ConfigError, match="compile: testnet has no module called backbone"): compile_backbones(TestNet())


def test_weights_that_do_not_train_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="no trainable parameters"):
        Learner(fresh().requires_grad_(False), Dots(), None, QUICK, tmp_path)


# ---- what goes wrong

def test_other_settings_are_named(tmp_path):
    Learner(fresh(), Dots(), None, QUICK, tmp_path).fit()
    with pytest.raises(ConfigError, match="batch: stored 4, now 6; lr: stored 0.001, now 0.01"):
        Learner(fresh(), Dots(), None, QUICK.replace(lr=.01, batch=6, log_every=2), tmp_path).fit()
    with pytest.raises(ConfigError, match="model.width: stored 8, now 4"):
        Learner(fresh(width=4), Dots(), None, QUICK, tmp_path).fit()

def test_not_finite_loss_keeps_the_batch(tmp_path):
    Breaks.how, Breaks.at, Breaks.seen = "nan", 8, 0
    with pytest.raises(TrainingError, match=r"not finite at step 7 .*not-finite-step7-rank0.safetensors"):
        Learner(fresh(Breaks), Dots(), None, QUICK, tmp_path).fit()
    kept = load_file(tmp_path / "not-finite-step7-rank0.safetensors")
    assert torch.equal(kept["query_images"], Dots().batch(range(28, 32)).query_images)
    assert load_state(tmp_path)["step"] == 5

def test_disk_full_leaves_the_old_state(tmp_path):
    Learner(fresh(), Dots(), None, QUICK.replace(steps=5), tmp_path / "a").fit()
    model = fresh()
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    learner = Learner(model, Dots(), None, QUICK.replace(steps=5), tmp_path / "a")
    learner._start()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))             # every file ends after 4 kB, as on a full disk
    try:
        with pytest.raises(StorageError, match="state.pt: cannot be written: .*the file of before is intact"): learner._save()
        with pytest.raises(StorageError, match="last.safetensors: cannot be written: .*intact"): learner._save_weights("last.safetensors")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before

def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="output folder cannot be written"):
        Learner(fresh(), Dots(), None, QUICK, tmp_path / "file" / "run").fit()

def test_torn_state_is_named(tmp_path):
    Learner(fresh(), Dots(), None, QUICK, tmp_path).fit()
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(CheckpointError, match="state.pt cannot be read"): Learner(fresh(), Dots(), None, QUICK, tmp_path).fit()

def test_half_written_log_line_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    assert read_log(tmp_path) == [{"step": 1}]

def test_no_data_and_too_few_images(tmp_path):
    data = dots_data(tmp_path, categories=2, images=1)
    with pytest.raises(DataError, match="needs 2 instances"): Learner(fresh(), data, None, QUICK, tmp_path / "out")
    empty = PoseDataset.from_dict(dict(images=[], annotations=[], categories=[dict(id=1, name="none")]), tmp_path, "nothing")
    with pytest.raises(DataError, match="no instances"): Learner(fresh(), empty, None, QUICK, tmp_path / "out")


# ---- on photos

def test_photos_with_validation(tmp_path):
    train, val = dots_data(tmp_path / "t", one_image=True), dots_data(tmp_path / "v", categories=2)
    config = QUICK.replace(steps=6, val_every=3, val_episodes=3, val_queries=2)
    learner = Learner(fresh(), train, val, config, tmp_path / "run")
    assert learner.sampler.skipped == {1: 1}                            # the category with one image
    result = learner.fit()
    scores = [l for l in read_log(tmp_path / "run") if "val_pck" in l]
    assert [l["step"] for l in scores] == [3, 6] and result["best"]["val_pck"] == max(l["val_pck"] for l in scores)
    assert read_card(tmp_path / "run" / "best.safetensors")["meta"]["step"] == result["best"]["step"]
    assert result["training_data"]["fingerprint"] == train.fingerprint

def test_worker_processes_give_the_threads_result(tmp_path):
    train = dots_data(tmp_path / "t")
    for workers in (0, 2):
        Learner(fresh(), train, None, QUICK.replace(steps=4, cache_gb=0, workers=workers), tmp_path / f"{workers}").fit()
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))


# ---- killed: this file is also the script that is killed

def killed(folder, how, at):
    "A run in a process of its own that kills itself: how it ended"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, __file__, str(folder), how, str(at)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}).returncode

def main(folder, how, at):
    torch.set_num_threads(1)
    Breaks.how, Breaks.at = how, int(at)
    if how == "kill in save":
        replace, count = os.replace, [0]
        def replace_or_die(a, b):
            count[0] += str(b).endswith("state.pt")
            if count[0] == int(at): os.kill(os.getpid(), signal.SIGKILL)
            return replace(a, b)
        os.replace = replace_or_die
    Learner(fresh(Breaks), Dots(), None, QUICK, folder).fit()

@pytest.fixture
def one_thread():
    "Sums in the order of one thread, in every process alike"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def test_killed_twice_and_resumed_is_bit_identical(one_thread, tmp_path, capsys):
    Learner(fresh(), Dots(), None, QUICK, tmp_path / "whole").fit()
    assert killed(tmp_path / "parts", "kill", at=7) == -signal.SIGKILL                      # in the middle of step 7
    assert load_state(tmp_path / "parts")["step"] == 5
    assert killed(tmp_path / "parts", "kill in save", at=1) == -signal.SIGKILL              # before the state is in place
    assert load_state(tmp_path / "parts")["step"] == 5
    assert any(p.name.startswith(".state.pt.") for p in (tmp_path / "parts").iterdir())
    Learner(fresh(), Dots(), None, QUICK, tmp_path / "parts").fit()
    assert "goes on at step 5 of 12" in capsys.readouterr().out
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    a, b = (load_state(tmp_path / name)["optimizer"]["state"] for name in ("whole", "parts"))
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    assert not any(p.name.startswith(".") for p in (tmp_path / "parts").iterdir())


# ---- two processes: the ways that chapter 13 shows, on photos, against one process

TWO = dict(options=dict(loss="mse", frozen_bn=True, dim=32, heads=4, hidden=32, layers=1),  # every pair weighs the same in this loss
           settings=dict(steps=12, size=32, batch=4, warmup=3, log_every=1, pck_every=4, val_every=0, val_episodes=1, val_queries=1,
                         cache_gb=0, workers=0, device="cpu"))

def words(out):
    "What follows `cape` on the command line"
    pairs = lambda fields: [f"{k}={json.dumps(v)}" for k, v in fields.items()]
    return ["train", "--method", "capeformer", "--size", "mini", "--preset", "tiny", "--out", str(out),
            "--option", *pairs(TWO["options"]), "--set", *pairs(TWO["settings"])]

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def check_agreement(one, two):
    "Logs alike to 1e-4, weights to 1e-5. Keys' biases are left out: no softmax sees them, and Adam makes steps of their rounding errors."
    a, b = read_log(one), read_log(two)
    assert len(a) == len(b) == 13                                                           # steps and a validation
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x.keys() - {"seconds", "images_per_second", "utilisation"}: assert x[k] == pytest.approx(y[k], abs=1e-4), (k, x["step"])
    cut = lambda folder: {k: torch.cat(t.chunk(3)[::2]) if k.endswith("in_proj_bias") else t for k, t in weights(folder).items()}
    a, b = cut(one), cut(two)
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
    told = json.loads((Path(two) / "result.json").read_text())
    assert (told["stopped"], told["step"], told["images"]) == ("finished", 12, 12 * 4 * 2)

@pytest.fixture(scope="module")
def one_process(posezoo_mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    from cape.runs import train_run
    assert train_run("capeformer", out, size="mini", preset="tiny", **TWO)["processes"] == 1
    torch.manual_seed(0)
    fresh = create_model("capeformer", **TWO["options"]).state_dict()
    assert max((t - fresh[k]).abs().max().item() for k, t in weights(out).items()) > 1e-3   # so much did training move
    return out

def test_torchrun_agrees_with_one_process(one_process, tmp_path):
    command = "torchrun --standalone --nproc_per_node 2 --local-ranks-filter 0 --no-python cape train"
    assert command in (ROOT / "nbs" / "13_learner.ipynb").read_text()
    program, *options = command.split()
    options[options.index("cape"):] = [Path(sys.executable).with_name("cape"), *words(tmp_path)]
    run = subprocess.Popen([Path(sys.executable).with_name(program), *options], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    try: said, errors = run.communicate(timeout=240)
    finally: run.terminate()                                                                # torchrun ends its own; nothing if it has ended
    assert run.returncode == 0, errors[-2000:]
    assert json.loads((tmp_path / "result.json").read_text())["processes"] == 2
    assert said.count("capeformer: 12 of 12 steps") == 1                                    # the other one is silent
    check_agreement(one_process, tmp_path)

def test_notebook_launcher_agrees_and_one_process_goes_on(one_process, tmp_path, capsys):
    from nbclient import NotebookClient
    from nbformat import v4
    from run_notebook import quiet_kernel
    call = "notebook_launcher(train, num_processes=2)"
    assert call in (ROOT / "nbs" / "13_learner.ipynb").read_text()
    short = {**TWO, "settings": {**TWO["settings"], "max_minutes": 1e-6}}                    # stops at step 10: two ask every tenth
    cell = "\n".join(["from accelerate import notebook_launcher", "from cape.runs import train_run",
                      f"def train(): train_run('capeformer', {str(tmp_path)!r}, size='mini', preset='tiny', **{short!r})",
                      call.replace(")", f", use_port='{free_port()}')")])
    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(ROOT)}}, kernel_manager_class=quiet_kernel()).execute()
    told = json.loads((tmp_path / "result.json").read_text())
    assert (told["processes"], told["stopped"], told["step"]) == (2, "time limit", 10)
    from cape.runs import train_run
    train_run("capeformer", tmp_path, size="mini", preset="tiny", **TWO)
    assert "goes on at step 10 of 12" in capsys.readouterr().out
    check_agreement(one_process, tmp_path)


if __name__ == "__main__": main(*sys.argv[1:])
