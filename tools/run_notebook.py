"""Run a notebook as a job, with other parameters if wanted, and show what it prints while it runs.

  python tools/run_notebook.py nbs/experiments/demo.ipynb                   with the notebook's own parameters
  python tools/run_notebook.py nbs/experiments/demo.ipynb steps=50 seed=3   with others
  python tools/run_notebook.py nbs/experiments/demo.ipynb --help            the parameters it has"""
import argparse
import ast
import contextlib
import os
import re
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SILENCE = 15  # seconds without output after which a line says that the cell still runs


class UnknownParameter(KeyError):
    "A parameter that the notebook does not have, or a value that is not of its type"
    def __str__(self): return self.args[0]


def as_value(text, kind=""):
    "`text` of the command line as the value of a parameter declared as `kind`"
    if kind == "str": return text
    low = text.lower()
    if low in ("true", "false", "none"): return {"true": True, "false": False, "none": None}[low]
    try: value = ast.literal_eval(text)
    except (ValueError, SyntaxError): value = text
    wanted = {"int": int, "float": (int, float), "bool": bool, "list": list, "tuple": tuple}.get(kind, object)
    if isinstance(value, wanted) and not (isinstance(value, bool) and kind in ("int", "float")): return value
    raise UnknownParameter(f"{text!r} is no {kind}")


def check_parameters(notebook, given):
    "`given` as the parameters of `notebook`, texts converted; unknown names are an error"
    import papermill as pm
    known = pm.inspect_notebook(str(notebook))
    checked = {}
    for name, value in given.items():
        if name not in known:
            has = ", ".join(sorted(known)) or "none"
            raise UnknownParameter(f"{Path(notebook).name} has no parameter {name!r}; it has {has}")
        kind = (known[name].get("inferred_type_name") or "").strip()
        try: checked[name] = as_value(value, kind) if isinstance(value, str) else value
        except UnknownParameter as e: raise UnknownParameter(f"{name}={value}: {e}") from None
    return checked


class Ticker:
    "Says which cell runs and, when it is silent for long, that it still does"
    def __init__(self, cells, out, silence=SILENCE):
        self.out, self.silence, self.lock, self.done = out, silence, threading.Lock(), threading.Event()
        self.count, self.total = 0, sum(c.cell_type == "code" and bool(c.source.strip()) for c in cells)
        self.start = self.heard = time.time()
        self.heading, self.announced, self.now, self.column = "", "", "starting the kernel", 0
        threading.Thread(target=self._watch, daemon=True).start()

    def on_cell_start(self, cell, cell_index):
        "Remember the heading we are under, and announce it"
        if cell.cell_type == "markdown":
            heads = [line for line in cell.source.splitlines() if line.startswith("#")]
            if heads: self.heading = heads[-1].lstrip("# ").strip()
        elif cell.source.strip() and "injected-parameters" not in cell.metadata.get("tags", []):
            self.count += 1
            self.now = f"cell {self.count}/{self.total}"
            if self.heading != self.announced:
                self._line(f"[{self.now}, {time.time() - self.start:.0f} s] {self.heading}")
            self.announced = self.heading

    def where(self):
        "The cell that runs, and the heading it stands under"
        return self.now + (f' under "{self.announced}"' if self.announced else "")

    def write(self, text):
        "What the notebook prints, passed on at once"
        with self.lock:
            self.heard, self.column = time.time(), 0 if text.endswith("\n") else 1
            self.out.write(text)

    def flush(self): self.out.flush()

    def _line(self, text):
        self.write(("\n" if self.column else "") + text + "\n")
        self.flush()

    def _watch(self):
        while not self.done.wait(1):
            if time.time() - self.heard < self.silence: continue
            self._line(f"    ... {self.now} is running, {time.time() - self.start:.0f} s so far")


@contextlib.contextmanager
def import_path(path):
    "Kernels started here find the package in `path` first"
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(path), *([old] if old else [])])
    try: yield
    finally:
        if old is None: del os.environ["PYTHONPATH"]
        else: os.environ["PYTHONPATH"] = old


def quiet_kernel():
    "A kernel manager that encrypts its sockets where it can: without that every start prints a warning"
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            if self.has_trait("transport_encryption"): self.transport_encryption = "auto"
    return Kernel


