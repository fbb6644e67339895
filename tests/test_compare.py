"The notebook of the main table, with its smallest parameters: what it writes, and that nothing is done twice or differently."
import json
import shutil

import pytest
import torch
from conftest import ROOT, run_cells
from run_notebook import UnknownParameter, run
from safetensors.torch import load_file
from ship_weights import ship

import cape
from cape.learner import Learner, read_log
from cape.trials import Trials

NOTEBOOK = ROOT / "nbs" / "experiments" / "compare.ipynb"
METHODS = ["protonet", "prototype"]
TRAIN = dict(size=32, batch=4)
SMALL = dict(methods=METHODS, steps=3, episodes=3, queries=2, overrides={m: {"train": TRAIN} for m in METHODS})
SHOWN = ("PCK@0.2", "PCK@0.05", "mPCK")


def compare(folder, name, kernel=False, **more):
    "One run whose results are in `folder`: the result, and all that was printed"
    paths = dict(out=str(folder / "runs"), result=str(folder / f"{name}.json"), figure=str(folder / f"{name}.svg"))
    if kernel:
        done = run(NOTEBOOK, folder / f"{name}.ipynb", SMALL | paths | more, 300)
        said = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    else: said = run_cells(NOTEBOOK, **SMALL | paths | more)
    return json.loads((folder / f"{name}.json").read_text()), said


def runs_of(folder, method): return sorted(p.parent for p in (folder / "runs").glob(f"{method}-*/last.safetensors") if read_log(p.parent))


