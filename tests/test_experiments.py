"The experiments: quick runs of `ablate` and `cross_super_category`, a kill of `compare`, what a full run must reach, and full runs on a GPU."
import copy
import json
import os
import re
import signal
import subprocess
import sys
from math import nan

import nbformat
import pytest
import torch
from conftest import ROOT, run_cells
from run_notebook import UnknownParameter, check_parameters, run

from cape.learner import Learner
from cape.published import published

FOLDER = ROOT / "nbs" / "experiments"
SMALL = dict(steps=2, episodes=2, queries=2, train=dict(size=32, batch=4))
TESTED = dict(ablate="test_experiments", cross_super_category="test_experiments", claims="test_claims", compare="test_compare",
              demo="test_demo", escape="test_escape", speed="test_speed_notebook", train="test_train")
ORIGIN = {"commit", "device", "machine", "threads", "torch", "numpy", "python", "cape", "minutes"}


def parameters(notebook): return next(c for c in json.loads((FOLDER / f"{notebook}.ipynb").read_text())["cells"]
                                      if "parameters" in c["metadata"].get("tags", []))["source"]


def known(notebook): return {line.split(":")[0] for line in parameters(notebook)}


def places(notebook, folder):
    "Where a notebook is told to write, and the file of its result"
    if notebook == "demo": return dict(out=str(folder / "runs"), figures=str(folder)), folder / "runs" / "demo.json"
    file = folder / f"{notebook}.json"
    if notebook == "speed": return dict(out=str(file), figure=str(folder / "speed.svg")), file
    figure = dict(figure=str(folder / f"{notebook}.svg")) if "figure" in known(notebook) else {}
    return dict(out=str(folder / "runs"), result=str(file), **figure), file


def quick(folder, notebook, small=SMALL, **params):
    "One run in this process with results in `folder`: the result, and all that was printed"
    paths, file = places(notebook, folder)
    said = run_cells(FOLDER / f"{notebook}.ipynb", **{**small, **paths, **params})
    return json.loads(file.read_text()), said


def execute(folder, notebook, timeout=300, **params):
    "The same in a kernel, as users run it"
    paths, file = places(notebook, folder)
    done = run(FOLDER / f"{notebook}.ipynb", folder / f"{notebook}.ipynb", {**params, **paths}, timeout)
    said = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    return json.loads(file.read_text()), said


def state(folder): return {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}


def test_every_experiment_is_run_by_a_test_and_has_no_other_parameters():
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {*TESTED}
    for name, file in TESTED.items():
        assert f"{name}" in (ROOT / "tests" / f"{file}.py").read_text()
        with pytest.raises(UnknownParameter, match=f"{name}.ipynb has no parameter 'sped'; it has .*seed"):
            check_parameters(FOLDER / f"{name}.ipynb", dict(sped=1))


