"The notebook of a single run: what it writes, that it goes on, that padding and identifiers reach the model, and what it refuses."
import json

import pytest
import torch
from conftest import ROOT, own_methods, run_cells
from run_notebook import run

from cape.errors import ConfigError
from cape.models.backbones import create_backbone
from cape.models.base import load_model

NOTEBOOK = ROOT / "nbs" / "experiments" / "train.ipynb"
SMALL = dict(steps=2, episodes=2, queries=2, shots=[1], train=dict(size=32, batch=4, val_every=0))


def train(folder, kernel=False, **more):
    "One run below `folder`, by a kernel or in this process: the result and all that was printed"
    params = SMALL | dict(out=str(folder / "runs"), result=str(folder / "result.json")) | more
    if kernel:
        done = run(NOTEBOOK, folder / "ran.ipynb", params, 300)
        said = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    else: said = run_cells(NOTEBOOK, **params)
    return json.loads((folder / "result.json").read_text()), said


def test_a_run_and_the_same_again(posezoo_mini, tmp_path):
    first, said = train(tmp_path, kernel=True, method="protonet")
    assert {r["method"] for r in first["rows"]} == {"protonet", "copy the support", "mean pose"}
    assert first["training"]["step"] == 2 and first["training"]["stopped"] == "finished" and "novel categories of split 1" in said
    assert {"commit", "device", "machine", "torch", "train", "test", "minutes"} <= set(first["provenance"])
    for row in first["rows"]: assert 0 <= row["PCK@0.2"][1] <= row["PCK@0.2"][0] <= row["PCK@0.2"][2] <= 1
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    again, _ = train(tmp_path, method="protonet")
    assert again["rows"] == first["rows"] and files == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}


def test_identifier_and_padding_reach_the_model(posezoo_mini, tmp_path):
    result, _ = train(tmp_path, method="capeformer", identifier="none", padding="mixup", model=dict(dim=32, heads=4, hidden=32))
    name, options = result["network"]
    assert name == "padded" and options["train"] == "mixup" and options["options"]["identifier"] == "none"
    assert options["options"]["dim"] == 32


def test_escape_is_trained_stage_by_stage(posezoo_mini, tmp_path):
    result, said = train(tmp_path, method="escape", model=dict(vectors="means", tied=False))
    assert "in each of its stages 2 steps" in said and result["training"]["step"] == 4        # baseline and matching
    assert result["network"][0] == "escape" and result["network"][1]["labels"] and result["rows"][0]["method"] == "escape"
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("state.pt")}
    again, _ = train(tmp_path, method="escape", model=dict(vectors="means", tied=False))
    assert again["rows"] == result["rows"] and len(files) == 2 and files == {p: p.stat().st_mtime_ns for p in files}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*own_methods()} - {"copy", "meanpose", "padded"}))
def test_the_full_recipe(method, posezoo_mini, tmp_path, monkeypatch):
    "One step at 256 px from torchvision's weights, in bfloat16 and compiled; its cache is given a file, so that nothing is fetched"
    begun = create_backbone("resnet50").state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(begun, tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth")
    steps = dict(batch=2, val_every=0, precision="bf16", compile="aot_eager")
    fewer = {m: dict(steps=1) for m in ("finetune", "maml")}.get(method, {})               # on each support, minutes otherwise
    result, _ = train(tmp_path, method=method, model=fewer, preset="paper", steps=1, episodes=1, queries=1, train=steps)
    assert result["settings"]["size"] == 256 and result["training"]["step"] == (3 if method == "escape" else 1)
    parts = [m for n, m in load_model(next(tmp_path.rglob("last.safetensors"))).named_modules() if n.endswith("backbone")]
    for part in parts:
        torch.testing.assert_close(part.state_dict()["conv1.weight"], begun["conv1.weight"], atol=1e-5, rtol=0)
    assert parts


@pytest.mark.parametrize("parameters, message", [
    (dict(method="protonett"), "did you mean 'protonet'"), (dict(method="protonet", identifier="none"), "has no identifiers"),
    (dict(method="prototype", padding="mixup"), "nothing to pad"), (dict(method="escape", padding="mixup"), "nothing to pad"), (dict(preset="large"), "no preset 'large'"),
    (dict(method="protonet", model=dict(widths=3)), "widths")])
def test_what_is_refused(posezoo_mini, tmp_path, parameters, message):
    with pytest.raises(ConfigError, match=message): train(tmp_path, **parameters)
    assert not (tmp_path / "runs").exists()
