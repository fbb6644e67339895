"Known vulnerabilities in what the package requires, by pip-audit, where a source of advisories can be reached."
import importlib.util
import json
import re
import subprocess
import sys
import urllib.request
from importlib import metadata

import pytest
from environments import CFG, lowest
from packaging.requirements import Requirement
from packaging.version import Version

# The first version without the faults that were known on 21 November 2026 and that matter here, for machines from which no
# source of advisories can be reached. This package reads photos and weights that come from elsewhere.
FIXED = {
    "torch": ("2.10", "CVE-2025-32434, CVE-2026-24747: torch.load with weights_only=True ran code, wrote beyond memory"),
    "pillow": ("13.0", "CVE-2026-112398, CVE-2026-112403: its JPEG decoder wrote beyond memory; many before them"),
    "scikit-learn": ("1.5", "CVE-2024-5206"), "tqdm": ("4.66.3", "CVE-2024-34062")}


def required(names):
    "Name -> installed version of what is required, and of what that requires"
    found, todo = {}, list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", todo.pop())[0]).lower()
        if name in found: continue
        try: found[name] = metadata.version(name)
        except metadata.PackageNotFoundError: continue                   # of another platform
        todo += [r for r in metadata.requires(name) or [] if "extra ==" not in r]
    return found


def audit(versions, folder):
    "Package -> identifiers of advisories; what could not be looked up is left out"
    (folder / "pins.txt").write_text("\n".join(f"{n}=={v.split('+')[0]}" for n, v in versions.items()))
    done = subprocess.run([sys.executable, "-m", "pip_audit", "-r", folder / "pins.txt", "--no-deps", "--disable-pip",
                           "-f", "json", "--progress-spinner", "off"], capture_output=True, text=True, timeout=500)
    try: rows = json.loads(done.stdout)["dependencies"]
    except ValueError: return {}
    return {row["name"]: [v["id"] for v in row["vulns"]] for row in rows if "vulns" in row}


def newest(name):
    "Newest version of a project and the advisories about it, from its page in the registry; None if it can't be had"
    try:
        with urllib.request.urlopen(f"https://pypi.org/pypi/{name}/json", timeout=30) as page: told = json.load(page)
    except (OSError, ValueError): return None
    return told["info"]["version"], [v["id"] for v in told.get("vulnerabilities") or [] if not v.get("withdrawn")]


def judged(versions, look=newest):
    "Name -> advisories of what is installed in its newest version; list of what is not, or has no page"
    pages = {n: look(n) for n in versions}
    known = {n: p[1] for n, p in pages.items() if p and Version(p[0]) == Version(versions[n].split("+")[0])}
    return known, sorted({*versions} - {*known})


def test_requirements_are_followed_through():
    found = required(CFG["requirements"].split())
    assert {"torch", "numpy", "pillow", "filelock", "jinja2", "markupsafe"} <= set(found)  # the last three by way of torch


def test_what_is_installed_is_past_known_faults():
    for name, (version, why) in FIXED.items(): assert Version(metadata.version(name)) >= Version(version), f"{name}: {why}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED)
def test_no_version_with_known_faults_is_allowed(name):
    "A user of an old environment keeps what the lower bound admits"
    here = [Requirement(line) for line in lowest(CFG["requirements"])]                 # on this Python
    bound = {r.name: str(r.specifier)[2:] for r in here if not r.marker or r.marker.evaluate()}[name]
    assert Version(bound) >= Version(FIXED[name][0]), f"{name}>={bound} admits {FIXED[name][1]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_known_vulnerability(tmp_path):
    if not importlib.util.find_spec("pip_audit"): pytest.skip("pip-audit is not installed")
    known = audit({"jinja2": "2.4.1"}, tmp_path)                         # has several
    if not known.get("jinja2"): pytest.skip("pip-audit cannot look up single versions from here")
    versions = required(CFG["requirements"].split())
    found = audit(versions, tmp_path)
    assert len(found) > 0.8 * len(versions), f"looked up {len(found)} of {len(versions)}"
    assert {n: ids for n, ids in found.items() if ids} == {}


@pytest.mark.slow
def test_no_known_vulnerability_of_the_newest():
    "A registry that does not answer for single versions may answer for the newest"
    if not (known := newest("pycrypto")): pytest.skip("the registry's pages of projects cannot be reached from here")
    assert len(known[1]) > 1, "pycrypto, abandoned with its faults, is not recognised: the pages do not tell advisories"
    found, rest = judged(required(CFG["requirements"].split()))
    print(f"{len(found)} packages in their newest version, not looked up: {', '.join(rest) or 'none'}")
    assert len(found) > 0.8 * (len(found) + len(rest)), f"not the newest: {rest}"
    assert {n: ids for n, ids in found.items() if ids} == {}


def test_the_newest_is_told_from_the_rest():
    pages = dict(a=("2.0", ["X-1"]), b=("2", []), c=("3", ["X-2"]), d=None)
    assert judged(dict(a="2.0", b="2.0+cpu", c="2.9", d="1"), pages.get) == ({"a": ["X-1"], "b": []}, ["c", "d"])


def test_an_advisory_is_seen(tmp_path, monkeypatch):
    "With a pip-audit that knows of one, and could not look one up"
    rows = [dict(name="a", version="1", vulns=[dict(id="X-1")]), dict(name="b", version="1", vulns=[]),
            dict(name="c", skip_reason="not found")]
    (tmp_path / "pip_audit.py").write_text(f"import json; print(json.dumps(dict(dependencies={rows!r})))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert audit(dict(a="1", b="1", c="1"), tmp_path) == {"a": ["X-1"], "b": []}
    (tmp_path / "pip_audit.py").write_text("raise SystemExit('no network')")
    assert audit(dict(a="1"), tmp_path) == {}
