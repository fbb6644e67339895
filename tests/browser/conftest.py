"A real browser before a real JupyterLab on this machine. Skipped where playwright, JupyterLab or Chromium is not there."
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
HARMLESS = ("Failed to load resource", "favicon")  # what JupyterLab itself says on a good day


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: needs playwright and Chromium")


@pytest.fixture(scope="session")
def browser():
    "Headless Chromium"
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM: pytest.skip("no chromium on the PATH; $CHROMIUM may name one")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    "A page; errors in it fail the test"
    context, errors = browser.new_context(viewport=dict(width=1100, height=900)), []
    opened = context.new_page()
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda m: errors.append(m.text) if m.type == "error" and not any(h in m.text for h in HARMLESS) else None)
    yield opened
    context.close()
    assert not errors, errors


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    "A folder that JupyterLab serves"
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def lab(browser, served):
    "Gives the address of a notebook in `served`, in a JupyterLab of its own"
    for need in ("jupyterlab", "anywidget"):
        if importlib.util.find_spec(need) is None: pytest.skip(f"{need} is not installed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, base, log = secrets.token_hex(8), f"http://127.0.0.1:{port}", open(served / "server.log", "w")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={served}", *(["--allow-root"] if os.geteuid() == 0 else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(command, cwd=served, stdout=log, stderr=subprocess.STDOUT,
                              env=dict(os.environ, PYTHONPATH=path, CAPE_PROGRESS="off", OMP_NUM_THREADS="1"))
    try:
        until = time.time() + 120
        while True:
            try: urllib.request.urlopen(f"{base}/lab?token={token}", timeout=5).close(); break
            except OSError:
                if server.poll() is not None or time.time() > until: pytest.fail((served / "server.log").read_text()[-2000:])
                time.sleep(.3)
        yield lambda name: f"{base}/doc/tree/{name}?reset&token={token}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()
