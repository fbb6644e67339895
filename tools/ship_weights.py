"Write the networks that come with the package: those of a run of compare.ipynb, rounded to float16, with the scores they have then."
import argparse
import json
from pathlib import Path

import torch

from cape.evaluation import evaluate
from cape.models.base import load_model, save_model
from cape.trials import Trials

FIELDS = "size preset steps minutes warm start_steps train episodes queries seed".split()


def rounded(model):
    "The same model with weights as float16 would keep them; it says nothing of files that it was built from"
    for tensor in model.state_dict().values():
        if tensor.is_floating_point(): tensor.copy_(tensor.half())
    model.config = {k: {**v, "weights": None} if isinstance(v, dict) and "weights" in v else None if k == "weights" else v
                    for k, v in model.config.items()}
    return model


def ship(runs, result, to, methods=()):
    "For each method of `result`: its first seed's weights to `to`/METHOD.safetensors. Yields file and scores"
    table = json.loads(Path(result).read_text())
    told = table["parameters"]
    trials, split = Trials(runs, "posezoo", **{k: told[k] for k in FIELDS}), told["split"]
    _, test = trials.parts(split)
    for method in methods or table["methods"]:
        place, run = trials.train(table["methods"][method]["variant"], split, told["seeds"][0])
        model, size = rounded(load_model(place / "last.safetensors")), run["config"]["size"]
        scores = {f"{n}-shot": evaluate(model, test, shots=n, episodes=told["episodes"], queries=told["queries"], seed=told["seed"],
                                        size=size, crops=trials.crops(split, size)) for n in told["shots"]}
        about = dict(what="trained by nbs/experiments/compare.ipynb, stored in float16", step=run["step"], size=size,
                     data=f"PoseZoo {told['size']}, split {split}, base categories", train_config=run["config"],
                     seconds=run["seconds"], commit=run["commit"], device=run["device"],
                     novel={n: {"PCK@0.2": list(r.interval(.2)), "PCK@0.05": list(r.interval(.05)), "mPCK": list(r.interval("mpck")),
                                "pairs": r.pairs, "fingerprint": r.fingerprint} for n, r in scores.items()})
        yield save_model(model, Path(to) / f"{method}.safetensors", dtype=torch.float16, **about), about["novel"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", help="the folder `out` of the run of compare.ipynb")
    parser.add_argument("result", help="its result, as figures/results/compare.json")
    parser.add_argument("--to", default="cape/weights/posezoo")
    parser.add_argument("methods", nargs="*", help="all where none is named")
    args = parser.parse_args()
    for file, scores in ship(args.runs, args.result, args.to, args.methods):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB", {n: round(s["PCK@0.2"][0], 4) for n, s in scores.items()}, flush=True)
