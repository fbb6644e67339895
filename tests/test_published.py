"The papers' numbers and claims as data: that they are whole, from somewhere, and can be run; reports beside them."
import json
from importlib.resources import files

import pytest

from cape.data.annotations import PoseDataset, mp100_facts
from cape.errors import ConfigError
from cape.evaluation import evaluate
from cape.metrics import MPCK_THRESHOLDS
from cape.models.base import create_model, list_models, model_class
from cape.published import (
    beside, claims, disagreements, made_up_report, method_chart, method_table, mp100_split, papers, possible_mean, published, recount,
    restate, verdict,
)

RAW = json.loads(files("cape.data").joinpath("published.json").read_text())
FIVE = ("pomnet", "capeformer", "escape", "sdpnet", "fmmp")
TABLES = {"pomnet": "1234", "capeformer": "123456", "escape": "123", "sdpnet": "12345", "fmmp": "1234"}


def novel(split): return {c: mp100_facts()["categories"][c] for c in mp100_facts()["splits"][split]["test"]}


# the tables

def test_every_result_table_of_the_five_papers_is_there():
    for paper, tables in TABLES.items():
        assert {t["table"] for t in RAW["tables"] if t["paper"] == paper} == set(tables)


def test_rows_are_as_long_as_their_columns_and_labels_are_unique():
    for t in RAW["tables"]:
        labels = [r[0] for r in t["rows"]]
        assert len(set(labels)) == len(labels), t["title"]
        for row in t["rows"]: assert len(row[3]) == len(t["columns"]), (t["title"], row[0])


def test_values_are_percent_and_every_row_says_where_it_stands():
    for r in published(copies=True):
        if r.metric == "mpck" or isinstance(r.metric, float): assert 0 < r.value < 100 and r.split is not None
        assert r.paper in papers() and r.source.endswith(r.table) and r.shots in (1, 3, 5)
        assert not r.name or r.name in RAW["methods"].values()
    assert {r.metric for r in published(copies=True) if isinstance(r.metric, float)} == {*MPCK_THRESHOLDS}


def test_names_of_methods_are_ours():
    assert set(RAW["methods"].values()) <= {*list_models(), "sdpnet", "fmmp", "graphcape", "escape"}


@pytest.mark.parametrize("method, metric, shots, split, value", [      # read again from the print, one a table
    ("MAML", .2, 5, 4, 64.79), ("Fine-tune", .2, 1, "human face", 25.53), ("POMNet", .2, 1, 3, 78.17), ("CapeFormer", .2, 1, 2, 84.88),
    ("CapeFormer", .2, 1, "vehicle", 45.40), ("ESCAPE", .2, 5, 3, 85.33), ("FMMP", "mpck", 5, 4, 77.13), ("GraphCape", .05, 1, 1, 48.55),
    ("MetaPoint", .15, 1, 1, 85.81)])
def test_values_against_the_print(method, metric, shots, split, value):
    rows = published(method=method, variant="", metric=metric, shots=shots, split=split)
    assert any(r.value == value for r in rows if r.paper in FIVE)


def test_copies_are_left_out_unless_asked_for():
    kept, every = published(), published(copies=True)
    assert len(kept) < len(every) and len({(r.method, r.variant, r.backbone, r.metric, r.shots, r.split, r.value) for r in every}) == len(kept)
    assert {r.paper for r in published(method="POMNet", metric=.2, shots=5)} == {"pomnet"}


@pytest.mark.parametrize("wanted, said", [({"shots": 2}, "no table has shots=2; there are 1, 5, 3"), ({"papre": 1}, "no field 'papre'"),
                                          ({"metric": .3}, "no table has metric=0.3")])
def test_what_no_table_has_is_an_error(wanted, said):
    with pytest.raises(ConfigError, match=said): published(**wanted)


def test_means_are_recounted_without_loss():
    assert possible_mean([84.23, 78.25, 78.17, 78.68, 79.17], 79.70) and not possible_mean([84.23, 78.25, 78.17, 78.68, 79.17], 79.71)
    found = [(r.paper, r.label, r.shots, ok) for r, _, ok in recount()]
    assert len(found) > 70 and [f[:3] for f in found if not f[3] and f[0] in FIVE] == [("escape", "ESCAPE", 5)]
    assert {p for p, *_ in found} >= {"pomnet", "capeformer", "escape", "sdpnet", "fmmp"}


def test_a_changed_digit_is_found(monkeypatch):
    import cape.published as module
    spoilt = json.loads(json.dumps(RAW))
    next(t for t in spoilt["tables"] if (t["paper"], t["table"]) == ("fmmp", "1"))["rows"][0][3][1] += .5
    monkeypatch.setattr(module, "_raw", lambda: spoilt)
    module._rows.cache_clear()
    try: assert ("fmmp", "POMNet") in [(r.paper, r.label) for r, _, ok in recount() if not ok]
    finally: module._rows.cache_clear()


def test_sentences_that_do_not_follow_from_their_tables():
    wrong = {(t["paper"], t["said"]) for t in restate() if not t["agrees"]}
    assert wrong == {("pomnet", "58.46"), ("capeformer", "1.36"), ("fmmp", "1.06")}


def test_sources_that_disagree():
    found = {(some[0].method, some[0].variant) for some in disagreements(1)}
    assert found == {("CapeFormer", "no identifiers"), ("prototype baseline", "")}


