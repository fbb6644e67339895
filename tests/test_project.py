"The repository as a whole: settings agree, the checker sees faults, importing is cheap, jobs fail well."
import ast
import importlib.metadata as metadata
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from check_notebooks import problems
from conftest import ROOT
from pages import write as write_pages
from run_notebook import main as run_job

try: import tomllib
except ImportError: import tomli as tomllib

INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini")
CFG = INI["DEFAULT"]


def python(*args): return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


# the tree

def test_package_notebooks_and_readme_agree():
    done = python("tools/check_notebooks.py")
    if done.returncode: pytest.fail(done.stdout + done.stderr, pytrace=False)


def test_settings_and_pyproject_agree():
    nbdev = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["nbdev"]
    for key in ("lib_path", "nbs_path", "tst_flags"): assert nbdev[key] == CFG[key]
    assert nbdev["allowed_cell_metadata_keys"] == CFG["allowed_cell_metadata_keys"].split()


def test_version_stands_in_one_place():
    import cape
    assert "version" not in CFG and "version" not in (ROOT / "pyproject.toml").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", cape.__version__)


def names(requirements):
    "Names of the distributions in a list of requirements"
    return {re.split(r"[<>=!;\[~]", r)[0].lower().replace("_", "-") for r in requirements.split()}


def imported(path):
    "Top-level names that a python file imports anywhere, our own and the standard library's left out"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): found |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"cape", "conftest", "tomllib"}


@pytest.mark.parametrize("folder", ["cape", "tools"])
def test_what_is_imported_is_required(folder):
    keys = [key for key in CFG if key.endswith("requirements") and (folder, key) != ("cape", "dev_requirements")]
    required = set().union(*(names(CFG[key]) for key in keys))
    dists = metadata.packages_distributions()
    ours = {p.stem for p in (ROOT / folder).glob("*.py")}
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path) - ours:
            known = {d.lower().replace("_", "-") for d in dists.get(name, [name])}
            assert known & required, f"{path.relative_to(ROOT)} imports {name}, not required by settings.ini"


# the package

def test_importing_cape_stays_light():
    heavy = ["torchvision", "plotly", "timm", "onnx", "matplotlib.pyplot", "sklearn", "accelerate", "IPython"]
    code = (f"import sys, cape; torch = 'torch' in sys.modules; cape.PoseDataset\n"
            f"print(torch, [m for m in {heavy} if m in sys.modules])")
    done = python("-c", code)
    assert done.stdout.strip() == "False []", done.stdout + done.stderr


def test_every_public_name_is_there():
    import cape
    for name in cape.__all__: assert getattr(cape, name) is not None
    assert set(cape.__all__) <= set(dir(cape))
    with pytest.raises(AttributeError, match="no attribute 'PoseDatset'"): cape.PoseDatset


# the checker, on a small copy

INIT = '"Shapes."\n\n__version__ = "1.2.3"\n\nKEPT = True\n'
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
CHAPTER, RUN = "nbs/00_shapes.ipynb", "nbs/experiments/run.ipynb"
SIX = nbformat.v4.new_output("execute_result", {"text/plain": "6"})
SOURCE = {
    CHAPTER: ["#| default_exp shapes", "#| export\ndef area(w, h): return w * h", "area(2, 3)"],
    "nbs/index.ipynb": [],
    RUN: ["steps: int = 1  # how many", "print(steps)"],
}


def make_notebook(cells):
    "A notebook of a title and `cells`"
    title = nbformat.v4.new_markdown_cell("# shapes\n\n> areas\n\n[first](00_shapes.ipynb)", id="title")
    code = [nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(cells)]
    return nbformat.v4.new_notebook(cells=[title, *code], metadata={"kernelspec": KERNEL})


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory):
    "A repository of one chapter, exported, clean, with a README"
    root = tmp_path_factory.mktemp("copy") / "repo"
    (root / "nbs/experiments").mkdir(parents=True)
    (root / "cape").mkdir()
    for f in ("pyproject.toml", "settings.ini", "setup.py"): shutil.copy(ROOT / f, root / f)
    (root / "cape/__init__.py").write_text(INIT)
    for name, cells in SOURCE.items():
        nb = make_notebook(cells)
        if name == CHAPTER: nb.cells[-1].outputs = [SIX]
        if name == RUN: nb.cells[1].metadata["tags"] = ["parameters"]
        nbformat.write(nb, root / name)
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=root, check=True, capture_output=True)
    write_pages(root)
    return root


def cell(i, name=CHAPTER, **values):
    "A fault: code cell `i` of notebook `name` gets `values`"
    def spoil(root):
        nb = nbformat.read(root / name, 4)
        [c for c in nb.cells if c.cell_type == "code"][i].update(values)
        (root / name).write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    return spoil


def append(name, text): return lambda root: (root / name).write_text((root / name).read_text() + text)
def copy(old, new): return lambda root: shutil.copy(root / old, root / new)
def rename_kernel(root): (root / CHAPTER).write_text((root / CHAPTER).read_text().replace('"python3"', '"my"'))


