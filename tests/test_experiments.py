"The experiments: quick runs of `ablate` and `cross_super_category` here, full ones on a GPU; the others have files of their own."
import json

import pytest
from conftest import ROOT
from run_notebook import UnknownParameter, run

from cape.published import published

FOLDER = ROOT / "nbs" / "experiments"
SMALL = dict(steps=2, episodes=2, queries=2, train=dict(size=32, batch=4))
TESTED = dict(ablate="test_experiments", cross_super_category="test_experiments", claims="test_claims", compare="test_compare",
              demo="test_demo", escape="test_escape", speed="test_speed_notebook", train="test_train")


def execute(folder, notebook, small=SMALL, timeout=300, **params):
    "One run with results in `folder`: the result, and all that was printed"
    paths = dict(out=str(folder / "runs"), result=str(folder / f"{notebook}.json"))
    done = run(FOLDER / f"{notebook}.ipynb", folder / f"{notebook}.ipynb", small | paths | params, timeout)
    said = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    return json.loads((folder / f"{notebook}.json").read_text()), said


def state(folder): return {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}


def test_every_experiment_is_run_by_a_test():
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {*TESTED}
    for name, file in TESTED.items(): assert f"{name}" in (ROOT / "tests" / f"{file}.py").read_text()


@pytest.fixture(scope="module")
def padding(posezoo_mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    return folder, *execute(folder, "ablate", name="padding")


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
    assert {"commit", "device", "machine", "torch", "minutes", "train", "test"} <= set(result["provenance"]) and "points" in said


def test_an_ablation_that_is_done_is_read(padding):
    folder, result, _ = padding
    before = state(folder)
    again, told = execute(folder, "ablate", name="padding")
    assert state(folder) == before and again["rows"] == result["rows"] and ": training" not in told and "evaluation" not in told


def test_links_of_three_kinds_are_three_trainings(posezoo_mini, tmp_path):
    execute(tmp_path, "ablate", name="links")
    files = list((tmp_path / "runs").glob("fmmp-*/last.safetensors"))
    assert len(files) == 3 == len({f.read_bytes() for f in files})                # the network does look at the links


def test_a_table_of_a_paper_is_an_ablation(posezoo_mini, tmp_path):
    result, said = execute(tmp_path, "ablate", name="capeformer-5", train=dict(size=32, batch=2))
    kinds = [v["variant"].get("model", {}).get("identifier", "fixed") for v in result["trainings"].values()]
    assert kinds[0] == "fixed" and {*kinds} == {"fixed", "learned", "none"}


def test_what_there_is_not(tmp_path):
    with pytest.raises(Exception, match="no ablation 'linkz'; did you mean 'links'"): execute(tmp_path, "ablate", name="linkz")
    with pytest.raises(Exception, match="supers: some of human body"): execute(tmp_path, "cross_super_category", supers=["cars"])
    with pytest.raises(UnknownParameter, match="no parameter 'shot'"): execute(tmp_path, "ablate", shot=1)
    assert not (tmp_path / "runs").exists()


def test_across_super_categories(posezoo_mini, tmp_path):
    result, said = execute(tmp_path, "cross_super_category", methods=["protonet"], supers=["vehicle", "furniture"])
    assert {(r["without"], r["method"]) for r in result["rows"]} == {
        (w, m) for w in ("vehicle", "furniture") for m in ("protonet", "copy the support", "mean pose")}
    assert len({*result["fingerprints"].values()}) == 2
    known, = (r for r in published(paper="pomnet", table="2") if (r.label, r.split) == ("POMNet", "vehicle"))
    assert f"{known.value:.2f}" in said


@pytest.mark.gpu
@pytest.mark.timeout(4 * 3600)
def test_the_main_table_again(tmp_path):
    "The recorded comparison, run again: no trained method falls more than .05 below its recorded interval"
    recorded = json.loads((ROOT / "figures" / "results" / "compare.json").read_text())
    steps = {about["steps"] for about in recorded["methods"].values()}
    more = {**recorded["parameters"], "minutes": 0.0, "steps": max(steps)}        # at least as long as any of them
    result, _ = execute(tmp_path, "compare", small=more, timeout=4 * 3600, figure=str(tmp_path / "compare.svg"))
    low = {(r["shots"], r["method"]): r["PCK@0.2"][1] for r in recorded["rows"]}
    for row in result["rows"]:
        assert row["PCK@0.2"][0] > low[row["shots"], row["method"]] - .05, (row["method"], row["shots"])
