"The API reference as MyST Markdown: a page a module, from docstrings and the comments beside the arguments."
import importlib
import inspect
import pkgutil
import re
from dataclasses import is_dataclass
from functools import cached_property

from fastcore.docments import docments

CODE = re.compile(r"(?<![`\[{}])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]])")
SPECIAL = re.compile(r"([\\*_<>$|\[\]{}#~])")


def modules(package):
    "Every module of `package` that exports names, imported, by its name"
    names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".") if "._" not in m.name]
    found = {name: importlib.import_module(name) for name in names}
    return {name: m for name, m in found.items() if getattr(m, "__all__", None)}


def full_names(mods, package):
    "{a name as people write it: where it is defined}, for names that mean one thing"
    found, twice = {}, set()
    for name, m in mods.items():
        found[name] = name
        for n in m.__all__: twice.add(n) if n in found else found.update({n: f"{name}.{n}"})
    found = {n: full for n, full in found.items() if n not in twice}
    for module, names in package._PUBLIC.items():
        found |= {k: f"{module}.{n}" for n in names for k in (n, f"{package.__name__}.{n}")}
    return found


def link_names(text, names):
    "`text` with every `name` in backticks that is in `names` made a link; fences and headings are left alone"
    parts = re.split(r"(^```.*?^```|^#.*?$)", text, flags=re.M | re.S)
    return "".join(part if i % 2 else CODE.sub(
        lambda m: f"{{py:obj}}`{m[0].strip('`')} <{names[m[1]]}>`" if m[1] in names else m[0], part)
        for i, part in enumerate(parts))


def plain(text, names):
    "A comment of the source as one cell of a Markdown table: only backticks mean something"
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(link_names(p, names).replace("|", "\\|") if i % 2 else SPECIAL.sub(r"\\\1", p)
                   for i, p in enumerate(parts))


def shown(value, most=60):
    "A value in one short line"
    text = " ".join(re.sub(r"<[^<>]*>", "...", repr(value)).split())
    return text if len(text) <= most else text[:most - 4].rstrip() + " ..."


def kind(annotation):
    "A type in words"
    if annotation in (inspect.Parameter.empty, None): return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation).replace("NoneType", "None")


def signature(thing):
    "Names and defaults of the arguments; types are in the table"
    try: found = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError): return "()"
    bare = [p.replace(annotation=p.empty) for p in found if p.name != "self"]
    return re.sub(r"=(<[^<>]*>)", "=...", str(inspect.Signature(bare))).replace("\n", " ")


def table(thing, names):
    "Parameters and result of `thing`, where its source says something about them"
    if isinstance(thing, type) and not is_dataclass(thing) and "__init__" not in vars(thing): return ""
    try: known = docments(thing, full=True, returns=True)
    except (TypeError, OSError, SyntaxError, ValueError): return ""
    rows = []
    for name, doc in known.items():
        typed = "" if name == "return" and doc.anno is None else kind(doc.anno)
        if name in ("self", "cls") or name == "return" and isinstance(thing, type) or not (doc.docment or typed): continue
        label = "**returns**" if name == "return" else f"`{name}`"
        typed = f"`{typed}`".replace("|", "\\|") if typed else ""
        rows.append(f"| {label} | {typed} | {plain(doc.docment or '', names)} |")
    said = any(doc.docment for doc in known.values())
    return "\n".join(["| argument | type | meaning |", "|---|---|---|", *rows, ""]) if said else ""


def directive(role, head, body, colons=3):
    "A description of the Python domain"
    return f"{':' * colons}{{py:{role}}} {head}\n{body.strip()}\n{':' * colons}\n"


def described(role, name, thing, names, inside="", colons=3):
    "Heading, docstring and table of one function, class or method"
    doc = inspect.cleandoc(thing.__doc__ or "")
    text = link_names(re.sub(r"(?<!\\)\$", r"\\$", doc), names)
    head = name if role in ("property", "attribute") else name + signature(thing)
    options = ":classmethod:\n" if inspect.ismethod(thing) else ""
    body = "" if role == "property" else table(thing, names)
    return directive(role, head, f"{options}\n{text}\n\n{body}\n{inside}", colons)


def methods(cls, names):
    "The methods and properties that `cls` itself defines and documents"
    parts = []
    for name, raw in vars(cls).items():
        if name.startswith("_"): continue
        prop = isinstance(raw, (property, cached_property))
        thing = raw if prop else getattr(cls, name)
        if not (prop or inspect.isroutine(thing)) or not thing.__doc__: continue
        parts.append(described("property" if prop else "method", name, thing, names))
    return "\n".join(parts)


def entry(module, name, names):
    "One exported name"
    thing = getattr(module, name)
    if isinstance(thing, type): return described("class", name, thing, names, methods(thing, names), 4)
    if inspect.isroutine(thing) or hasattr(thing, "__wrapped__"): return described("function", name, thing, names)
    return directive("data", name, f":value: {shown(thing)}")


def page(module, names, chapter=None):
    "The page of a module: what it is, its functions and classes, its constants"
    said = link_names(inspect.cleandoc(module.__doc__ or "").split("\n")[0], names)
    where = f"\n\nExplained in the chapter [{chapter}](/{chapter}.ipynb)." if chapter else ""
    ordered = sorted(module.__all__, key=lambda n: not callable(getattr(module, n)))  # constants last
    body = "\n".join(entry(module, n, names) for n in ordered)
    return f"# {module.__name__}\n\n{said}{where}\n\n:::{{py:module}} {module.__name__}\n:::\n\n{body}"


def index(mods, package):
    "The first page: what `import cape` offers, and all modules"
    rows = [f"| {{py:obj}}`{package.__name__}.{n} <{m}.{n}>` | {first_line(getattr(mods[m], n), mods, package)} |"
            for m, names in package._PUBLIC.items() for n in names]
    return "\n".join([
        "# API", "", f"What a user types is in `{package.__name__}` itself, imported when it is first asked for:", "",
        "| name | what it is |", "|---|---|", *rows, "",
        "## Modules", "", "```{toctree}", ":maxdepth: 1", "", *sorted(mods), "```", ""])


def first_line(thing, mods, package):
    "What a docstring says first; nothing for a constant"
    documented = isinstance(thing, type) or inspect.isroutine(thing)
    return plain((inspect.getdoc(thing) or "").split("\n")[0], full_names(mods, package)) if documented else ""
