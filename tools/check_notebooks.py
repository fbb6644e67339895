"""Fail unless cape/ is the export of nbs/, every notebook is clean and whole, and README.md is index.ipynb.

Works on a copy; changes nothing. `make notebooks` mends what it finds."""
import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HAND_KEPT = {"cape/__init__.py"}  # everything else in cape/*.py comes from a notebook
DIRECTIVES = {"default_exp", "export", "exporti", "exports", "hide", "eval", "echo", "slow", "cuda", "notest"}
NOT_IN_JOBS = {"export", "exporti", "exports", "eval", "slow", "cuda"}  # papermill runs every cell
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([^\s:]*)")
MAX_MB = 3
CONFIG = ["pyproject.toml", "settings.ini", "setup.py"]


def tracked(root):
    "Files that git has or would add; all files where there is no git"
    git = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                         capture_output=True, text=True)
    if git.returncode == 0: files = git.stdout.split("\0")[:-1]
    else: files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    return [f for f in files if (root / f).is_file()]


def relevant(files):
    "Those that the notebooks make or are"
    return [f for f in files if f in CONFIG or f == "README.md" or re.match(r"figures/readme_", f)
            or (re.match(r"(cape|nbs)/", f) and "__pycache__" not in f and ".ipynb_checkpoints" not in f)]


def generated(file):
    "True for what an export writes"
    return file == "README.md" or file.startswith("figures/readme_") or (
        re.match(r"cape/.*\.py$", file) and file not in HAND_KEPT)


def command(name, cwd):
    "Run an nbdev command, its words shown only when it fails"
    done = subprocess.run([Path(sys.executable).parent / name], cwd=cwd, capture_output=True, text=True)
    said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
    return [f"{name} fails: {said[-1]}"] if done.returncode else []


def drift(root):
    "Files that differ from what the notebooks give, one line each"
    files = relevant(tracked(root))
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp).resolve() / "repo"
        for f in files:
            if generated(f): continue
            (copy / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / f, copy / f)
        bad = command("nbdev-export", copy) + command("nbdev-clean", copy)
        if (copy / "nbs/index.ipynb").exists(): pages(copy)
        made = relevant(p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file())
        for f in sorted({*files, *made}):
            if not (copy / f).exists(): bad.append(f"{f}: no notebook makes this file")
            elif not (root / f).exists(): bad.append(f"{f}: missing; the notebooks give it")
            elif (root / f).read_bytes() != (copy / f).read_bytes():
                bad.append(f"{f}: not clean (nbdev-clean changes it)" if f.endswith(".ipynb") else
                           f"{f}: differs from what the notebooks give")
    return bad


def pages(root):
    "Write README.md below `root`"
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from pages import write
    write(root)


def directives(cell):
    "Names of the directive lines at the head of a code cell"
    for line in cell["source"] if isinstance(cell["source"], list) else cell["source"].splitlines():
        found = DIRECTIVE.match(line)
        if not found: return
        yield found[1]


def look(path, name):
    "What is wrong with one notebook, one line each"
    megabytes = path.stat().st_size / 1e6
    if megabytes > MAX_MB: yield f"{name}: {megabytes:.1f} MB; at most {MAX_MB}"
    nb = json.loads(path.read_text(encoding="utf-8"))
    kernel = nb["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3": yield f"{name}: kernelspec is {kernel!r}; must be 'python3'"
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    if name.startswith("nbs/experiments/"):
        tags = sum("parameters" in c["metadata"].get("tags", []) for c in code)
        if tags != 1: yield f"{name}: {tags} cells tagged 'parameters'; must be one"
        never = NOT_IN_JOBS & {d for c in code for d in directives(c)}
        if never: yield f"{name}: '#| {min(never)}' in a notebook that papermill runs"
    elif name != "nbs/index.ipynb" and not any(c["outputs"] for c in code):
        yield f"{name}: committed without outputs; run nbdev-test {name} --save"
    for i, c in enumerate(code):
        for d in directives(c):
            if d not in DIRECTIVES: yield f"{name}: code cell {i}: no such directive: '#| {d}'"
        for o in c["outputs"]:
            if o["output_type"] != "error": continue
            yield f"{name}: code cell {i}: error in its output: {o.get('ename')}"


def chapters(root):
    "Chapters that README.md does not name"
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    names = sorted(f"nbs/{p.name}" for p in (root / "nbs").glob("[0-9]*.ipynb"))
    return [f"README.md: does not name chapter {n} (run nbs/index.ipynb)" for n in names if n not in text]


def public(root):
    "Names that cape/__init__.py sends to a module that does not have them"
    init = root / "cape/__init__.py"
    for node in ast.parse(init.read_text(encoding="utf-8")).body if init.exists() else []:
        if not (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC"): continue
        for module, names in ast.literal_eval(node.value).items():
            file = root / (module.replace(".", "/") + ".py")
            if not file.exists(): yield f"cape/__init__.py: {module} does not exist"; continue
            text = file.read_text(encoding="utf-8")
            for n in names:
                if re.search(rf"^(def|class)\s+{n}\b|^{n}\b.*=", text, re.M): continue
                yield f"cape/__init__.py: {module} has no {n}"


def problems(root):
    "All that is wrong below `root`, one line each"
    bad = drift(root)
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        name = path.relative_to(root).as_posix()
        if ".ipynb_checkpoints" not in name: bad += look(path, name)
    return bad + chapters(root) + list(public(root))


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    bad = problems(ap.parse_args().root.resolve())
    for line in bad: print(line)
    if bad: print(f"{len(bad)} found. `make notebooks` exports, cleans, writes README.md.")
    return int(bool(bad))


if __name__ == "__main__": sys.exit(main())
