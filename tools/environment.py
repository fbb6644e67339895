"""Make the virtual environment, or leave it as it is when nothing it depends on has changed.

Runs under any Python 3, so that an old one gets a clear answer. Called by the Makefile."""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCES = ["settings.ini", "setup.py", "pyproject.toml"]
STAMP = ".cape-installed.json"


def fail(text):
    "Say what is wrong and what to do, and stop"
    sys.stderr.write("\n" + text + "\n")
    sys.exit(1)


def check_python():
    "Stop unless this is Python 3.10 or newer"
    if sys.version_info >= (3, 10): return
    fail("This is Python %d.%d (%s); cape needs 3.10 or newer.\nName one that is: make PYTHON=python3.12 demo"
         % (sys.version_info[0], sys.version_info[1], sys.executable))


def wanted(venv, extras):
    "What the stamp of a finished installation says"
    text = b"".join(open(os.path.join(ROOT, f), "rb").read() for f in SOURCES)
    return {"sources": hashlib.sha256(text).hexdigest(), "root": ROOT, "venv": venv, "extras": extras}


def read_stamp(venv):
    "The stamp of the last finished installation, {} if there is none"
    try:
        with open(os.path.join(venv, STAMP)) as f: return json.load(f)
    except (IOError, ValueError): return {}


def works(venv):
    "True if `venv` has a Python with pip"
    command = [os.path.join(venv, "bin", "python"), "-m", "pip", "--version"]
    try: return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError: return False


def make_venv(venv):
    "Make `venv` anew; a folder that holds something else is left alone"
    if os.path.isdir(venv) and os.listdir(venv) and not os.path.exists(os.path.join(venv, "pyvenv.cfg")):
        fail("%s is there but is no virtual environment: remove it, or name another:\n"
             "  make VENV=.venv2 demo" % venv)
    print("Making the virtual environment %s with Python %s" % (venv, sys.version.split()[0]), flush=True)
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", venv], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode == 0 and works(venv): return
    fail("%s -m venv failed:\n%s\nIts venv or ensurepip module seems to be missing. On Debian and Ubuntu:\n"
         "  sudo apt install python%d.%d-venv\nor name another Python: make PYTHON=/path/to/python3 demo"
         % (sys.executable, done.stdout.strip(), sys.version_info[0], sys.version_info[1]))


def pip(python, *args):
    "Run pip in the environment, its progress on the terminal"
    command = [python, "-m", "pip", "--disable-pip-version-check", "install"] + list(args)
    if subprocess.call(command, cwd=ROOT) == 0: return
    fail("pip could not install the requirements (see above). The package index must be reachable;\n"
         "run the same command again to go on where it stopped.")


def main():
    "Bring the environment up to date and write the stamp last, so that an interrupted run is taken up again"
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("venv", help="folder of the environment")
    ap.add_argument("--extras", default="dev", help="extras of setup.py to install, separated by commas")
    args = ap.parse_args()
    check_python()
    venv = os.path.abspath(args.venv)
    python, stamp = os.path.join(venv, "bin", "python"), os.path.join(venv, STAMP)
    want, have = wanted(venv, args.extras), read_stamp(venv)
    if os.path.exists(python) and have == want: return
    start = time.time()
    moved = have and (have["root"], have["venv"]) != (want["root"], want["venv"])
    if moved: print("%s was made for another folder (%s)" % (venv, have["root"]))
    if moved or not works(venv): make_venv(venv)
    if os.path.exists(stamp): os.remove(stamp)
    print("Installing cape and what it needs; the first time takes some minutes (torch is large)", flush=True)
    pip(python, "--quiet", "pip>=22", "setuptools>=77", "wheel")
    pip(python, "--no-build-isolation", "--editable", ".[%s]" % args.extras)
    with open(stamp, "w") as f: json.dump(want, f, indent=1)
    print("The environment is ready after %.0f s" % (time.time() - start), flush=True)


if __name__ == "__main__":
    try: main()
    except KeyboardInterrupt: fail("Interrupted; run the same command again to go on.")
