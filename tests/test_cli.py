"The command `cape` as a whole: streams, codes, help, completion, and that it does what the library does."
import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, own_methods
from PIL import Image

from cape.cli import build_parser, main
from cape.completion import completion_script, read_commands

COMMANDS = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
SMALL = ["--size", "mini"]
TRAIN = ["train", "--method", "protonet", *SMALL, "--preset", "tiny", "--device", "cpu",
         "--set", "size=32", "batch=4", "val_every=0", "val_episodes=1", "log_every=1", "save_every=1", "pck_every=0"]
SCORE = [*SMALL, "--episodes", "2", "--queries", "2", "--device", "cpu"]


def start(*words, **options):
    "The command as a process"
    code = "import sys; from cape.cli import main; sys.exit(main())"
    env = dict(os.environ, PYTHONPATH=str(ROOT), **options.pop("env", {}))
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def cape(*words, **env):
    "Run it: code, standard output, error stream"
    process = start(*words, env=env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def chatty(monkeypatch):
    "Progress is printed at every step, as in a log"
    from cape import progress
    monkeypatch.setenv("CAPE_PROGRESS", "lines")
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (None, "", None, 0, "it", 0.0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, posezoo_mini):
    "A run of two steps"
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TRAIN, "--steps", "2", "--out", str(folder)]) == 0
    return folder


# help

def test_without_words_a_guide():
    code, out, err = cape()
    assert (code, err) == (0, "") and len(out.splitlines()) < 20 and max(map(len, out.splitlines())) <= 110
    assert {w for w in COMMANDS if f"cape {w}" in out} >= {"predict", "posezoo", "check", "train", "evaluate", "models"}


