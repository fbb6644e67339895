"Write README.md from nbs/index.ipynb, its pictures to figures/readme_*.png, with nbconvert alone."
import argparse
import posixpath
import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor

DIRECTIVE = re.compile(r"^#\s*\|\s*(\w+)(?::\s*(\w+))?[^\n]*\n?", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)(\))")
DROP = {"hide", "default_exp"}


def at_root(text, folder):
    "Links of `text` relative to `folder`, made relative to the repository"
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2])) + m[3], text)


class Directives(Preprocessor):
    "Drop cells marked `hide`, the source of those marked `echo: false`, and the directives of the others"
    def preprocess(self, nb, resources):
        keep = []
        for cell in nb.cells:
            found = dict(DIRECTIVE.findall(cell.source)) if cell.cell_type == "code" else {}
            if DROP & set(found): continue
            cell.source = DIRECTIVE.sub("", cell.source) if found else cell.source
            if found.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}
            keep.append(cell)
        nb.cells = keep
        nb.metadata.setdefault("language_info", {"name": "python"})  # for the fences
        return nb, resources


def readme(root):
    "README.md as text and its pictures as {path: bytes}"
    exporter = MarkdownExporter(preprocessors=[Directives])
    text, resources = exporter.from_filename(str(root / "nbs" / "index.ipynb"))
    pictures = {f"figures/readme_{name}": data for name, data in resources["outputs"].items()}
    for name in resources["outputs"]: text = text.replace(f"({name})", f"(../figures/readme_{name})")
    return re.sub(r"\n{3,}", "\n\n", at_root(text, "nbs")).strip() + "\n", pictures


def write(root):
    "Write them below `root`; pictures of an earlier README go"
    text, pictures = readme(root)
    for old in (root / "figures").glob("readme_*"): old.unlink()
    for name, data in pictures.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    (root / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    write(ap.parse_args().root)
