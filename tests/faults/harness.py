"""What the tests of faults share: processes to kill, folders that are full or closed, limits, and the record of what was tried.

Run as a script this file is a server: it imports torch and cape once, then forks a process for each job it is told, so that a
job costs its own work and not ten seconds of imports. Every job leads a process group of its own.
"""
import contextlib
import fcntl
import functools
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "figures" / "results" / "faults.json"
SEED = 20261121


# ---- the record

@functools.cache
def begun():
    "Versions and commit, asked for when the tests begin: the record of the first of them changes the tree"
    from cape.evaluation import provenance
    return provenance()

def record(section, **values):
    "Write what a long test found into figures/results/faults.json, each section with commit, date and seed"
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)     # two tests may end at once
        file.seek(0)
        known = json.loads(file.read() or "{}")
        known[section] = values | dict(seed=SEED, date=str(date.today()), **begun())
        file.truncate(0)
        file.write(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"{section}: {json.dumps(values)}")


# ---- jobs, each in a process that may be killed

class Jobs:
    "Runs functions of `tests/faults/jobs.py` in forked processes, and kills them"
    def __init__(self):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", CAPE_PROGRESS="off", PYTHONPATH=paths)
        self.server = subprocess.Popen([sys.executable, "-m", "faults.harness"], env=env, text=True, bufsize=1,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer(120)

    def _answer(self, seconds):
        if not select.select([self.server.stdout], [], [], seconds)[0]: raise TimeoutError("the server of jobs is silent")
        return json.loads(self.server.stdout.readline())

    def start(self, job, said, *args):
        "Process id of `jobs.job(*args)`; what it prints goes to the file `said`"
        self.server.stdin.write(json.dumps([job, str(said), [str(a) if isinstance(a, Path) else a for a in args]]) + "\n")
        self.pid = self._answer(60)
        return self.pid

    def wait(self, seconds=120):
        "Its exit code, negative for a signal"
        try: code = self._answer(seconds)
        except TimeoutError:
            os.killpg(self.pid, signal.SIGKILL)
            raise
        self.server.stdin.write("seen\n")
        return code

    def run(self, job, said, *args, kill_after=None):
        "The exit code, after `kill -9` of the whole group if it is still at work after so many seconds; and the seconds"
        begin = time.perf_counter()
        pid = self.start(job, said, *args)
        if kill_after is not None:
            time.sleep(kill_after)
            os.killpg(pid, signal.SIGKILL)   # the number of a job that has ended is its own until its exit code is seen
        return self.wait(), time.perf_counter() - begin

    def close(self):
        self.server.stdin.close()
        self.server.kill()
        self.server.wait()


def survive(jobs, job, args, folder, kills, check, compare):
    """`job(folder, *args)` killed at random moments `kills` times, gone on with each time, and compared when it gets to its end.

    `check(folder)` looks at what a kill left. Gives the counts."""
    rng, killed, finished = random.Random(SEED), 0, 0
    whole = folder / "whole"
    code, seconds = jobs.run(job, folder / "whole.txt", whole, *args)
    assert code == 0, (folder / "whole.txt").read_text()[-3000:]
    while killed < kills:
        place = folder / f"killed{finished}"
        while True:
            limit = rng.uniform(0, seconds) if killed < kills else None
            code, _ = jobs.run(job, folder / "said.txt", place, *args, kill_after=limit)
            if code == 0: break
            assert code == -signal.SIGKILL, (folder / "said.txt").read_text()[-3000:]
            killed += 1
            if place.exists(): check(place)
        compare(whole, place)
        finished += 1
    return dict(killed=killed, resumed_to_the_end=finished, seconds_uninterrupted=round(seconds, 2))


def serve():
    "Read jobs, fork, tell the process id, then the exit code"
    import faults.jobs as jobs
    jobs.prepare()
    print("0", flush=True)
    while line := sys.stdin.readline():
        job, said, args = json.loads(line)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os._exit(jobs.run(job, args))
        with contextlib.suppress(OSError): os.setpgid(pid, pid)     # whoever is first
        print(pid, flush=True)
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        print(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, flush=True)
        sys.stdin.readline()
        os.waitpid(pid, 0)


# ---- places that refuse

def mounted(folder, *options):
    "Mount a file system in memory on `folder`; whether that was possible"
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    try: return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError: return False

@contextlib.contextmanager
def small_disk(folder, kilobytes):
    "A folder with room for so many kB; None where none can be mounted"
    folder.mkdir()
    there = mounted(folder, f"size={kilobytes}k")
    try: yield folder if there else None
    finally:
        if there: subprocess.run(["umount", "-l", str(folder)])

@contextlib.contextmanager
def closed_folder(folder):
    "A folder that cannot be written, by its mode or, for root, by how it is mounted; None where neither is possible"
    folder.mkdir()
    folder.chmod(0o555)
    there = os.access(folder, os.W_OK) and mounted(folder, "ro", "size=100k")
    try: yield None if os.access(folder, os.W_OK) else folder
    finally:
        if there: subprocess.run(["umount", "-l", str(folder)])
        folder.chmod(0o755)


# ---- limits on one input

class TooSlow(BaseException): pass

@contextlib.contextmanager
def at_most(seconds):
    "Raise `TooSlow` in what takes longer"
    def strike(*_): raise TooSlow(f"more than {seconds} s")
    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

class Peak:
    "The most memory that this process has held since, in bytes"
    def __init__(self):
        self.held = self._read("VmRSS")
        with open("/proc/self/clear_refs", "w") as file: file.write("5")      # sets the high-water mark back
    def _read(self, name): return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    def grown(self): return self._read("VmHWM") - self.held


if __name__ == "__main__": serve()
