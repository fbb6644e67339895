"The builder of the site: which pages there are, what becomes of a link and of a comment, what the link checker finds."
import importlib.util
import tarfile

import pytest
from conftest import ROOT

import docs
import docs_api
import docs_links


@pytest.fixture(scope="module")
def modules():
    import cape
    return docs_api.modules(cape)


@pytest.fixture(scope="module")
def names(modules):
    import cape
    return docs_api.full_names(modules, cape)


def test_every_notebook_is_a_page_and_stands_once_in_the_contents():
    pages = docs.chapters()
    found = {p for folder in ("nbs", "figures/results") for p in (ROOT / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert set(pages.values()) == found and list(pages)[0] == "index"
    contents = docs.contents(pages, ["data/README"])
    for page in [*pages, "data/README", "api/index"]:
        told = contents.count(f"<{page}>") + contents.count(f"\n{page}\n")
        assert told == (page != "index"), page


def test_every_public_name_is_described(modules, names):
    import cape
    for name, module in modules.items():
        page = docs_api.page(module, names)
        for n in module.__all__: assert f"}} {n}" in page, f"{name}.{n}"
    start = docs_api.index(modules, cape)
    for n in cape._WHERE: assert f"`cape.{n} <" in start


def test_comments_of_a_signature_become_a_table(names):
    def crop(
        box: tuple,             # x, y, width | height of *one* box in [0, 1]
        size: int = 96,         # as `create_model` wants it
        fill: float = None,
    ) -> "list":                # (S,S,3) uint8
        "What is in the box. *Raises* `ConfigError`."
    said = docs_api.described("function", "crop", crop, names)
    assert said.startswith(":::{py:function} crop(box, size=96, fill=None)")
    assert r"| `box` | `tuple` | x, y, width \| height of \*one\* box in \[0, 1\] |" in said
    assert "as {py:obj}`create_model <cape.models.base.create_model>` wants it" in said
    assert "| **returns** | `list` | (S,S,3) uint8 |" in said
    assert "*Raises* {py:obj}`ConfigError <cape.errors.ConfigError>`." in said
    def bare(a, b=1): "Nothing is said of the arguments."
    assert docs_api.table(bare, names) == ""


def test_names_are_linked_in_prose_only(names):
    text = "# `ConfigError`\n`ConfigError`, [`ConfigError`](x.md), ``ConfigError``, `WHITE`\n```\n`ConfigError`\n```\n"
    assert docs_api.link_names(text, names).count("{py:obj}") == 1      # WHITE stands in two modules
    assert docs_api.link_names("`ConfigError`", names) == "{py:obj}`ConfigError <cape.errors.ConfigError>`"


def test_links_lead_from_the_root_of_the_site(tmp_path):
    site = docs.Site(tmp_path)
    assert site.text("[a](12_prototypes.ipynb#x) ![b](../figures/speed.png) [c](https://a.b/c) [d](#d)", "nbs") == (
        "[a](/12_prototypes.ipynb#x) ![b](/figures/speed.png) [c](https://a.b/c) [d](#d)")
    assert site.text("[a](../12_prototypes.ipynb) [b](demo.ipynb)", "nbs/experiments") == (
        "[a](/12_prototypes.ipynb) [b](/experiments/demo.ipynb)")
    assert site.text("`stages[i](x)` and `WHITE`", "nbs") == "`stages[i](x)` and `WHITE`"
    assert (tmp_path / "figures/speed.png").exists() and not site.copied
    site.text("[data](../data/README.md)", "nbs")
    assert site.copied == ["data/README"]


def test_hidden_cells_and_directives_are_left_out(tmp_path):
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    import nbformat
    markdown = new_output("display_data", data={"text/markdown": "| [a](12_prototypes.ipynb) |\n|---|\n"})
    cells = [new_markdown_cell("# name"), new_code_cell("#| default_exp metrics"),
             new_code_cell("#| hide\nimport secret"),
             new_code_cell("#| export\nx = 1"), new_code_cell("#| echo: false\ny = 2", outputs=[markdown])]
    path = ROOT / "nbs/12_prototypes.ipynb"
    here = tmp_path / "nbs"
    here.mkdir()
    nbformat.write(new_notebook(cells=cells), here / path.name)
    site = docs.Site(tmp_path / "source")
    old, docs.ROOT = docs.ROOT, tmp_path
    try: assert site.chapter("12_prototypes", here / path.name) == "cape.metrics"
    finally: docs.ROOT = old
    made = nbformat.read(tmp_path / "source/12_prototypes.ipynb", 4).cells
    assert [c.source for c in made] == ["# name", "*Module*: {py:mod}`cape.metrics`", "x = 1", "y = 2",
                                        "| [a](/12_prototypes.ipynb) |\n|---|\n"]
    assert made[3].metadata.tags == ["remove-input"] and not made[3].outputs


def test_broken_addresses_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        "<h1 id=top1><a href='sub/a.html#here'>1</a><a href=#top1>2</a><img src='data:image/png;base64,AA'>"
        "<a href='https://example.org/x'>3</a><a href='sub/'>4</a><a href='sub/a.html?v=1'>5</a><link rel=canonical href='https://a.b/'>")
    (tmp_path / "sub/a.html").write_text("<p id=here><a href='../index.html'>up</a></p>")
    (tmp_path / "sub/index.html").write_text("<img src='../a%20b.png'/>")
    (tmp_path / "a b.png").write_bytes(b"")
    faults, external, pages, count = docs_links.check(tmp_path)
    assert (faults, set(external), pages) == ([], {"https://example.org/x"}, 3) and count == 8
    (tmp_path / "bad.html").write_text("<a href='gone.html'></a><a href='sub/a.html#gone'></a><a href=#gone></a>"
                                       "<img src='gone.png'><script src='https://cdn.example.org/x.js'></script>"
                                       "<link rel=stylesheet href='//cdn.example.org/x.css'>")
    faults = docs_links.check(tmp_path)[0]
    assert len(faults) == 6 and all(f.startswith("bad.html: ") for f in faults)
    assert sum("no such file" in f for f in faults) == 2 and sum("no such anchor" in f for f in faults) == 2
    assert sum("would need the network" in f for f in faults) == 2


def test_a_foreign_script_is_refused_and_offline_is_said(tmp_path, monkeypatch):
    def packed(package, version, folder):
        (folder / "f.js").write_text("alert(1)")
        with tarfile.open(folder / "package.tgz", "w:gz") as archive:
            for _, _, member, _ in docs.SCRIPTS.values(): archive.add(folder / "f.js", f"package/{member}")
        return folder / "package.tgz"
    monkeypatch.setattr(docs, "fetch", packed)
    with pytest.raises(docs.Fault, match="is not the file it should be"): docs.scripts(tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr(docs.shutil, "which", lambda name: None)
    def offline(address, to): raise OSError("no route")
    monkeypatch.setattr(docs, "urlretrieve", offline)
    with pytest.raises(docs.Fault, match="is the network there"): docs.scripts(tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "html").mkdir()
    (tmp_path / "html/mine.txt").write_text("kept")
    assert docs.main(["--out", str(tmp_path)]) == 1 and (tmp_path / "html/mine.txt").exists()
    said = capsys.readouterr().err
    assert "holds something else than a site" in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_whole_site_builds_without_live_widgets(tmp_path, capsys):
    for need in docs.NEEDS:
        if importlib.util.find_spec(need) is None: pytest.skip(f"{need} is not installed: pip install -e '.[docs]'")
    assert docs.main(["--static", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "live widgets in none" in said and str(tmp_path / "html/index.html") in said
    page = (tmp_path / "html/12_prototypes.html").read_text()
    assert "#| " not in page and "<math" in page
    page = (tmp_path / "html/12_prototypes.html")
    page.write_text(page.read_text().replace("api/cape.models.prototype.html", "gone.html"))
    with pytest.raises(docs.Fault, match="broken"): docs.checked(tmp_path)