@pytest.fixture(scope="module")
def padding(posezoo_mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    return folder, *execute(folder, "ablate", **SMALL, name="padding")


def test_rows_of_an_ablation_with_paired_tests(padding):
    folder, result, said = padding
    assert {r["row"] for r in result["rows"]} == {"mixup", "mixup, zero at test", "zero", "copy the support", "mean pose"}
    assert [(t["row"], t["metric"]) for t in result["tests"]] == [
        (row, metric) for row in ("mixup, zero at test", "zero") for metric in ("PCK@0.2", "PCK@0.05", "mPCK")]
    score = {r["row"]: r["PCK@0.2"] for r in result["rows"]}
    for t in result["tests"]:
        assert t["against"] == "mixup" and t["low"] <= t["difference"] <= t["high"]
        assert t["verdict"] == ("better" if t["low"] > 0 else "worse" if t["high"] < 0 else "undecided")
        if t["metric"] == "PCK@0.2": assert t["difference"] == pytest.approx(score[t["row"]][0] - score["mixup"][0], abs=1e-6)
    assert len(list((folder / "runs").glob("fmmp-*/last.safetensors"))) == 2      # what is set at test shares a training
    assert ORIGIN | {"train", "test"} <= set(result["provenance"]) and "seed" in result["parameters"] and "points" in said
    assert f"pairs {result['fingerprints']['1-shot']}" in said


def test_an_ablation_that_is_done_is_read(padding):
    folder, result, _ = padding
    before = state(folder)
    again, told = quick(folder, "ablate", name="padding")
    assert state(folder) == before and again["rows"] == result["rows"] and ": training" not in told and "evaluation" not in told


def test_links_of_three_kinds_are_three_trainings(posezoo_mini, tmp_path):
    quick(tmp_path, "ablate", name="links")
    files = list((tmp_path / "runs").glob("fmmp-*/last.safetensors"))
    assert len(files) == 3 == len({f.read_bytes() for f in files})                # the network does look at the links


def test_a_table_of_a_paper_is_an_ablation(posezoo_mini, tmp_path):
    result, said = quick(tmp_path, "ablate", name="capeformer-5", episodes=1, queries=1, train=dict(size=32, batch=2))
    kinds = [v["variant"].get("model", {}).get("identifier", "fixed") for v in result["trainings"].values()]
    assert kinds[0] == "fixed" and {*kinds} == {"fixed", "learned", "none"}


def test_what_there_is_not(tmp_path):
    with pytest.raises(Exception, match="no ablation 'linkz'; did you mean 'links'"): quick(tmp_path, "ablate", name="linkz")
    with pytest.raises(Exception, match="supers: some of human body"): quick(tmp_path, "cross_super_category", supers=["cars"])
    assert not (tmp_path / "runs").exists()


def test_across_super_categories_and_nothing_again(posezoo_mini, tmp_path):
    more = dict(methods=["protonet"], supers=["vehicle", "furniture"])
    result, said = execute(tmp_path, "cross_super_category", **SMALL, **more)
    assert {(r["without"], r["method"]) for r in result["rows"]} == {
        (w, m) for w in ("vehicle", "furniture") for m in ("protonet", "copy the support", "mean pose")}
    assert len({*result["fingerprints"].values()}) == 2 and ORIGIN <= set(result["provenance"]) and "seed" in result["parameters"]
    row, = (r for r in published(paper="pomnet", table="2") if (r.label, r.split) == ("POMNet", "vehicle"))
    assert f"{row.value:.2f}" in said and ": training" in said and "evaluation" in said
    before = state(tmp_path)
    again, told = quick(tmp_path, "cross_super_category", **more)
    assert state(tmp_path) == before and again["rows"] == result["rows"] and ": training" not in told and "evaluation" not in told


# ---- killed: this file is also the script that is killed

KILLED = dict(methods=["protonet", "prototype"], steps=4, shots=[1], episodes=2, queries=1,
              overrides={m: {"train": dict(size=32, batch=2, save_every=1)} for m in ("protonet", "prototype")})


def main(folder):
    "`compare` in a process that is killed in the third step of the second method, after the first one has finished"
    record = Learner._record
    def record_or_die(self, *args):
        if (self.model.name, self.step) == ("prototype", 3): os.kill(os.getpid(), signal.SIGKILL)
        record(self, *args)
    Learner._record = record_or_die
    run_cells(FOLDER / "compare.ipynb", **KILLED, **json.loads(folder))


def test_compare_killed_by_force_ends_with_the_same_table(posezoo_mini, tmp_path):
    whole, _ = quick(tmp_path / "whole", "compare", KILLED)
    paths, file = places("compare", tmp_path / "parts")
    died = subprocess.run([sys.executable, __file__, json.dumps(paths)], timeout=300, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert died.returncode == -signal.SIGKILL and not file.exists(), died.stderr[-2000:]
    before = {p: t for p, t in state(tmp_path / "parts").items() if p.parent.name.startswith("protonet-")}
    rest, said = quick(tmp_path / "parts", "compare", KILLED)
    assert "goes on at step 2 of 4" in said and said.count(": training\n") == 1             # the second method's, from where it was
    assert before and {p: t for p, t in state(tmp_path / "parts").items() if p in before} == before
    assert rest["rows"] == whole["rows"] and rest["tests"] == whole["tests"] and rest["fingerprints"] == whole["fingerprints"]


# ---- full runs: what a recorded run makes credible

MARGIN = .05  # how far a trained row may lie below its recorded 95 % interval, and a difference outside of it: another training, another device
SAME = .001   # how far a control may lie from its recorded value: it trains nothing, and the pairs are the same
RATIO = .5    # what is left at least of the recorded gain by the cache, on another machine
CONTROLS = ("copy the support", "mean pose")
RECORDED = {p.stem: r for p in sorted((ROOT / "figures" / "results").glob("*.json")) if "parameters" in (r := json.loads(p.read_text()))}


def scores(result):
    "Row -> metric -> [mean, low, high]"
    if "pck" in result: return {(n, name): {f"PCK@{t}": v for t, v in by.items()} for n, rows in result["pck"].items() for name, by in rows.items()}
    return {tuple(r[k] for k in ("without", "shots", "method", "row") if k in r): {m: v for m, v in r.items() if "PCK" in m}
            for r in result.get("rows", [])}


def differences(result):
    "What was compared -> difference, low, high, as shares"
    found = {(t["shots"], t["row"], t["metric"]): (t, 1) for t in result.get("tests", []) if "row" in t}
    found |= {c["id"]: (c, 100) for c in result.get("claims", [])}
    return {name: [t[k] / unit for k in ("difference", "low", "high")] for name, (t, unit) in found.items()}


def fallen(recorded, now):
    "What a full run lost against the recorded one, a line each; nothing where it is as good as that makes credible"
    pairs = lambda r: [r.get("fingerprints"), [c.get("fingerprint") for c in r.get("claims", [])]]
    lost = [] if pairs(recorded) == pairs(now) else ["scored on other pairs"]
    rows, moves, ratios = scores(now), differences(now), now.get("ratios", {})
    for row, metrics in scores(recorded).items():
        for metric, (mean, low, _) in metrics.items():
            value, control = rows.get(row, {}).get(metric, [nan])[0], row[-1] in CONTROLS
            fine = abs(value - mean) <= SAME if control else value >= low - MARGIN
            if not fine: lost.append(f"{row}, {metric}: {value:.3f}, recorded {mean:.3f} and at the least {low:.3f}")
    for name, (_, low, high) in differences(recorded).items():
        value = moves.get(name, [nan])[0]
        if not low - MARGIN <= value <= high + MARGIN: lost.append(f"{name}: difference {value:+.3f}, recorded [{low:+.3f}, {high:+.3f}]")
    for name, r in recorded.get("ratios", {}).items():
        value = ratios.get(name, {}).get("ratio", nan)
        if name.startswith("evaluation") and not value >= RATIO * r["low"]: lost.append(f"{name}: {value:.2f} times, recorded {r['low']:.2f}")
    if "equal_answers" in recorded and not now["equal_answers"]["equal"]: lost.append("the cache gives other answers")
    return lost


def steps_of(recorded):
    "The most steps that any training had"
    return max([t["steps"] for k in ("methods", "trainings") for t in recorded.get(k, {}).values()]
               + [t["step"] for t in recorded.get("runs", {}).values()])


def full(name):
    "Notebook and parameters of a recorded run; steps in place of minutes, which are worth more on a faster device"
    recorded = RECORDED[name]
    notebook, given = recorded.get("experiment", "demo"), dict(recorded["parameters"])
    if recorded["parameters"].get("minutes"): given |= dict(steps=steps_of(recorded), **({"minutes": 0.0} if "minutes" in given else {}))
    return notebook, given


def lowered(result, by, only=None):
    "`result` with the scores of all rows, or of one, lower by `by`"
    made = copy.deepcopy(result)
    for row, metrics in scores(made).items():
        for value in metrics.values() if only in (None, row) else (): value[0] -= by
    return made


def test_experiments_have_recorded_runs_with_their_origin():
    assert {*TESTED} == {full(name)[0] for name in RECORDED}
    for name, r in RECORDED.items():
        if name == "demo": continue                                                       # has a form of its own
        assert ORIGIN - {"machine"} <= set(r["provenance"]) and "seed" in r["parameters"], name
        pairs = r.get("fingerprints") or {c["id"]: c.get("fingerprint") for c in r.get("claims", [])} or {"data": r["provenance"].get("data")}
        assert pairs and all(pairs.values()), name


@pytest.mark.parametrize("name", RECORDED)
def test_a_full_run_begins_and_a_worse_result_is_found(name):
    notebook, given = full(name)
    recorded = RECORDED[name]
    assert check_parameters(FOLDER / f"{notebook}.ipynb", given) == given
    assert fallen(recorded, recorded) == []
    rows = scores(recorded)
    trained = [row for row in rows if row[-1] not in CONTROLS]
    for row in trained:
        gap = min(mean - low for mean, low, _ in rows[row].values())
        assert fallen(recorded, lowered(recorded, gap + MARGIN - 1e-6, row)) == []
        one, *_ = fallen(recorded, lowered(recorded, gap + MARGIN + 1e-6, row))
        assert str(row) in one and "recorded" in one
    if rows:
        assert len(fallen(recorded, lowered(recorded, 1))) == sum(map(len, rows.values()))
        assert len(fallen(recorded, lowered(recorded, nan))) == sum(map(len, rows.values()))
        assert fallen(recorded, {**recorded, "rows": [], "pck": {}} if "pck" in recorded else {**recorded, "rows": []})
        assert "other pairs" in fallen(recorded, {**recorded, "fingerprints": {"1-shot": "1"}, "claims": []})[0]
    controls = [row for row in rows if row[-1] in CONTROLS]
    assert all(len(fallen(recorded, lowered(recorded, by, row))) == len(rows[row]) for row in controls for by in (.01, -.01))


@pytest.mark.parametrize("name", [n for n in RECORDED if n != "demo"])
def test_an_executed_notebook_lies_beside_its_result(name):
    "With the recorded parameters and scores, whole, without errors and without folders of the machine"
    nb = nbformat.read(ROOT / "figures" / "results" / f"{name}.ipynb", 4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    given, = (c for c in code if "injected-parameters" in c.metadata.get("tags", []))
    exec(given.source, values := {})
    shared = {k: values[k] for k in RECORDED[name]["parameters"] if k in values}
    assert len(shared) > 3 and shared == {k: RECORDED[name]["parameters"][k] for k in shared}
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"] and f"{name}.json" in outputs[-1].text
    said = "".join(o.get("text", "") for o in outputs)
    for row, metrics in scores(RECORDED[name]).items():
        for mean, *_ in metrics.values(): assert f"{mean:.3f}" in said, (row, mean)
    for _, (d, *_) in differences(RECORDED[name]).items(): assert f"{100 * d:+.2f}" in said or f"{d:+.3f}" in said
    assert not re.findall(r"(?<![\w./])/(?:work|home|root|tmp|Users|var)/\S*", said)


def test_worse_differences_ratios_and_answers_are_found():
    moved = copy.deepcopy(RECORDED["ablate-links"])
    for by, lost in ((-MARGIN, 0), (-2 * MARGIN, 1), (2 * MARGIN, 1)):
        moved["tests"][0]["difference"] = RECORDED["ablate-links"]["tests"][0]["difference"] + by
        assert len(fallen(RECORDED["ablate-links"], moved)) == lost
    claim = dict(id="one", difference=3., low=1., high=5., fingerprint="f")
    at = lambda value: fallen(dict(claims=[claim]), dict(claims=[{**claim, "difference": value}]))
    assert at(-3.9) == at(9.9) == [] and len(at(-4.1)) == len(at(10.1)) == 1 and "one" in at(-4.1)[0]
    speed = RECORDED["speed"]
    slow = {**speed, "ratios": {n: {**r, "ratio": r["low"] * .4} for n, r in speed["ratios"].items()}}
    assert len(fallen(speed, slow)) == sum(n.startswith("evaluation") for n in speed["ratios"]) > 0
    assert fallen(speed, {**speed, "equal_answers": {**speed["equal_answers"], "equal": False}}) == ["the cache gives other answers"]


def test_the_form_of_recorded_runs_is_that_of_todays(padding):
    _, result, _ = padding
    assert set(scores(result)) == set(scores(RECORDED["ablate-padding"])) and set(differences(result)) == set(differences(RECORDED["ablate-padding"]))
    assert fallen(result, result) == [] and fallen(RECORDED["ablate-padding"], result)     # two steps are not enough


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; on processor cores the recorded runs take hours")
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", RECORDED)
def test_full_run(name, posezoo_mini, tmp_path):
    "The recorded run again: no trained row more than .05 below its recorded interval, controls the same, half of the caches' gain"
    notebook, given = full(name)
    result, _ = execute(tmp_path, notebook, timeout=4 * 3600, **given)
    lost = fallen(RECORDED[name], result)
    assert not lost, "\n".join(lost)


if __name__ == "__main__": main(*sys.argv[1:])
