"No room, no permission, no memory, a helper that dies, a loss that is no number, Ctrl-C: one clear error, and nothing lost."
import errno
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_learner import QUICK, Breaks, Dots, TestNet, dots_data, fresh, same, weights

from cape import errors
from cape.data import posezoo
from cape.data.annotations import write_atomic
from cape.data.health import check_folder
from cape.errors import CapeError, ConfigError, StorageError, TrainingError, out_of_memory
from cape.evaluation import evaluate
from cape.learner import Learner, feed, load_batch, load_state, read_log
from cape.models.base import save_model
from cape.models.controls import Copy
from cape.photos import PhotoPose, PhotoPoses

from .harness import ROOT, closed_folder, small_disk


@pytest.fixture(scope="module")
def dots(tmp_path_factory): return dots_data(tmp_path_factory.mktemp("dots"))


# ---- every writer of the library, into a folder

def report_of(dots): return evaluate(Copy(), dots, episodes=2, queries=2, size=32, progress=False)

def poses(): return PhotoPoses([PhotoPose("a.jpg", "a.jpg", (40, 40), np.array([[3., 4.], [5., 6.]]), names=("a", "b"))])

def predict(folder, dots):
    from cape.estimator import PoseEstimator, predict_folder
    photo = dots.path(0)
    predict_folder(photo.parent, PoseEstimator(Copy(), size=32).fit(photo, dots[0].keypoints), folder / "poses", draw=False)

WRITERS = {
    "building": lambda folder, dots: posezoo.build(posezoo.Size(2, 48), folder / "zoo", workers=1),
    "training": lambda folder, dots: Learner(fresh(), Dots(), None, QUICK, folder / "run").fit(),
    "evaluating": lambda folder, dots: evaluate(Copy(), dots, episodes=2, queries=2, size=32, resume=folder / "finished"),
    "a report": lambda folder, dots: report_of(dots).to_json(folder / "report.json"),
    "annotations": lambda folder, dots: dots.save(folder / "all.json"),
    "a health report": lambda folder, dots: check_folder(dots.root.parent, images=False).to_json(folder / "health.json"),
    "a model": lambda folder, dots: save_model(fresh(), folder / "model.safetensors"),
    "poses": lambda folder, dots: poses().save(folder / "poses.json"),
    "poses of a folder": predict,
}

@pytest.fixture(scope="module")
def coco_file(dots):
    "The data of `dots` as a folder that can be checked"
    (dots.root.parent / "annotations").mkdir(exist_ok=True)
    dots.save(dots.root.parent / "annotations" / "all.json")

def test_a_folder_that_cannot_be_written(dots, coco_file, tmp_path):
    with closed_folder(tmp_path / "closed") as folder:
        if folder is None: pytest.skip("root, and nothing can be mounted here: every folder can be written")
        for what, write in WRITERS.items():
            with pytest.raises(StorageError) as e: write(folder, dots)
            assert str(folder) in str(e.value) and len(str(e.value)) < 500, what
            assert list(folder.iterdir()) == [], what

def test_a_disk_without_room(dots, coco_file, tmp_path):
    "60 kB in all, then whatever is left once something lies there"
    with small_disk(tmp_path / "small", 60) as folder:
        if folder is None: pytest.skip("no small disk can be mounted here")
        (folder / "old.json").write_bytes(b"old")
        with open(folder / "filler", "wb", 0) as filler:
            with pytest.raises(OSError): [filler.write(bytes(1024)) for _ in range(60)]
        for what, write in WRITERS.items():
            with pytest.raises(StorageError) as e: write(folder, dots)
            assert str(folder) in str(e.value), what
            left = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("old.json", "filler")]
            assert not [p for p in left if p.stat().st_size], (what, left)
        with pytest.raises(StorageError, match="old.json"): write_atomic(folder / "old.json", bytes(9999))
        assert (folder / "old.json").read_bytes() == b"old"

def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room(tmp_path):
    Learner(fresh(), Dots(), None, QUICK, tmp_path / "whole").fit()
    with small_disk(tmp_path / "small", 400) as folder:
        if folder is None: pytest.skip("no small disk can be mounted here")
        class Fills(TestNet):
            steps = 0
            def training_step(self, batch):
                self.steps += 1
                if self.steps == 8: fill(folder / "filler")
                return super().training_step(batch)
        torch.manual_seed(0)
        with pytest.raises(StorageError, match="before is intact|cannot be written"):
            Learner(Fills(), Dots(), None, QUICK, folder / "run").fit()
        assert load_state(folder / "run")["step"] == 5
        (folder / "filler").unlink()
        Learner(fresh(), Dots(), None, QUICK, folder / "run").fit()
        assert same(weights(tmp_path / "whole"), weights(folder / "run"))
        assert [line["step"] for line in read_log(folder / "run")] == list(range(1, 13))