def run(notebook, out, parameters=None, timeout=None, stream=None):
    "Run `notebook` in its own folder, save it as `out`, print to `stream`; gives the executed notebook"
    import nbformat
    import papermill as pm
    notebook, out = Path(notebook).resolve(), Path(out).resolve()
    parameters = check_parameters(notebook, parameters or {})
    out.parent.mkdir(parents=True, exist_ok=True)
    ticker = Ticker(nbformat.read(notebook, 4).cells, stream or open(os.devnull, "w"))
    try:
        with import_path(ROOT):
            return pm.execute_notebook(
                str(notebook), str(out), parameters=parameters, kernel_name="python3",
                cwd=str(notebook.parent), execution_timeout=timeout, start_timeout=120, progress_bar=False,
                autosave_cell_every=30, kernel_manager_class=quiet_kernel(), stdout_file=ticker, stderr_file=ticker,
                on_cell_start=ticker.on_cell_start)
    except Exception as e:
        e.where = ticker.where()
        raise
    finally: ticker.done.set()


LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")


def keep(file, notebook):
    "Make `file`, executed from `notebook`, one to commit: links from its own folder; no times, counts and folders of this machine"
    import nbformat
    nb = nbformat.read(file, 4)
    there = os.path.relpath(Path(notebook).resolve().parent, Path(file).resolve().parent)
    here = lambda m: m[1] + Path(os.path.normpath(Path(there, m[2]))).as_posix()
    nb.metadata = {"kernelspec": {k: nb.metadata.kernelspec[k] for k in ("display_name", "language", "name")}}
    for cell in nb.cells:
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        if cell.cell_type == "markdown": cell.source = LINK.sub(here, cell.source)
        if cell.cell_type == "code": cell.execution_count = None
        for output in cell.get("outputs", ()):
            if "execution_count" in output: output.execution_count = None
    text = nbformat.writes(nb).replace(f"{sys.prefix}/", "").replace(f"{ROOT}/", "")
    Path(file).write_text(text if text.endswith("\n") else text + "\n")


def failure(error):
    "One line: which cell failed, under which heading, with what"
    what = str(getattr(error, "evalue", error)).strip().splitlines() or [""]
    return f"{error.where} failed: {getattr(error, 'ename', type(error).__name__)}: {what[0]}"


def describe(notebook):
    "The parameters of `notebook`, a line each"
    import papermill as pm
    rows = pm.inspect_notebook(str(notebook)).values()
    return "\n".join(f"  {r['name']}={r['default']}  {r['help'] or ''}".rstrip() for r in rows) or "  none"


def main(argv=None):
    "The command line; gives the exit code: 0 done, 1 a cell failed, 2 bad arguments, 130 interrupted"
    ap = argparse.ArgumentParser(description=__doc__, add_help=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("notebook", nargs="?", type=Path)
    ap.add_argument("parameters", nargs="*", metavar="name=value", help="parameters to set")
    ap.add_argument("-o", "--out", type=Path, help="the executed notebook (default: runs/NAME/NAME.ipynb)")
    ap.add_argument("--keep", action="store_true", help="tidy the executed notebook for being committed: no times, no folders of this machine")
    ap.add_argument("--timeout", type=int, help="seconds a cell may take (default: no limit)")
    ap.add_argument("-h", "--help", action="store_true", help="this text, and the parameters of the notebook")
    args = ap.parse_intermixed_args(argv)
    os.environ.setdefault("CAPE_PROGRESS", "lines")  # the notebook's bars as lines, so that they show here
    if args.help or not args.notebook:
        ap.print_help()
        if args.notebook and args.notebook.exists():
            print(f"\nparameters of {args.notebook}:\n{describe(args.notebook)}")
        return 0 if args.help else 2
    bad = [p for p in args.parameters if "=" not in p]
    if bad or not args.notebook.exists():
        said = f"{bad[0]!r} is not of the form name=value" if bad else f"{args.notebook} is not there"
        print(said, file=sys.stderr)
        return 2
    out = args.out or ROOT / "runs" / args.notebook.stem / args.notebook.name
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError
    start = time.time()
    try: run(args.notebook, out, dict(p.split("=", 1) for p in args.parameters), args.timeout, sys.stdout)
    except UnknownParameter as e:
        print(e, file=sys.stderr)
        return 2
    except (PapermillExecutionError, CellTimeoutError, DeadKernelError) as e:
        print(f"\n{args.notebook.name}: {failure(e)}", file=sys.stderr)
        print(f"The notebook as far as it ran, with the whole error: {out}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted; the notebook as far as it ran: {out}", file=sys.stderr)
        return 130
    if args.keep: keep(out, args.notebook)
    print(f"Done after {time.time() - start:.0f} s; the executed notebook: {out}")
    return 0


if __name__ == "__main__": sys.exit(main())