def test_tables_and_pictures_hold_methods_and_controls():
    text = str(method_table())
    for word in ("copy the support", "mean pose", "ProtoNet", "SDPNet", "85.31"): assert word in text
    fig = method_chart()
    lines = [line for line in fig.axes[0].lines if len(set(line.get_xdata())) == 1]
    assert len(lines) >= 2 and "ProtoNet" in [t.get_text() for t in fig.axes[0].get_yticklabels()]


@pytest.mark.parametrize("split", [1, 4])
def test_controls_are_those_of_the_annotations(shared, split):
    data = PoseDataset.load(shared / "mp100" / "annotations" / f"mp100_split{split}_test.json.gz", images=False)
    report = evaluate(create_model("copy"), data, shots=1, protocol="official", size=256, progress=False)
    for metric in (.05, .2):
        kept, = published(paper="cape", method="copy the support", metric=metric, shots=1, split=split)
        assert 100 * report.value(metric) == pytest.approx(kept.value, abs=.006)
    assert mp100_split(report) == split and "> copy" in str(beside(report))


# beside a report

def test_a_report_on_mp100_stands_among_the_published():
    found = beside(made_up_report(.8, novel(3)), name="mine")
    values = [float(r[1]) for r in found.rows]
    assert values == sorted(values, reverse=True) and sum("> mine" in r[0] for r in found.rows) == 1
    printed = {r.value for r in published(metric=.2) if (r.shots, r.split, r.variant) == (1, 3, "")}
    assert {*values} >= printed and "split 3, 1-shot" in str(found) and "Not the papers'" not in str(found)
    assert any("no identifiers" in r[0] for r in beside(made_up_report(.8, novel(3)), variants=True).rows)


def test_what_differs_from_the_papers_is_said():
    told = str(beside(made_up_report(.8, novel(3), protocol="cape", size=96)))
    assert "protocol is 'cape'" in told and "size is 96" in told


def test_other_data_get_no_table(posezoo_mini):
    zoo = {c: posezoo_mini.categories[c] for c in mp100_facts()["splits"][1]["test"]}
    assert [k.name for k in zoo.values()] == [k.name for k in novel(1).values()]   # PoseZoo has MP-100's names,
    assert beside(made_up_report(.8, zoo)) is None                                 # but it is not MP-100
    some = dict(list(novel(1).items())[:-1])
    assert mp100_split(made_up_report(.8, novel(1))) == 1 and beside(made_up_report(.8, some)) is None
    cross = {c: mp100_facts()["categories"][c] for c in mp100_facts()["cross"]["vehicle"]["test"]}
    assert mp100_split(made_up_report(.8, cross)) == "vehicle" and "45.40" in str(beside(made_up_report(.8, cross)))


# claims

def test_claims_are_of_tables_and_the_first_side_is_higher():
    assert len(claims()) >= 40 and len(claims(runnable=True)) >= 40
    for c in claims():
        assert c.difference > 0 and c.statement and bool(c.reason) == (c.ours is None), c.id
        assert c.cell("a").table == c.cell("b").table == c.table and c.cell("a") != c.cell("b")
    assert {c.paper for c in claims()} >= set(FIVE)
    assert claims(["escape-map-mle"])[0].difference == .88


def test_every_ablation_table_has_claims():
    with_claims = {(c.paper, c.table) for c in claims()}
    for paper, tables in TABLES.items(): assert {(paper, t) for t in tables} <= with_claims | {("fmmp", "2")}


def ours():
    "Every different side of a claim"
    sides = {json.dumps(s, sort_keys=True) for c in claims(runnable=True) for s in c.ours.values()}
    return [json.loads(s) for s in sorted(sides)]


@pytest.mark.parametrize("side", ours(), ids=lambda s: "-".join([s["method"], *map(str, s.get("model", {})), *map(str, s.get("test", {}))]))
def test_every_side_can_be_built(side):
    assert set(side) <= {"method", "model", "train", "test", "links"} and set(side.get("train", {})) <= {"shots"}
    if side["method"] not in list_models(): pytest.skip(f"{side['method']} is not there")
    model = create_model(side["method"], **side.get("model", {}), **side.get("test", {}))
    assert isinstance(model, model_class(side["method"])) and sum(p.numel() for p in model.parameters()) > 0


def test_sides_of_a_claim_differ():
    for c in claims(runnable=True): assert c.ours["a"] != c.ours["b"], c.id


def test_options_set_after_training_leave_the_weights_alone():
    import torch
    for side in ours():
        if not side.get("test") or side["method"] not in list_models(): continue
        one = create_model(side["method"], **side.get("model", {}))
        other = create_model(side["method"], **side.get("model", {}), **side["test"])
        other.load_state_dict(one.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_unknown_claims_and_papers_are_errors():
    with pytest.raises(ConfigError, match="did you mean 'fmmp-mixup'"): claims(["fmmp-mixups"])
    with pytest.raises(ConfigError, match="no claims of paper 'scape'"): claims(paper="scape")


def test_an_interval_decides():
    assert [verdict(.01, .2), verdict(-.2, -.01), verdict(-.2, .2), verdict(0, .2), verdict(float("nan"), .2)] == [
        "reproduced", "opposite", "undecided", "undecided", "undecided"]
