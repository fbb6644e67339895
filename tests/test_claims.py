"The notebook that tests claims, with its smallest parameters: what it writes, what it shares, and that nothing is done twice."
import json

import numpy as np
import pytest
from conftest import ROOT, run_cells
from run_notebook import UnknownParameter, run

from cape.data.annotations import mp100_facts
from cape.errors import ConfigError
from cape.learner import read_log
from cape.published import claims, made_up_report, retest

NOTEBOOK = ROOT / "nbs" / "experiments" / "claims.ipynb"
IDS = ["protonet-cross-vehicle", "escape-map-mle", "escape-escape-mle"]
SMALL = dict(ids=IDS, steps=3, episodes=3, queries=2, train=dict(size=32, batch=4))
NOVEL = {c: mp100_facts()["categories"][c] for c in mp100_facts()["splits"][1]["test"]}


def run_claims(folder, name, kernel=False, **more):
    "One run whose results are in `folder`, by a kernel or in this process: the result, and all that was printed"
    paths = dict(out=str(folder / "runs"), result=str(folder / f"{name}.json"), figure=str(folder / f"{name}.svg"))
    if kernel:
        done = run(NOTEBOOK, folder / f"{name}.ipynb", SMALL | paths | more, 300)
        said = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    else: said = run_cells(NOTEBOOK, **SMALL | paths | more)
    return json.loads((folder / f"{name}.json").read_text()), said