def fill(path):
    with open(path, "wb", 0) as file:
        try:
            while file.write(bytes(512)): pass
        except OSError as error: assert error.errno == errno.ENOSPC

def test_no_more_files_may_be_opened(dots, tmp_path):
    "Another reason of the system, told like the others"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken, before[1]))
    try:
        with pytest.raises(StorageError, match="all.json.*[Tt]oo many open files"): dots.save(tmp_path / "all.json")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(taken)


# ---- helpers that die

class Deadly:
    "A data set of batches of which one kills the process that makes it"
    def __init__(self, parent): self.parent, self.size = parent, 32
    def __call__(self, step):
        if step == 7 and os.getpid() != self.parent: os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(step)

def test_a_worker_that_dies_is_told():
    seen = []
    with pytest.raises(TrainingError, match=r"a process that makes batches died .* Fewer TrainConfig.workers than 2"):
        for batch in feed(Deadly(os.getpid()), range(9), workers=2): seen.append(int(batch))
    assert len(seen) >= 4 and seen == list(range(7))[:len(seen)]  # two workers are given two steps each: step 7 once four have arrived

def test_a_run_whose_worker_dies_goes_on(dots, tmp_path):
    config = QUICK.replace(workers=2, cache_gb=0, save_every=6, steps=20)
    class Killer(TestNet):
        steps = 0
        def training_step(self, batch):
            self.steps += 1
            if self.steps == 7: kill_a_child()
            return super().training_step(batch)
    torch.manual_seed(0)
    learner = Learner(Killer(), dots, None, config, tmp_path / "cut")
    with pytest.raises(TrainingError, match="a process that makes batches died"): learner.fit()
    assert load_state(tmp_path / "cut")["step"] >= 6
    for name in ("cut", "uncut"): Learner(fresh(), dots, None, config.replace(workers=0), tmp_path / name).fit()
    assert same(weights(tmp_path / "uncut"), weights(tmp_path / "cut"))

def kill_a_child():
    "One of the processes that this one has started to make batches"
    import torch.multiprocessing as processes
    child = processes.active_children()[0]
    os.kill(child.pid, signal.SIGKILL)
    child.join()

def test_a_drawer_that_dies_is_told(tmp_path, monkeypatch):
    start = posezoo._start_worker
    def and_kill(*args):
        worker = start(*args)
        worker.kill()
        return worker
    monkeypatch.setattr(posezoo, "_start_worker", and_kill)
    with pytest.raises(CapeError, match="zoo: a worker that draws posezoo failed"): posezoo.build(posezoo.Size(2, 48), tmp_path / "zoo", workers=2)
    assert not (tmp_path / "zoo" / "annotations").exists()


# ---- memory

class Hungry(Breaks):
    "Asks for more memory than there is"
    ask = None
    def training_step(self, batch):
        Breaks.seen += 1
        if Breaks.seen == Breaks.at: Hungry.ask()
        return TestNet.training_step(self, batch)

