"Every address in a built site: do the files and anchors exist, does a page need the network?"
import posixpath
from collections import defaultdict
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

LOADS = {"script": ("src",), "img": ("src",), "iframe": ("src",), "source": ("src",), "video": ("src",), "audio": ("src",),
         "object": ("data",), "link": ("href",)}
ONLY_NAMED = {"canonical", "next", "prev", "author", "license", "search", "index"}  # <link> that loads nothing


class Page(HTMLParser):
    "Anchors of a page, the addresses it links to and those it loads"
    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[k] for k in ("id", "name") if found.get(k)}
        if tag == "a" and found.get("href") is not None: self.links.append(found["href"])
        if tag == "link" and set((found.get("rel") or "").split()) & ONLY_NAMED: return
        self.loads += [found[k] for k in LOADS.get(tag, ()) if found.get(k)]

    handle_startendtag = handle_starttag


def check(site):
    "(faults as lines, {external address: pages}, pages, addresses looked at) of the folder `site`"
    files = {p.relative_to(site).as_posix(): p for p in site.rglob("*") if p.is_file()}
    pages = {name: Page(p.read_text(encoding="utf-8")) for name, p in files.items()
             if name.endswith(".html") and not name.startswith("_static/")}  # there: templates of the theme
    faults, external, count = [], defaultdict(set), 0
    for name, page in sorted(pages.items()):
        for address, loaded in [(a, False) for a in page.links] + [(a, True) for a in page.loads]:
            count += 1
            parts = urlsplit(address)
            if parts.scheme in ("data", "mailto", "javascript"): continue
            if parts.scheme or parts.netloc:
                if loaded: faults.append(f"{name}: loads {address}: the site would need the network")
                else: external[address].add(name)
                continue
            fault = look(name, unquote(parts.path), unquote(parts.fragment), files, pages)
            if fault: faults.append(f"{name}: {address}: {fault}")
    return list(dict.fromkeys(faults)), dict(external), len(pages), count


def look(page, path, anchor, files, pages):
    "What is wrong with an address on `page`, or None"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if path.endswith("/") or target == ".": target = posixpath.normpath(posixpath.join(target, "index.html"))
    if target not in files: return "no such file"
    if anchor and target in pages and anchor not in pages[target].anchors and anchor != "top": return "no such anchor"