def test_help_is_quick_and_loads_nothing():
    "In seconds of the processor, which other programs on the machine do not lengthen much"
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = used()
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", "from cape.cli import main; main(['--help'])"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "| torch" not in done.stderr and "| numpy" not in done.stderr
    assert used() - before < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches(name, capsys):
    with pytest.raises(SystemExit) as end: main([name, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and f"  cape {name}" in out.split("usage:")[1] or "cape completion bash" in out
    assert max(map(len, out.splitlines())) <= 110
    for action in COMMANDS[name]._actions: assert action.help and len(action.help) > 3, action.option_strings
    assert "--json" in out


def test_version():
    import cape as package
    assert cape("--version") == (0, f"cape {package.__version__}\n", "")


# bad input

@pytest.mark.parametrize("words, cause", [
    (["chek"], "did you mean 'check'"), (["--vresion"], "did you mean '--version'"), (["check", "--jsno", "x"], "did you mean '--json'"),
    (["check", "--jso"], "no option --jso"), (["predict", "--lables=x"], "did you mean '--labels'"), (["xyz"], "expected one of predict"),
    (["train"], "--method"), (["train", "--method", "pomnett", *SMALL], "did you mean 'pomnet'"),
    (["train", "--method", "protonet", "--preset", "papr"], "did you mean 'paper'"),
    (["train", "--method", "protonet", "--minutes", "0"], "'0'"), (["train", "--method", "protonet", "--minutes", "inf"], "'inf'"),
    (["train", "--method", "protonet", *SMALL, "--split", "9", "--out", "gone"], "split 9"),
    (["train", "--method", "protonet", "--data", "gone", *SMALL], "leave it out"),
    (["train", "--method", "protonet", *SMALL, "--set", "lr=fast"], "TrainConfig.lr"),
    (["train", "--method", "protonet", *SMALL, "--option", "width=3"], "no option width"),
    (["train", "--method", "copy", *SMALL, "--out", "gone"], "no trainable parameters"),
    (["train", "--method", "protonet", "--data", "gone"], "gone"), (["evaluate", "gone"], "gone"),
    (["evaluate", "default", "--data", "gone"], "gone"), (["evaluate", "default", *SMALL, "--shots", "0"], "'0'"),
    (["evaluate", "default", *SMALL, "--device", "gpu"], "'gpu'"), (["evaluate", "setup.py", *SMALL], "setup.py"),
    (["evaluate", "gone.pth", *SMALL], "--official"), (["evaluate", "gone.pth", *SMALL, "--official", "capeformer"], "gone.pth"),
    (["convert", "gone.json", "out.json"], "gone.json"), (["convert", "a", "b", "--to", "cocoo"], "did you mean 'coco'"),
    (["export", "gone", "out"], "gone"), (["export", "default", "out", "--size", "big"], "'big'"),
    (["completion", "tcsh"], "expected one of bash"), (["posezoo", "--size", "mini", "x"], "unrecognized")])
def test_bad_input_is_one_line(words, cause, capsys, monkeypatch, tmp_path, posezoo_mini):
    monkeypatch.setenv("CAPE_DATA", str(posezoo_mini.root.parents[1]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").write_text("no weights")
    try: code = main(words)
    except SystemExit as end: code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and cause in err and "Traceback" not in err, err
    assert err.startswith("cape") and "error: " in err and {p.name for p in tmp_path.iterdir()} == {"setup.py"}


def test_a_fault_of_ours_is_no_finding(monkeypatch, capsys):
    from cape.data import health
    monkeypatch.setattr(health, "check_folder", lambda *_, **__: 1 / 0)
    assert main(["check", "x", "--json"]) == 70
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" in err and "ZeroDivisionError" in err and "fault of cape" in err.splitlines()[-1]


def test_reader_that_leaves_early():
    process = start("check", "--help", env={})
    process.stdout.close()
    assert process.wait(60) in (0, 1, 120)                           # the help is argparse's own
    process = start()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, "")


# answers

def test_models(capsys):
    from cape.models.base import list_models
    own = own_methods()
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in own) and "  posezoo/protonet " in text
    assert main(["models", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in said["methods"]] == list_models()
    assert all(m["what"] for m in said["methods"] if m["name"] in own)
    assert {"default", "posezoo/protonet"} <= {w["name"] for w in said["weights"]}
    assert all(os.path.getsize(w["file"]) == w["bytes"] and w["size"] for w in said["weights"])


def test_train_says_where_the_weights_are(tmp_path, posezoo_mini, chatty, capsys):
    words = [*TRAIN, "--steps", "3", "--seed", "5", "--out", str(tmp_path / "run"), "--option", "stride=8"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["step"], said["stopped"], said["config"]["seed"], said["config"]["size"]) == (3, "finished", 5, 32)
    assert said["model_config"]["stride"] == 8 and os.path.isfile(said["weights"]) and "protonet: 3 of 3 step" in err
    assert main(words) == 0 and f"weights: {said['weights']}" in capsys.readouterr().out


def test_the_same_run_as_the_library(trained, tmp_path, posezoo_mini):
    from cape.data.annotations import PoseDataset
    from cape.learner import Learner, train_config
    from cape.models.base import create_model
    import torch
    train, val = (PoseDataset.load("posezoo", size="mini", split=1, subset=s) for s in ("train", "val"))
    config = train_config("tiny", size=32, batch=4, val_every=0, val_episodes=1, steps=2, device="cpu", pck_every=0)
    torch.manual_seed(0)
    Learner(create_model("protonet", backbone="small"), train, val, config, tmp_path).fit()
    assert (tmp_path / "last.safetensors").stat().st_size == (trained / "last.safetensors").stat().st_size
    from safetensors.torch import load_file
    ours, theirs = (load_file(f / "last.safetensors") for f in (tmp_path, trained))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_scores_are_the_librarys(trained, chatty, capsys, tmp_path):
    import cape as package
    assert main(["evaluate", str(trained), *SCORE, "--shots", "1", "2", "--json", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert [(r["shots"], r["method"], r["control"]) for r in said["rows"]] == [
        (n, m, m != "protonet") for n in (1, 2) for m in ("protonet", "copy the support", "mean pose")]
    data = package.PoseDataset.load("posezoo", size="mini", split=1, subset="test")
    report = package.evaluate(package.load_model(trained / "best.safetensors"), data, shots=2, episodes=2, queries=2)
    row = said["rows"][3]
    assert row["fingerprint"] == report.fingerprint and row["PCK@0.2"] == pytest.approx(list(report.interval(0.2)))
    assert said["data_fingerprint"] == data.fingerprint and "protonet" in err and said["categories"] == 20
    assert {f.name for f in tmp_path.iterdir()} == {"finished"} | {f"{m}-{n}-shot.json" for n in (1, 2)
                                                                   for m in ("protonet", "copy-the-support", "mean-pose")}
    assert package.Report.from_json(tmp_path / "protonet-2-shot.json").value(0.2) == report.value(0.2)
    assert main(["evaluate", str(trained), *SCORE]) == 0
    text = capsys.readouterr().out
    assert all(w in text for w in ("PCK@0.05", "copy the support", "mean pose", "95 % intervals")) and "[" in text


def test_a_folder_of_ones_own(trained, posezoo_mini, tmp_path, capsys):
    "No splits, a warning about it: on the error stream, one line"
    one = posezoo_mini.select(list(posezoo_mini.categories)[:2])
    coco = one.to_dict()
    coco["categories"][0]["keypoints"] = coco["categories"][0]["keypoints"][:-1]    # one name too few
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "mine.json").write_text(json.dumps(coco))
    (tmp_path / "images").symlink_to(one.root)
    words = ["evaluate", str(trained), "--data", str(tmp_path), "--split", "all", "--episodes", "2", "--queries", "2", "--json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["categories"] == 2
    assert len([line for line in err.splitlines() if line.startswith("cape evaluate: warning: ") and "names" in line]) == 1
    assert main([w for w in words if w not in ("--split", "all")]) == 2 and "split 1" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path):
    "Three photos, and the labels of the first"
    (tmp_path / "photos").mkdir()
    for i, name in enumerate("abc"):
        Image.fromarray(np.full((60, 80, 3), 60 * i, np.uint8)).save(tmp_path / f"photos/{name}.png")
    coco = {"images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}],
            "categories": [{"id": 1, "name": "beetle", "keypoints": ["head", "tail"], "skeleton": [[0, 1]]}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 60, 50], "num_keypoints": 2,
                             "keypoints": [20, 20, 2, 60, 40, 2]}]}
    (tmp_path / "photos/labels.json").write_text(json.dumps(coco))
    return tmp_path


def test_predict_names_what_failed(photos, chatty, capsys):
    (photos / "photos/d.png").write_bytes(b"no picture")
    words = ["predict", "--labels", str(photos / "photos/labels.json"), str(photos / "photos"), "--no-pictures", "--json"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["photos"], said["before"]) == (3, 0) and [f[-5:] for f in said["failed"]] == ["d.png"]
    assert len(json.loads(open(said["file"]).read())["annotations"]) == 3
    assert any(line.startswith("cape predict: ") and "d.png" in line for line in err.splitlines())


def test_convert(photos, chatty, capsys):
    words = ["convert", str(photos / "photos/labels.json"), str(photos / "mine"), "--to", "labelme"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["format"], said["images"], said["instances"]) == (str(photos / "mine"), "labelme", 1, 1)
    assert main(["convert", str(photos / "mine"), str(photos / "back.json"), "--images", str(photos / "photos")]) == 0
    assert "back.json" in capsys.readouterr().out
    points = json.loads((photos / "back.json").read_text())["annotations"][0]["keypoints"]
    assert np.allclose(np.reshape(points, (-1, 3))[:, :2], [[20, 20], [60, 40]], atol=0.51)


def test_export_reaches_the_library(trained, tmp_path, monkeypatch, capsys):
    import cape.export
    def write(model, folder, size=None):
        assert model.name == "protonet" and size == 64
        os.mkdir(folder)
        with open(f"{folder}/encode.onnx", "wb") as file: file.write(b"123")
        print("comparing")
        return folder
    monkeypatch.setattr(cape.export, "export_onnx", write)
    assert main(["export", str(trained), str(tmp_path / "onnx"), "--size", "64", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == dict(folder=str(tmp_path / "onnx"), files={"encode.onnx": 3}) and err == "comparing\n"


def test_posezoo_prints_json_only(tmp_path, chatty, capsys, monkeypatch):
    from cape.data import posezoo
    monkeypatch.setattr(posezoo, "_steps", lambda *_: posezoo.progress(range(3), "drawing"))
    monkeypatch.setattr(posezoo, "_write_annotations", lambda *_: None)
    assert main(["posezoo", "--size", "mini", "--out", str(tmp_path / "zoo"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["folder"] == str(tmp_path / "zoo") and "drawing: 3 of 3" in err


def test_check_prints_json_only(posezoo_mini, chatty, capsys):
    assert main(["check", str(posezoo_mini.root.parent), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] and "of 800" in err


# interruption

def test_ctrl_c_and_on(tmp_path, posezoo_mini, capsys):
    words = [*TRAIN, "--steps", "30000", "--out", str(tmp_path / "run"), "--minutes"]
    process = start(*words, "5", env=dict(CAPE_PROGRESS="off"))
    end = time.time() + 200
    while not (tmp_path / "run/state.pt").exists() and time.time() < end: time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    before = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["step"]
    assert (process.returncode, out) == (130, "") and len(err.splitlines()) == 1
    assert err.startswith(f"cape train: interrupted: {tmp_path / 'run'}: stopped at step ") and "the same call goes on" in err
    assert int(err.split("at step ")[1].split()[0]) >= before
    assert main([*words, "0.001", "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["stopped"] == "time limit" and said["step"] > before - 1 > -1 and "goes on at step" in err


def test_evaluate_goes_on_where_it_was_interrupted(trained, tmp_path, capsys, monkeypatch):
    from cape.evaluation import _Finished
    write, written = _Finished.write, []
    def stops(self, category, *rest):
        write(self, category, *rest)
        written.append(category)
        if len(written) == 25: raise KeyboardInterrupt                 # of 60: three tables of twenty categories
    monkeypatch.setattr(_Finished, "write", stops)
    words = ["evaluate", str(trained), *SCORE, "--json", "--out", str(tmp_path)]
    assert main(words) == 130 and capsys.readouterr().err.endswith("cape evaluate: interrupted\n")
    assert len(list((tmp_path / "finished").iterdir())) == 25 and not list(tmp_path.glob("*.json"))
    assert main(words) == 0 and len(written) == 60
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert main([*words[:-2]]) == 0 and len(written) == 120            # nothing kept is read without --out
    assert json.loads(capsys.readouterr().out)["rows"] == rows


# completion

WORDS = dict(METHOD=["protonet", "pomnet"], DATA=["posezoo"], MODEL=["posezoo/protonet"])


def ask(shell, script, line, cwd):
    "What the shell offers after `line`"
    if shell == "fish":
        (cwd / "script.fish").write_text(script)
        done = subprocess.run(["fish", "-c", f"source script.fish; complete -C '{line}'"], cwd=cwd, capture_output=True, text=True)
        return [row.split("\t")[0] for row in done.stdout.splitlines()]
    words = line.split(" ")
    ask = f"COMP_WORDS=({' '.join(repr(w) for w in words)}); COMP_CWORD={len(words) - 1}; _cape; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "--norc", "-c", f"{script}\n{ask}"], cwd=cwd, capture_output=True, text=True)
    assert done.stderr == ""
    return [row for row in done.stdout.splitlines() if row]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_tab(shell, tmp_path):
    if not shutil.which(shell): pytest.skip(f"{shell} is not installed")
    (tmp_path / "photos of mine").mkdir()
    (tmp_path / "labels.json").touch()
    script = completion_script(build_parser(), shell, WORDS)
    at = tmp_path / "in"
    at.mkdir()
    for f in list(tmp_path.iterdir()):
        if f != at: f.rename(at / f.name)
    for line, wanted in {"cape ": set(COMMANDS), "cape ev": {"evaluate"}, "cape train --method p": {"protonet", "pomnet"},
                         "cape train --preset ": {"tiny", "cpu", "paper"}, "cape evaluate posez": {"posezoo/protonet"},
                         "cape predict --json --no": {"--no-pictures"}, "cape completion ": {"bash", "zsh", "fish"},
                         "cape train --data pose": {"posezoo"}, "cape train --steps ": set()}.items():
        found = set(ask(shell, script, line, at)) - {"script.fish"}
        assert found == wanted or (line.endswith("--steps ") and not found & set(COMMANDS)), (line, found)
    for line, name in {"cape predict --labels lab": "labels.json", "cape check pho": "photos of mine", "cape mp100 --sources a pho":
                       "photos of mine", "cape convert lab": "labels.json"}.items():
        if shell == "fish" and "--sources" in line: continue                      # takes one value there
        assert name in {f.rstrip("/").replace("\\", "") for f in ask(shell, script, line, at)}, line
    assert "labels.json" not in ask(shell, script, "cape check lab", at)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_whole(shell, tmp_path):
    "Every command and option is in it, and the shell can read it"
    script = completion_script(build_parser(), shell, WORDS)
    for name, (_, slots) in read_commands(build_parser(), WORDS).items():
        assert name in script
        for option in (n for s in slots for n in s.names):
            assert (f"-l {option.lstrip('-')} " if shell == "fish" and option.startswith("--") else option.lstrip("-")) in script
    if not shutil.which(shell): pytest.skip(f"{shell} is not installed: its grammar was not checked")
    (tmp_path / "script").write_text(script)
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_command_knows_the_names(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "capeformer" in script and "posezoo/protonet" in script and script.rstrip().endswith("complete -F _cape cape")