def state(folder):
    "Every file of the runs with the time of its last change"
    return {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def first(posezoo_mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    return folder, *run_claims(folder, "first", kernel=True)


def test_a_verdict_a_claim_with_interval_and_origin(first):
    folder, result, said = first
    assert [c["id"] for c in result["claims"]] == IDS
    for c in result["claims"]:
        known, = claims([c["id"]])
        assert c["published"] == known.difference and c["low"] <= c["difference"] <= c["high"]
        assert c["verdict"] == ("reproduced" if c["low"] > 0 else "opposite" if c["high"] < 0 else "undecided")
        assert c["difference"] == pytest.approx(c["a"] - c["b"], abs=1e-6) and c["seeds"] == [pytest.approx(c["difference"])]
        assert "1 training of each side" in c["covers"] and c["over_seeds"] is None and c["id"] in said
    assert sum(result["verdicts"].values()) == 3
    assert {"commit", "device", "machine", "torch", "python", "cape", "minutes", "train", "test"} <= set(result["provenance"])
    assert "<svg" in (folder / "first.svg").read_text()


def test_a_training_is_shared_and_has_the_steps_that_were_asked_for(first):
    folder, result, said = first
    vehicle, one, two = result["claims"]
    assert vehicle["split"] == "vehicle" and one["split"] == 1
    assert one["runs"]["b"] == two["runs"]["b"] == one["runs"]["a"] and "3 claims need 3 trainings" in said
    assert one["b"] == two["b"] and set(result["runs"]) == {r for c in result["claims"] for names in c["runs"].values() for r in names}
    assert all(r["step"] == 3 for r in result["runs"].values())
    assert read_log(folder / "runs" / vehicle["runs"]["a"][0])[-1]["step"] == 3


def test_a_second_run_does_nothing_again(first):
    folder, result, said = first
    before = state(folder)
    again, told = run_claims(folder, "again")
    assert state(folder) == before and again["claims"] == result["claims"]
    assert "evaluation\n" in said and ": training\n" in said and "evaluation\n" not in told and ": training\n" not in told


def test_another_run_finds_what_it_can_use_and_makes_the_rest(first):
    folder, result, _ = first
    gone = next(p for p in (folder / "runs").glob("protonet-*/report-*.json"))
    kept = gone.read_text()
    gone.unlink()                                                     # killed between its two reports
    before = state(folder)
    more, told = run_claims(folder, "more", ids=IDS[:2], seeds=[0, 1])    # and a seed more
    assert gone.read_text().split('"arrays"')[1] == kept.split('"arrays"')[1]
    assert {p: t for p, t in state(folder).items() if p in before} == before
    assert told.count(": training\n") == 3 and more["claims"][0]["seeds"][0] == pytest.approx(result["claims"][0]["difference"])
    for c in more["claims"]:
        assert len(c["seeds"]) == 2 and c["difference"] == pytest.approx(np.mean(c["seeds"]))
        assert "2 trainings of each side" in c["covers"] and c["over_seeds"][0] < c["difference"] < c["over_seeds"][1]


def test_equal_minutes_by_a_rate_that_is_kept(posezoo_mini, tmp_path):
    result, _ = run_claims(tmp_path, "timed", ids=["pomnet-protonet-1"], minutes=.002, warm=3)
    rates = {p.name.split("-")[0]: json.loads(p.read_text())["rate"] for p in (tmp_path / "runs" / "rates").glob("*.json")}
    steps = {name.split("-")[0]: r["step"] for name, r in result["runs"].items()}
    assert steps == {m: max(1, round(60 * .002 * rate)) for m, rate in rates.items()} and set(steps) == {"pomnet", "protonet"}


@pytest.mark.parametrize("more, said", [
    (dict(ids=["escape-mapmle"]), "no claim 'escape-mapmle'; did you mean 'escape-map-mle'"),
    (dict(ids=["escape-dift"]), "claim escape-dift cannot be run: needs pre-trained Stable Diffusion"),
    (dict(ids=[]), "nothing to test"),
    (dict(train={"steps": 5}), "train: steps is set by other parameters")])
def test_what_cannot_be_tested_is_an_error_before_any_training(tmp_path, more, said):
    with pytest.raises(ConfigError, match=said): run_claims(tmp_path, "wrong", **more)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(UnknownParameter, match="no parameter 'claim'"): run_claims(tmp_path, "wrong", claim="escape-map-mle")


# verdicts on made-up reports

def reports(right, seeds, start=0): return [made_up_report(right, NOVEL, seed=start + i) for i in range(seeds)]


@pytest.mark.parametrize("a, b, word", [(.8, .7, "reproduced"), (.6, .7, "opposite"), (.7, .7, "undecided")])
def test_three_verdicts(a, b, word):
    found = retest(claims(["capeformer-identifier"])[0], reports(a, 2), reports(b, 2, 50))
    assert found["verdict"] == word and found["difference"] == pytest.approx(100 * (a - b), abs=3)
    assert found["published"] == 3.64 and len(found["seeds"]) == 2
    if word != "undecided": assert found["same_sign"] == 2


def test_seeds_are_pooled_by_picture_and_not_taken_for_more_pictures():
    claim = claims(["capeformer-identifier"])[0]
    one, four = (retest(claim, reports(.72, 1) * n, reports(.7, 1, 50) * n) for n in (1, 4))
    assert four["low"] == pytest.approx(one["low"]) and four["high"] == pytest.approx(one["high"])     # the same training four times: no news
    assert four["pairs"] == one["pairs"] and four["covers"].endswith("for 4 trainings of each side")


def test_the_order_of_the_sides_counts():
    claim = claims(["capeformer-identifier"])[0]
    ahead, behind = (retest(claim, *sides) for sides in ((reports(.8, 1), reports(.7, 1, 9)), (reports(.7, 1, 9), reports(.8, 1))))
    assert ahead["difference"] == pytest.approx(-behind["difference"]) and (ahead["verdict"], behind["verdict"]) == ("reproduced", "opposite")


def test_reports_of_other_pairs_or_numbers_are_refused():
    claim = claims(["capeformer-identifier"])[0]
    with pytest.raises(ConfigError, match="2 reports of a and 1 of b"): retest(claim, reports(.8, 2), reports(.7, 1))
    other = [made_up_report(.7, NOVEL, fingerprint="1")]
    with pytest.raises(ConfigError, match="not scored on the same pairs"): retest(claim, reports(.8, 1), other)
