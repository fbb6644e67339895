"""Build the site of all chapters and the API reference in _docs/html, and check every address in it.

Pages show the outputs that the notebooks hold. A chapter with widgets is run, so that its page is live without a kernel;
the browser's part of the widgets is fetched once, checked, and kept beside the environment. Nothing in the site
needs the network."""
import argparse
import hashlib
import os
import posixpath
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlretrieve

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
PARTS = {"0": "The task", "1": "Matching", "2": "Knowledge of the base categories", "3": "Structure",
         "4": "Looking inside, and using it", "e": "Experiments", "f": "Recorded runs"}
NEEDS = ("sphinx", "myst_nb", "sphinx_book_theme", "ziamath", "papermill")
WIDGETS = re.compile(r"^\s*(?:import|from) (?:ipywidgets|anywidget)\b", re.M)
MODULE = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s#]+)")
SCRIPTS = {  # file: (the npm package that holds it, its version, its path there, SHA-256)
    "require.js": ("requirejs", "2.3.8", "require.js", "c1fc6b1d53af7522f78d664922abb32acac64ed0ecccb8f907f1e6fc7262563a"),
    "libembed-amd.js": ("@jupyter-widgets/html-manager", "1.0.15", "dist/libembed-amd.js",
                        "dc65ab69f5116a4f5f67e449669de36f344fe7b7bf16b99aa15b04a8b0e93516")}
START = """// draw the widgets of this page; a part that is not in this folder is not looked for elsewhere
require.config({baseUrl: document.currentScript.src.replace(/[^/]*$/, '')})
const load = name => new Promise((found, failed) => require([name], found, failed))
require(['@jupyter-widgets/html-manager/dist/libembed-amd'], manager => manager.renderWidgets(undefined, load))
"""
STYLE = """@font-face { font-family: 'STIX Two Math'; src: url(STIXTwoMath-Regular.ttf) }
math { font-family: 'STIX Two Math', math; font-size: 1.05em }
math[display=block] { overflow-x: auto; overflow-y: hidden; padding: .3em 0 }
.bd-header { display: none !important }  /* the search field stands in the side bar already */
.bd-main .bd-content .bd-article-container { max-width: 66em }
.bd-main .bd-content .bd-sidebar-secondary { width: 12.5rem }
div.highlight pre { font-size: 12px }
dl.py table, article table code { font-size: .9em }
article col { width: auto !important }
h1 { overflow-wrap: anywhere }
.widget-subarea { overflow-x: auto }  /* and undo what the theme means by .row: a widget may use the word too */
.widget-subarea .row { flex-wrap: nowrap; margin: 0 }
.widget-subarea .row > * { flex-shrink: 1; width: auto; max-width: none; margin-top: 0; padding: 0 }
@media (max-width: 600px) { dl.py dd { margin-left: .5rem } h1 { font-size: 1.8rem } }
"""
LIVE = ("```{note}\nThe widget on this page is live without a kernel; what needs a model or writes a file "
        "answers when the chapter runs in JupyterLab.\n```")


class Fault(Exception):
    "What keeps the site from being built, in one line"


def say(text): print(f"[{time.time() - STARTED:3.0f} s] {text}", flush=True)


STARTED = time.time()


def fetch(package, version, folder):
    "The archive of an npm package, by npm or, where there is none, from the registry; *Raises* `Fault`"
    say(f"fetching {package} {version}")
    try:
        if not shutil.which("npm"):
            address = f"https://registry.npmjs.org/{package}/-/{package.split('/')[-1]}-{version}.tgz"
            return urlretrieve(address, folder / "package.tgz")[0]
        command = ["npm", "pack", f"{package}@{version}", "--silent"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
        return next(folder.glob("*.tgz"))
    except (OSError, subprocess.SubprocessError, StopIteration) as e:
        raise Fault(f"{package} {version} cannot be fetched; is the network there? ({type(e).__name__})") from e


def scripts(folder):
    "The browser's part of the widgets in `folder`, fetched where it is not there; *Raises* `Fault`"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (package, version, member, digest) in SCRIPTS.items():
        file = folder / name
        if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == digest: continue
        with tempfile.TemporaryDirectory() as tmp:
            try:
                with tarfile.open(fetch(package, version, Path(tmp))) as archive:
                    data = archive.extractfile(f"package/{member}").read()
            except (tarfile.TarError, EOFError, KeyError): data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise Fault(f"{name} of {package} {version} is not the file it should be")
        file.write_bytes(data)
    return folder


def chapters(nbs=ROOT / "nbs"):
    "{page: notebook}, in reading order"
    found = [nbs / "index.ipynb", *sorted(nbs.glob("[0-9]*.ipynb")), *sorted((nbs / "experiments").glob("[!_.]*.ipynb"))]
    runs = sorted((nbs.parent / "figures/results").glob("*.ipynb"))
    return {p.relative_to(folder).with_suffix("").as_posix(): p for folder, some in ((nbs, found), (nbs.parent, runs)) for p in some}


def contents(pages, more):
    "The table of contents as Markdown, a part a toctree"
    parts = {}
    for page in pages:
        if page == "index": continue
        title = Path(page).name.replace("_", " ")
        parts.setdefault(PARTS.get(page[0], "More"), []).append(f"{title} <{page}>")
    parts["Reference"] = ["API <api/index>", *more]
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *entries, "```"])
                       for part, entries in parts.items())