def gpu(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
def processor(): torch.empty(1 << 60, dtype=torch.uint8)                       # what the allocator really says
def arrays(): np.zeros((1 << 30, 1 << 28), np.uint8)                           # what numpy really says

@pytest.mark.parametrize("ask", [gpu, processor, arrays])
@pytest.mark.parametrize("at,advice", [(2, "try batch=2."), (8, "try batch=2 in another `out`")])
def test_no_memory_in_training_names_a_batch(tmp_path, ask, at, advice):
    Breaks.how, Breaks.at, Breaks.seen, Hungry.ask = "memory", at, 0, staticmethod(ask)
    with pytest.raises(TrainingError, match=rf"out of memory at step {at - 1} with batch=4, size=32 on cpu: {advice}"):
        Learner(fresh(Hungry), Dots(), None, QUICK, tmp_path).fit()
    assert (load_state(tmp_path) or dict(step=0))["step"] == at // 5 * 5

def test_no_memory_with_a_batch_of_one_names_another_way(tmp_path):
    Breaks.how, Breaks.at, Breaks.seen, Hungry.ask = "memory", 1, 0, staticmethod(gpu)
    with pytest.raises(TrainingError, match="no batch is smaller; try size=24"): Learner(fresh(Hungry), Dots(), None, QUICK.replace(batch=1), tmp_path).fit()

def test_other_errors_are_not_taken_for_it(tmp_path):
    Breaks.how, Breaks.at, Breaks.seen = "raise", 2, 0
    with pytest.raises(RuntimeError, match="pulled the plug"): Learner(fresh(Breaks), Dots(), None, QUICK, tmp_path).fit()
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and errors.out_of_memory(MemoryError())

@pytest.mark.parametrize("options,advice", [({}, "try batch_size=16"), (dict(batch_size=1), "try memory_gb=1")])
def test_no_memory_in_evaluation_names_a_batch(dots, options, advice):
    class Eats(TestNet):
        def encode(self, images, role="query"): gpu()
    with pytest.raises(ConfigError, match=f"evaluate: out of memory .*{advice}"):
        evaluate(Eats(), dots, episodes=2, queries=2, size=32, progress=False, **options)

def test_real_want_of_memory(jobs, tmp_path):
    "In a process that may have 300 MB more than it begins with"
    assert jobs.run("train_beyond_memory", tmp_path / "said.txt", tmp_path / "run")[0] == 1
    said = (tmp_path / "said.txt").read_text().splitlines()[-1]
    assert "TrainingError: testnet: out of memory at step 0 with batch=64" in said and "try batch=32. The last" in said


# ---- a loss that is no number

def test_a_loss_that_is_no_number_leaves_a_batch_that_breaks_it_again(dots, tmp_path):
    class Divides(TestNet):
        def loss(self, prediction, batch):
            terms = super().loss(prediction, batch)
            bad = (batch.query_index % 7 == 3).any()
            return {"l1": terms["l1"] / (0 if bad else 1)}
    torch.manual_seed(0)
    model = Divides()
    with pytest.raises(TrainingError, match=r"not finite at step (\d+) .*not-finite-step\1-rank0.safetensors \(`load_batch` reads it\)"):
        Learner(model, dots, None, QUICK, tmp_path).fit()
    [path] = tmp_path.glob("not-finite-*")
    batch = load_batch(path)
    assert batch.size == 32 and len(batch) == 4 and [len(links) for links in batch.links] == [2] * 4
    assert not torch.isfinite(model.training_step(batch)["l1"]) and all(torch.isfinite(p).all() for p in model.parameters())
    assert b"pickle" not in path.read_bytes() and load_file(path)["query_index"].tolist() == batch.query_index.tolist()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CapeError, match="not a whole batch"): load_batch(path)


# ---- Ctrl-C

@pytest.fixture
def ctrl_c():
    "Python's own handler, also where these tests are a job in the background, which ignores the signal"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

def test_ctrl_c_saves_the_step_it_is_in(ctrl_c, tmp_path):
    Learner(fresh(), Dots(), None, QUICK.replace(log_every=4), tmp_path / "whole").fit()
    class Interrupted(TestNet):
        steps = 0
        def training_step(self, batch):
            self.steps += 1
            if self.steps == 7: signal.raise_signal(signal.SIGINT)
            return super().training_step(batch)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 7 of 12 and saved; the same call goes on"):
        Learner(Interrupted(), Dots(), None, QUICK.replace(log_every=4), tmp_path / "cut").fit()
    assert load_state(tmp_path / "cut")["step"] == 7 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    Learner(fresh(), Dots(), None, QUICK.replace(log_every=4), tmp_path / "cut").fit()
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    means = [[(line["step"], line["loss"]) for line in read_log(tmp_path / name)] for name in ("whole", "cut")]
    assert means[0] == means[1]                                             # a mean over steps on both sides of the stop

def test_a_second_ctrl_c_strikes_at_once(ctrl_c, tmp_path):
    class Impatient(TestNet):
        steps = 0
        def training_step(self, batch):
            self.steps += 1
            if self.steps == 7: signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
            return super().training_step(batch)
    with pytest.raises(KeyboardInterrupt): Learner(Impatient(), Dots(), None, QUICK, tmp_path).fit()
    assert load_state(tmp_path)["step"] == 5 and signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_ctrl_c_with_worker_processes(ctrl_c, jobs, tmp_path):
    "The terminal tells the whole group, loaders included"
    pid = jobs.start("train_with_workers", tmp_path / "said.txt", tmp_path / "run")
    while not read_log(tmp_path / "run"): time.sleep(.02)
    os.killpg(pid, signal.SIGINT)
    assert jobs.wait() == 130
    said = (tmp_path / "said.txt").read_text()
    assert "stopped at step" in said and "Traceback" not in said, said
    assert load_state(tmp_path / "run")["step"] == read_log(tmp_path / "run")[-1]["step"]

@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_on_the_command_line(ctrl_c, tmp_path, workers):
    command = [sys.executable, "-c", "import sys; from cape.cli import main; sys.exit(main())", "posezoo", "--size", "mini", "--out", str(tmp_path / "zoo"), "--workers", str(workers)]
    env = dict(os.environ, PYTHONPATH=str(ROOT), CAPE_PROGRESS="off")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    while not list((tmp_path / "zoo").glob("images/*/*.jpg")): time.sleep(.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and said == "cape posezoo: interrupted\n"
    assert not (tmp_path / "zoo" / "annotations").exists()

