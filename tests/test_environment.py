"The set-up that every make target begins with: idle when there is nothing to do, clear about what is wrong."
import subprocess
import sys

import environment
import pytest
from conftest import ROOT


@pytest.fixture
def venv(tmp_path, monkeypatch):
    "A folder that passes for an environment, and a list of what would have been installed into it"
    folder, calls = tmp_path / "venv", []
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").touch()
    (folder / "pyvenv.cfg").touch()
    monkeypatch.setattr(environment, "works", lambda venv: True)
    monkeypatch.setattr(environment, "pip", lambda python, *args: calls.append(args))
    monkeypatch.setattr(sys, "argv", ["environment.py", str(folder)])
    return folder, calls


def test_second_run_installs_nothing(venv):
    environment.main()
    assert ("--no-build-isolation", "--editable", ".[dev]") in venv[1]
    venv[1].clear()
    environment.main()
    assert venv[1] == []


@pytest.mark.parametrize("name", environment.SOURCES)
def test_changed_requirements_are_installed(venv, name, tmp_path, monkeypatch):
    for f in environment.SOURCES: (tmp_path / f).write_bytes((ROOT / f).read_bytes())
    monkeypatch.setattr(environment, "ROOT", str(tmp_path))
    environment.main()
    venv[1].clear()
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    environment.main()
    assert len(venv[1]) == 2


def test_interrupted_installation_is_taken_up_again(venv, monkeypatch):
    environment.main()
    (venv[0] / environment.STAMP).write_text("{")

    def interrupted(python, *args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(environment, "pip", interrupted)
        with pytest.raises(KeyboardInterrupt): environment.main()
    assert not (venv[0] / environment.STAMP).exists()
    venv[1].clear()
    environment.main()
    assert len(venv[1]) == 2 and (venv[0] / environment.STAMP).exists()


def test_old_python_gets_a_clear_answer(venv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit) as e: environment.main()
    assert e.value.code == 1 and "This is Python 3.9" in capsys.readouterr().err and venv[1] == []


def test_missing_ensurepip_gets_a_clear_answer(venv, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\necho 'ensurepip is not available'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(environment, "works", lambda venv: False)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(SystemExit): environment.main()
    said = capsys.readouterr().err
    assert "ensurepip is not available" in said and "apt install python3" in said


def test_folder_that_is_no_environment_is_left_alone(venv, monkeypatch, capsys):
    monkeypatch.setattr(environment, "works", lambda venv: False)
    (venv[0] / "pyvenv.cfg").unlink()
    (venv[0] / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit): environment.main()
    assert "is no virtual environment" in capsys.readouterr().err and (venv[0] / "thesis.tex").exists()


def test_make_names_a_python_that_is_not_there(tmp_path):
    command = ["make", "env", "PYTHON=no-python", f"VENV={tmp_path / 'v'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "no-python is not there" in done.stderr