def state(folder):
    "Every file of the runs with the time of its last change"
    return {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def first(posezoo_mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, *compare(folder, "first", kernel=True)


def test_rows_of_all_methods_with_intervals_and_origin(first):
    folder, result, said = first
    labels = {"copy the support", "mean pose", "untrained protonet", *METHODS}
    for shots in (1, 5):
        rows = [r for r in result["rows"] if r["shots"] == shots]
        assert {r["method"] for r in rows} == labels and len(rows) == 5
        assert [r["PCK@0.2"][0] for r in rows] == sorted((r["PCK@0.2"][0] for r in rows), reverse=True)
        for row in rows:
            for name in SHOWN: assert 0 <= row[name][1] <= row[name][0] <= row[name][2] <= 1
            assert row["pairs"] == 20 * 3 * 2 and row["seeds"] == [pytest.approx(row["PCK@0.2"][0])]
            assert f"{row['PCK@0.2'][0]:.3f} [{row['PCK@0.2'][1]:.3f}" in said
        assert result["fingerprints"][f"{shots}-shot"] in said
        tests = [t for t in result["tests"] if t["shots"] == shots and t["metric"] == "PCK@0.2"]
        assert [t["above"] for t in tests] == [r["method"] for r in rows[:-1]]
        for above, below, t in zip(rows, rows[1:], tests):
            assert t["difference"] == pytest.approx(above["PCK@0.2"][0] - below["PCK@0.2"][0], abs=1e-9)
            assert t["low"] <= t["difference"] <= t["high"] and 0 < t["p"] <= 1
    assert {"commit", "device", "machine", "torch", "numpy", "python", "cape", "minutes", "train", "test"} <= set(result["provenance"])
    for method in METHODS:
        about = result["methods"][method]
        assert about["steps"] == 3 and about["size"] == 32 and about["parameters"] > 1000 and about["train"]["batch"] == 4
        assert about["images_per_second"][0] > 0 and len(about["minutes"]) == 1
        run, = runs_of(folder, method)
        assert read_log(run)[-1]["step"] == 3
    assert result["mpck_thresholds"] == [.05, .1, .15, .2] and "mean of PCK at 0.05, 0.1, 0.15, 0.2" in said
    assert "<svg" in (folder / "first.svg").read_text()


def test_second_run_does_nothing_again(first):
    folder, result, said = first
    before = state(folder)
    again, told = compare(folder, "again")
    assert state(folder) == before and again["rows"] == result["rows"] and again["tests"] == result["tests"]
    assert "evaluation\n" in said and "training\n" in said and "evaluation\n" not in told and "training\n" not in told


def test_killed_in_the_middle_it_ends_with_the_same_table(first, tmp_path):
    folder, result, _ = first
    runs = tmp_path / "runs"
    trained, = runs_of(folder, "protonet")
    shutil.copytree(trained, runs / trained.name)                            # trained; killed between its two reports,
    report = sorted((runs / trained.name).glob("report-*.json"))[0]
    report.unlink()
    trials = Trials(runs, steps=3, episodes=3, queries=2)
    variant = {"method": "prototype", "train": TRAIN}
    config = trials.config(variant, 0, 3)
    place = runs / f"prototype-{trials.key(variant, 1, config)}"
    net = trials.fresh(variant, 1, config)
    stopped = Learner(net, trials.parts(1)[0], None, config.replace(max_minutes=1e-6), place).fit()   # and within the other's training
    assert stopped["stopped"] == "time limit" and stopped["step"] == 1
    log = read_log(runs / trained.name)
    killed, said = compare(tmp_path, "killed")
    assert read_log(runs / trained.name) == log and "goes on at step 1 of 3" in said
    assert f"{trained.name}: training" not in said and said.count(f"{trained.name}, ") == 1 and report.exists()
    assert killed["rows"] == result["rows"] and killed["tests"] == result["tests"]


def test_equal_minutes_by_a_rate_that_is_kept(posezoo_mini, tmp_path):
    only = dict(methods=["protonet"], overrides={"protonet": {"train": TRAIN}}, shots=[1], warm=3, minutes=0.005, seeds=[0, 1])
    result, _ = compare(tmp_path, "timed", **only)
    place, = (tmp_path / "runs" / "rates").glob("protonet-*.json")
    kept = json.loads(place.read_text())
    assert result["methods"]["protonet"]["steps"] == max(1, round(60 * .005 * kept["rate"])) and kept["rate"] > 0
    row = next(r for r in result["rows"] if r["method"] == "protonet")
    assert len(row["seeds"]) == 2 and row["PCK@0.2"][0] == pytest.approx(sum(row["seeds"]) / 2) and row["pairs"] == 120


def test_the_stages_of_escape_share_the_minutes(posezoo_mini, tmp_path):
    more = dict(methods=["protonet", "escape"], shots=[1], warm=3, minutes=.02,
                overrides={"protonet": {"train": TRAIN}, "escape": {"train": TRAIN, "model": {"network": dict(layers=1, dim=16, hidden=16)}}})
    result, said = compare(tmp_path, "staged", **more)
    runs = tmp_path / "runs"
    rates = {n: json.loads(next((runs / "rates").glob(f"{n}-*.json")).read_text())["rate"] for n in ("prototype", "escape")}
    baseline, = runs.glob("prototype-*/result.json")
    place, = runs.glob("escape-*/last.safetensors")
    steps = {"baseline": json.loads(baseline.read_text())["step"]}
    for stage in ("tied", "matching"): steps[stage] = json.loads(next(place.parent.glob(f"{stage}-*/result.json")).read_text())["step"]
    for stage, share in dict(baseline=.3, tied=.5, matching=.2).items():
        assert steps[stage] == max(1, round(60 * .02 * share * rates["escape" if stage == "matching" else "prototype"]))
    assert result["methods"]["escape"]["steps"] == sum(steps.values()) and steps["tied"] > steps["baseline"] > 1
    assert not list(place.parent.glob("baseline-*")) and said.count("escape: measuring its rate") == 1
    before = state(tmp_path)
    again, told = compare(tmp_path, "again", **more)
    assert state(tmp_path) == before and again["rows"] == result["rows"] and "measuring" not in told


def test_the_stages_of_escape_share_steps_where_there_are_no_minutes(posezoo_mini, tmp_path):
    trials = Trials(tmp_path, steps=5, train=TRAIN)
    for model, parts in (({}, dict(baseline=1, tied=1, matching=3)), ({"tied": False}, dict(baseline=2, matching=3))):
        variant = {"method": "escape", "model": {"network": dict(layers=1, dim=16, hidden=16), **model}}
        place, told = trials.train(variant)
        made = {p.parent.name.split("-")[0]: json.loads(p.read_text())["step"] for p in place.glob("*/result.json")}
        assert made == parts and told["step"] == 5


def test_an_unknown_method_is_an_error_before_any_training(tmp_path):
    with pytest.raises(Exception, match="no model is called 'protonett'; did you mean 'protonet'"):
        compare(tmp_path, "wrong", methods=["protonet", "protonett"], overrides={})
    assert not (tmp_path / "runs").exists()


def test_an_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(UnknownParameter, match="no parameter 'method'"): compare(tmp_path, "wrong", method="protonet")


def test_all_methods_begin_from_one_backbone(posezoo_mini, tmp_path):
    result, said = compare(tmp_path, "start", start_steps=2, shots=[1], steps=2)
    start, = (tmp_path / "runs").glob("start-*")
    assert said.count(f"{start.name}: training") == 1 and result["start"]["step"] == 2
    common = load_file(start / "backbone.safetensors")
    begun = cape.load_model(start / "last.safetensors").backbone.state_dict()
    for name, tensor in begun.items():
        if not name.startswith("last."): assert torch.equal(tensor, common[name])
    last = [n for n in common if n.startswith("last.4.")]
    for stride in (8, 16, 32):
        for name in last: assert torch.equal(common[name.replace("last.4.", f"last.{stride}.")], common[name])
    assert last
    for method in METHODS:
        assert result["methods"][method]["model"]["weights"] == str(start / "backbone.safetensors")
        run, = runs_of(tmp_path, method)
        after = cape.load_model(run / "last.safetensors").backbone.state_dict()
        away = max((after[n] - t).abs().max() for n, t in common.items() if n in after and n.endswith("weight"))
        assert 0 < away < .02                               # two small steps from there, and from nowhere else
    with pytest.raises(Exception, match="start_steps is for the small backbone"):
        compare(tmp_path, "large", start_steps=2, preset="paper")


def test_weights_are_shipped_with_the_scores_of_the_rounded(first, tmp_path):
    folder, result, _ = first
    (file, scores), = ship(folder / "runs", folder / "first.json", tmp_path, ["prototype"])
    trained = next(p for p in runs_of(folder, "prototype")) / "last.safetensors"
    kept, exact, model = load_file(file), load_file(trained), cape.load_model(file)
    assert kept.keys() == exact.keys() and file.stat().st_size < .6 * trained.stat().st_size
    for name, tensor in exact.items(): assert torch.equal(kept[name], tensor.half() if tensor.is_floating_point() else tensor)
    test = cape.PoseDataset.load("posezoo", size="mini", split=1, subset="test")
    again = cape.evaluate(model, test, shots=1, episodes=3, queries=2, size=model.meta["size"])
    assert scores["1-shot"]["PCK@0.2"][0] == again.pck[.2] and scores["1-shot"]["fingerprint"] == again.fingerprint
    assert model.meta["novel"] == scores and again.fingerprint == result["fingerprints"]["1-shot"]
