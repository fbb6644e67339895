"The example that a newcomer runs, with its smallest parameters: it must end, and leave what it promises."
import json

import pytest
from conftest import ROOT, run_cells
from run_notebook import run

DEMO = ROOT/"nbs"/"experiments"/"demo.ipynb"
SMALL = dict(size="mini", preset="tiny", steps=20)


@pytest.fixture(scope="module")
def demo(tmp_path_factory, posezoo_mini):
    out = tmp_path_factory.mktemp("demo")
    run(DEMO, out/"demo.ipynb", SMALL | dict(episodes=3, queries=2, out=str(out/"run"), figures=str(out)))
    return out


def test_it_leaves_pictures_and_numbers(demo):
    for name in ("demo_a.png", "demo_b.png", "demo_curves.png", "demo_categories.png"): assert (demo/name).stat().st_size > 10_000
    result = json.loads((demo/"run"/"demo.json").read_text())
    assert set(result["pck"]) == {"1-shot", "5-shot"}
    for reports in result["pck"].values():
        assert set(reports) == {"copy the support", "mean pose", "untrained network", "prototype baseline", "posezoo/capeformer"}
        for score in reports.values():
            for mean, low, high in score.values(): assert 0 <= low <= mean <= high <= 1


def test_a_second_run_trains_nothing_again(demo):
    log = (demo/"run"/"log.jsonl").read_text()
    run_cells(DEMO, **SMALL, episodes=1, queries=1, out=str(demo/"run"), figures=str(demo))
    assert (demo/"run"/"log.jsonl").read_text() == log


def test_networks_of_the_package_are_left_out_where_they_know_the_categories(demo):
    said = run_cells(DEMO, **SMALL | dict(split=2, steps=2), episodes=1, queries=1, out=str(demo/"other"), figures=str(demo/"f"))
    assert "none is tested here" in said and "posezoo/" not in (demo/"other"/"demo.json").read_text()