def run_live(notebook, folder):
    "The notebook executed, widget state and all; kept until it or the package changes"
    from run_notebook import failure, run
    sources = [notebook, *sorted((ROOT / "cape").rglob("*.py"))]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    done = folder / f"{notebook.stem}-{key}.ipynb"
    if not done.exists():
        say(f"running {notebook.name} for its widgets")
        part = folder / f"{notebook.stem}.part.ipynb"
        try: run(notebook, part, timeout=1800, stream=sys.stdout)
        except Exception as e: raise Fault(f"{notebook.name}: {failure(e)}") from e
        for old in folder.glob(f"{notebook.stem}-????????????????.ipynb"): old.unlink()
        part.rename(done)
    return done


class Site:
    "Writes the source of the site: chapters and API pages as Sphinx reads them"
    def __init__(self, source, live=None):
        import cape
        import docs_api
        self.source, self.live, self.copied, self.widgets = source, live, [], []
        self.api, self.package, self.modules = docs_api, cape, docs_api.modules(cape)
        self.names = docs_api.full_names(self.modules, cape)

    def text(self, text, folder):
        "Markdown of a file in `folder` with addresses from the site's root; what they name is copied"
        def absolute(m):
            target = posixpath.normpath(posixpath.join(folder, m[2]))
            if not (ROOT / target).is_file(): return m[0]  # no link but code, or a broken one: Sphinx will say so
            if not target.endswith(".ipynb"): self.copy(target)
            return f"{m[1]}/{target.removeprefix('nbs/')}"
        return self.api.link_names(LINK.sub(absolute, text), self.names)

    def copy(self, target):
        "A file of the repository into the source"
        out = self.source / target
        if out.exists(): return
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / target, out)
        if target.endswith(".md"):
            out.write_text(self.text(out.read_text(encoding="utf-8"), posixpath.dirname(target)), encoding="utf-8")
            self.copied.append(f"{target.removesuffix('.md')}")

    def chapter(self, page, notebook):
        "A notebook without hidden cells and directives; gives the module that it exports"
        import nbformat
        from nbformat.v4 import new_markdown_cell
        from pages import Directives
        folder = notebook.parent.relative_to(ROOT).as_posix()
        code = "\n".join(c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code")
        module = MODULE.search(code)
        live = bool(self.live and WIDGETS.search(code))
        nb, _ = Directives().preprocess(nbformat.read(run_live(notebook, self.live) if live else notebook, 4), {})
        cells = []
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = self.text(cell.source, folder)
            if cell.metadata.pop("transient", None): cell.metadata["tags"] = ["remove-input"]
            told = [o for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
            if told: cell.outputs = [o for o in cell.outputs if o not in told]
            cells += [cell, *(new_markdown_cell(self.text(o.data["text/markdown"], folder)) for o in told)]
        if live: self.widgets.append(page); cells.insert(1, new_markdown_cell(LIVE))
        if module: cells.insert(1, new_markdown_cell(f"*Module*: {{py:mod}}`{self.package.__name__}.{module[1]}`"))
        nb.cells = cells
        self.write(f"{page}.ipynb", nbformat.writes(nbformat.from_dict(nb), version=4))
        return f"{self.package.__name__}.{module[1]}" if module else None

    def write(self, name, text):
        (self.source / name).parent.mkdir(parents=True, exist_ok=True)
        (self.source / name).write_text(text, encoding="utf-8")

    def build(self):
        "All pages; gives their number"
        import nbformat
        pages = chapters()
        explained = {self.chapter(page, notebook): page for page, notebook in pages.items()}
        for name, module in self.modules.items():
            self.write(f"api/{name}.md", self.api.page(module, self.names, explained.get(name)))
        self.write("api/index.md", self.api.index(self.modules, self.package))
        start = nbformat.read(self.source / "index.ipynb", 4)
        start.cells.append(nbformat.v4.new_markdown_cell(contents(pages, self.copied)))
        self.write("index.ipynb", nbformat.writes(start))
        return len(pages) + len(self.modules) + 1


def settings(static, live, version):
    "The configuration of Sphinx"
    return dict(
        project="cape", html_title="cape", version=version, release=version, root_doc="index", language="en",
        extensions=["myst_nb", "docs"], smartquotes=False, add_module_names=False, toc_object_entries=False,
        html_theme="sphinx_book_theme", html_static_path=[str(static)], html_css_files=["cape.css"],
        html_math_renderer="mathml", html_copy_source=False, html_show_copyright=False,
        html_show_search_summary=False,  # the search page would have to read the others, which a browser forbids on a disk
        html_context={"default_mode": "light"},
        html_theme_options={"use_download_button": False, "use_fullscreen_button": False, "show_navbar_depth": 1,
                            "footer_content_items": []},
        myst_enable_extensions=["dollarmath", "amsmath", "colon_fence"], myst_heading_anchors=3, myst_update_mathjax=False,
        nb_execution_mode="off", nb_merge_streams=True, nb_output_stderr="remove",
        nb_ipywidgets_js={name: {"defer": "defer"} for name in [*SCRIPTS, "start.js"]} if live else {})


def static_files(folder, scripts_at):
    "Style, the font of the formulas and, where widgets are live, their scripts"
    folder.mkdir(parents=True)
    (folder / "cape.css").write_text(STYLE)
    shutil.copy(Path(find_spec("ziamath").origin).parent / "fonts/STIXTwoMath-Regular.ttf", folder)
    if not scripts_at: return
    (folder / "start.js").write_text(START)
    for name in SCRIPTS: shutil.copy(scripts_at / name, folder)
    shutil.copy(Path(sysconfig.get_path("data")) / "share/jupyter/nbextensions/anywidget/index.js", folder / "anywidget.js")


def formula(display):
    "A writer of MathML for Sphinx: the browser draws it, no script is needed"
    def write(writer, node):
        from docutils.nodes import SkipNode
        from latex2mathml.converter import convert
        writer.body.append(convert(node.astext(), display=display))
        raise SkipNode
    return write, None


def setup(app):
    "Called by Sphinx: this file is an extension of it"
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    return dict(parallel_read_safe=True, parallel_write_safe=True)


def render(out, conf):
    "Run Sphinx; True if it had nothing to warn of"
    from sphinx.application import Sphinx
    from sphinx.util.console import nocolor
    if not sys.stdout.isatty(): nocolor()
    app = Sphinx(out / "source", None, out / "html", out / "doctrees", "html", confoverrides=conf, warningiserror=True,
                 freshenv=True, parallel=min(2, os.cpu_count() or 1))
    app.build()
    return app.statuscode == 0


def checked(out):
    "Look at every address of the built site; *Raises* `Fault`"
    from docs_links import check
    faults, external, pages, addresses = check(out / "html")
    (out / "external.txt").write_text("".join(f"{a}  {min(p)}\n" for a, p in sorted(external.items())))
    for fault in faults: print(fault)
    say(f"{pages} pages, {addresses} addresses checked; {len(external)} lead outside, not fetched: {out / 'external.txt'}")
    if faults: raise Fault(f"{len(faults)} addresses are broken")


def build(out, live=True):
    "The site in `out`/html; *Raises* `Fault`"
    if out != ROOT / "_docs" and out.exists() and any(out.iterdir()) and not (out / "doctrees").is_dir():
        raise Fault(f"{out} holds something else than a site; name an empty folder")
    lacking = [name for name in NEEDS if find_spec(name) is None]
    if lacking: raise Fault(f"{', '.join(lacking)} not installed: pip install -e '.[docs]'")
    for name in ("source", "html", "doctrees", "static", "jupyter_execute"): shutil.rmtree(out / name, ignore_errors=True)
    try: at = scripts(Path(sys.prefix) / "share/cape-docs") if live else None
    except Fault as e: at = say(f"{e} Widgets are pictures in this site.")
    say("reading chapters and modules")
    site = Site(out / "source", ROOT / "_docs/live" if at else None)
    count = site.build()
    static_files(out / "static", at)
    say(f"{count} pages, live widgets in {', '.join(site.widgets) or 'none'}; building")
    clean = render(out, settings(out / "static", at, site.package.__version__))
    checked(out)
    if not clean: raise Fault("Sphinx warned, see above")
    return out / "html/index.html"


def main(argv=None):
    "The command line; gives the exit code"
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--static", action="store_true", help="run no chapter: widgets are pictures")
    ap.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site (default: %(default)s)")
    args = ap.parse_args(argv)
    os.environ.setdefault("CAPE_PROGRESS", "off")
    try: say(f"The site: {build(args.out.resolve(), not args.static)}")
    except Fault as e:
        print(f"No site: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