ERROR = nbformat.v4.new_output("error", ename="Oops", evalue="", traceback=[])
LARGE = nbformat.v4.new_output("stream", text="x" * 3_100_000)
FAULTS = {
    "edited, not exported": (cell(1, source="#| export\narea = max"), "cape/shapes.py: differs"),
    "module edited by hand": (append("cape/shapes.py", "# mine\n"), "cape/shapes.py: differs"),
    "orphan module": (copy("cape/shapes.py", "cape/old.py"), "cape/old.py: no notebook"),
    "module by hand": (copy("cape/__init__.py", "cape/own.py"), "cape/own.py: no notebook"),
    "missing module": (lambda root: (root / "cape/shapes.py").unlink(), "cape/shapes.py: missing"),
    "uncleaned": (cell(2, execution_count=7), "00_shapes.ipynb: not clean"),
    "misspelt directive": (cell(2, source="#| exprot\narea(2, 3)"), "no such directive: '#| exprot'"),
    "README drift": (append("README.md", "more\n"), "README.md: differs"),
    "chapter not in README": (copy(CHAPTER, "nbs/01_more.ipynb"), "does not name chapter nbs/01_more.ipynb"),
    "foreign kernel": (rename_kernel, "kernelspec is 'my'"),
    "no outputs": (cell(2, outputs=[]), "committed without outputs"),
    "error in outputs": (cell(2, outputs=[ERROR]), "error in its output: Oops"),
    "tag gone": (cell(0, RUN, metadata={}), "0 cells tagged 'parameters'"),
    "directive in a job": (cell(1, RUN, source="#| eval: false\nprint(steps)"), "'#| eval' in a notebook that"),
    "too large": (cell(2, outputs=[LARGE]), "at most 3"),
}


def test_checker_passes_a_clean_copy(clean_copy):
    assert problems(clean_copy) == []
    assert (clean_copy / "cape/__init__.py").read_text() == INIT
    assert "(nbs/00_shapes.ipynb)" in (clean_copy / "README.md").read_text()


@pytest.mark.parametrize("fault", FAULTS)
def test_checker_sees(fault, clean_copy, tmp_path):
    spoil, says = FAULTS[fault]
    root = shutil.copytree(clean_copy, tmp_path / "repo")
    spoil(root)
    found = problems(root)
    assert any(says in line for line in found), found


# the jobs

JOB = ["steps: int = 2  # how many\nname: str = 'x'  # a name",
       "for i in range(steps): print('step', i, name)",
       "if steps == 9: raise ValueError('nine is bad')", "import os\nprint(os.getcwd())"]


@pytest.fixture
def job(tmp_path):
    "A small notebook with parameters"
    nb = make_notebook(JOB)
    nb.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path / "job.ipynb")
    return [str(tmp_path / "job.ipynb"), "-o", str(tmp_path / "out/done.ipynb")]


def test_job_prints_as_it_runs_and_saves_the_notebook(job, tmp_path):
    done = python("tools/run_notebook.py", *job, "steps=3", "name=12")
    assert done.returncode == 0, done.stderr
    assert "step 2 12\n" in done.stdout and f"{tmp_path}\n" in done.stdout and "[cell 1/4" in done.stdout
    assert nbformat.read(tmp_path / "out/done.ipynb", 4).metadata.papermill.exception is None


def test_kept_notebook_says_nothing_of_the_machine(job, tmp_path):
    nb = nbformat.read(job[0], 4)
    nb.cells.append(nbformat.v4.new_markdown_cell("[a](../x.ipynb#b) [c](#d) [e](https://f.g)", id="links"))
    nb.cells.append(nbformat.v4.new_code_cell(f"print('{ROOT}/runs/x', '{sys.prefix}/lib/y')", id="where"))
    nbformat.write(nb, job[0])
    assert run_job([*job, "--keep", "steps=1"]) == 0
    done = nbformat.read(tmp_path / "out/done.ipynb", 4)
    assert done.cells[-1].outputs[0].text == "runs/x lib/y\n" and "papermill" not in (tmp_path / "out/done.ipynb").read_text()
    assert done.cells[-2].source == "[a](../../x.ipynb#b) [c](#d) [e](https://f.g)"
    assert [c.metadata.tags for c in done.cells if c.metadata] == [["parameters"], ["injected-parameters"]]
    assert all(c.execution_count is None for c in done.cells if c.cell_type == "code")


def test_failing_job_names_the_cell(job, tmp_path):
    done = python("tools/run_notebook.py", *job, "steps=9")
    assert done.returncode == 1 and 'cell 3/4 under "shapes" failed: ValueError: nine is bad' in done.stderr
    assert "nine is bad" in (tmp_path / "out/done.ipynb").read_text()


@pytest.mark.parametrize("arg,says", [("step=2", "no parameter 'step'; it has name, steps"),
                                      ("steps=two", "'two' is no int"), ("steps", "not of the form name=value")])
def test_wrong_parameters_stop_the_job(job, arg, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPE_PROGRESS", "off")            # the job sets it where it is not
    assert run_job([*job, arg]) == 2 and not (tmp_path / "out").exists()
    told = capsys.readouterr()
    assert says in told.err and told.out == ""


def test_make_help_lists_the_jobs():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("make demo", "make test", "make lab"): assert word in done.stdout


# the page

def test_page_hides_what_is_marked_and_keeps_pictures(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/readme_old.png").write_bytes(b"old")
    nb = make_notebook(["#| hide\nsecret = 1", "#| echo: false\nsource = 2", "#| eval: false\nshown = 3"])
    picture = {"image/png": "iVBORw0KGgo="}
    nb.cells[2].outputs = [nbformat.v4.new_output("display_data", picture)]
    links = "[up](../LICENSE) [out](https://a.org/b) ![pic](../figures/x.png)"
    nb.cells.append(nbformat.v4.new_markdown_cell(links, id="links"))
    nbformat.write(nb, tmp_path / "nbs/index.ipynb")
    write_pages(tmp_path)
    text, made = (tmp_path / "README.md").read_text(), [p.name for p in (tmp_path / "figures").iterdir()]
    assert "secret" not in text and "source" not in text and "```python\nshown = 3\n```" in text
    assert "[up](LICENSE) [out](https://a.org/b) ![pic](figures/x.png)" in text
    assert len(made) == 1 and f"(figures/{made[0]})" in text and made[0].endswith(".png")
