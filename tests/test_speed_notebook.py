"The notebook that measures speed: what it writes, and that both ways of evaluating give the same answers; never a speed."
import json
import math

import pytest
from conftest import ROOT
from run_notebook import run

SMALLEST = dict(ways=["escape"], supers=20, methods=["protonet"], bf16_methods=["protonet"], compile="aot_eager", method_size=32, method_batches=[1, 2], method_step=2, keypoints=5, cases=[[0, 2], [4, 2]], uncached_episodes=1, categories=1, images=8, crop_sizes=[32], size=32, preset="tiny",
                steps=1, repeats=2, seconds=0.01, threads=1)


@pytest.fixture(scope="module")
def speed(posezoo_mini, tmp_path_factory):
    "One run with the smallest parameters: what it wrote, what it printed, and the folder"
    folder = tmp_path_factory.mktemp("speed")
    wanted = SMALLEST | dict(out=str(folder / "speed.json"), figure=str(folder / "speed.svg"))
    done = run(ROOT / "nbs/experiments/speed.ipynb", folder / "speed.ipynb", wanted, 300)
    said = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    return json.loads((folder / "speed.json").read_text()), said, folder


def test_result_says_what_was_run_and_where(speed):
    result, _, _ = speed
    assert set(result) == {"experiment", "parameters", "provenance", "rates", "ratios", "equal_answers", "median_move", "bf16_move_px", "memory", "samples"}
    assert {k: result["parameters"][k] for k in SMALLEST} == SMALLEST
    works = {"protonet, batch 1", "protonet, batch 2", "protonet, training step of 2"}
    assert works | {f"{w}, bfloat16" for w in works} <= set(result["rates"])
    assert {f"{w}: bfloat16 over float32" for w in works} <= set(result["ratios"])
    assert "protonet, training step of 2, bfloat16: aot_eager over none" in result["ratios"]
    assert 0 < result["bf16_move_px"]["protonet"]["median"] <= result["bf16_move_px"]["protonet"]["largest"] < 32 * 2 ** .5
    assert {"commit", "device", "torch", "numpy", "python", "cape", "cores", "threads", "seed", "minutes"} <= \
        set(result["provenance"])
    assert result["provenance"]["threads"] == 1 and result["provenance"]["minutes"] > 0


def test_rates_are_positive_and_medians_of_their_samples(speed):
    result, _, _ = speed
    assert {"files, 32 px", "filling the cache, 32 px", "cache, 32 px", "batches alone, cache", "batches alone, files",
            "training, cache", "training, files", "training, one ready batch", "uncached"} < set(result["rates"])
    for step, rate in result["rates"].items():
        rows = [r for r in result["samples"] if r["step"] == step]
        assert len(rows) == rate["samples"] == 2 and sum(r["contended"] for r in rows) == rate["contended"]
        assert all(r["rate"] == pytest.approx(r["items"] / r["seconds"], rel=0.02, abs=1e-3) or r["seconds"] < 0.01 for r in rows)
        assert 0 < rate["low"] <= rate["rate"] <= rate["high"] < math.inf
        assert all(r["cpu"] >= 0 and r["others"] >= 0 for r in rows)


def test_ratios_compare_steps_that_were_measured(speed):
    result, _, _ = speed
    for ratio in result["ratios"].values():
        assert {ratio["fast"], ratio["slow"]} <= set(result["rates"])
        assert 0 < ratio["low"] <= ratio["ratio"] <= ratio["high"] and 1 <= ratio["rounds"] <= 2
    evaluations = [r for r in result["ratios"].values() if "saved" in r]
    assert [r["pairs"] for r in evaluations] == [2 * 7, 2 * 3]     # 8 and 4 pictures: 7 and 3 are left as queries
    assert [r["encoded"] for r in evaluations] == [8, 4]
    assert all(r["saved"] == pytest.approx(2 * r["pairs"] / r["encoded"]) for r in evaluations)


def test_whole_episodes_are_timed_and_folding_moves_nothing(speed):
    result, _, _ = speed
    ways = {f"escape, {name}" for name in ("as published", "as it is", "folded", "bfloat16", "features there")}
    assert ways | {"backbone alone"} <= set(result["rates"]) and result["rates"]["escape, folded"]["unit"] == "query"
    assert all(f"episode, escape: {name} over as published" in result["ratios"] for name in ("as it is", "folded", "bfloat16", "features there"))
    assert result["median_move"]["as it is"] == 0 and result["median_move"]["folded"] < 1e-4


def test_cached_answers_equal_uncached_ones(speed):
    same = speed[0]["equal_answers"]
    assert same["equal"] and same["pairs"] == 7 and same["largest_difference"] < 1e-3
    assert same["pck_cached"] == pytest.approx(same["pck_uncached"])


def test_memory_is_told_by_step_and_for_the_cache(speed):
    result, _, _ = speed
    assert set(result["memory"]["peak_mb"]) == set(result["rates"]) and min(result["memory"]["peak_mb"].values()) > 50
    cache = result["memory"]["crop_cache"]["32"]
    assert cache["mb"] == pytest.approx(cache["pictures"] * 3 * cache["patch_side"] ** 2 / 1e6)


def test_progress_and_table_are_printed_and_the_figure_written(speed):
    _, said, folder = speed
    assert said.count("round 1 of 2") == 6 and "ms a pair" in said and "peak MB" in said
    assert (folder / "speed.svg").read_text().startswith("<?xml")
