"What is done in processes that are killed: building, training, evaluating, tiny, and the same every time."
import sys
import traceback
from pathlib import Path


def prepare():
    "Import once what every job needs"
    import os
    import torch
    os.fsync = lambda file: None      # for a power cut; what a killed process has written, the system keeps
    torch.set_num_threads(1)
    import accelerate  # noqa: F401
    import cape.data.posezoo, cape.estimator, cape.evaluation, cape.learner, cape.models.prototype  # noqa: E401, F401
    import test_learner  # noqa: F401
    cape.data.posezoo.species()


def run(job, args):
    "The exit code"
    try:
        globals()[job](*args)
        code = 0
    except KeyboardInterrupt as error:
        print(error)
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    return code


# ---- building

def build(folder, workers=1):
    "A small picture of each of the hundred categories"
    from cape.data.posezoo import Size, build
    build(Size(1, 40), Path(folder), workers=workers)


# ---- training

def net(how="", at=0):
    "The network of test_learner.py, which may do something at one step"
    from test_learner import Breaks, TestNet, fresh
    Breaks.how, Breaks.at, Breaks.seen = how, at, 0
    return fresh(Breaks if how else TestNet)

def train(folder, steps=30):
    "Photos, validation, and a state every five steps"
    from test_learner import QUICK, dots_data
    from cape.learner import Learner
    folder = Path(folder)
    data = dots_data(folder.parent / "data", 3)
    config = QUICK.replace(steps=steps, pck_every=7, val_every=15, val_episodes=1, val_queries=2, save_every=5)
    Learner(net(), data, data, config, folder).fit()


# ---- evaluating

def evaluate(folder):
    "ProtoNet with random weights on the twenty test categories of PoseZoo mini; finished categories are kept"
    import torch
    from cape.data.annotations import PoseDataset
    from cape.evaluation import evaluate
    from cape.models.prototype import ProtoNet
    torch.manual_seed(0)
    data = PoseDataset.load("posezoo", size="mini", split=1, subset="test")
    report = evaluate(ProtoNet(), data, episodes=6, queries=4, size=64, resume=Path(folder) / "finished")
    report.to_json(Path(folder) / "report.json")

def train_with_workers(folder):
    "Photos decoded for every crop by two worker processes, for far longer than anybody waits"
    import signal
    from test_learner import QUICK, dots_data
    from cape.learner import Learner
    signal.signal(signal.SIGINT, signal.default_int_handler)
    data = dots_data(Path(folder).parent / "data", 3)
    Learner(net(), data, None, QUICK.replace(steps=100000, workers=2, cache_gb=0, save_every=0, log_every=1), folder).fit()

def train_beyond_memory(folder):
    "A batch that needs more than the 300 MB that are left"
    import resource
    from test_learner import QUICK, Dots, fresh
    from cape.learner import Learner
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
    Learner(fresh(), Dots(512), None, QUICK.replace(batch=64), folder).fit()
