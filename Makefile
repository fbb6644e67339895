# One word a job: `make demo`, `make test`, `make lab`. `make` alone lists them.
# PYTHON is the Python to start from (3.10 or newer), VENV the environment's folder, ARGS what the job gets,
# JOBS how many tests run at once, each on one thread.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
JOBS   ?= 2
PY     := $(VENV)/bin/python
BIN    := $(VENV)/bin
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-browser test-gpu docs lab notebooks check clean distclean

help:  ## list the jobs
	@echo "make demo                  set up and run the example: data, training, evaluation, pictures"
	@echo "make demo ARGS='steps=50'  the same with other parameters (ARGS=--help lists them)"
	@echo "make test                  set up and run all tests and all chapters (ARGS='-k crops' runs some)"
	@echo "make test-slow             the tests that take minutes each: fifty kills, ten thousand bad files, new environments"
	@echo "make test-browser          the tests of the widgets in a real browser (installs Chromium)"
	@echo "make test-gpu              the tests that need a CUDA device"
	@echo "make docs                  the site of all chapters and the API, offline, with its links checked"
	@echo "make lab                   read and run the chapters in JupyterLab"
	@echo "make notebooks             after editing a chapter: export the package, clean, write README.md"
	@echo "make check                 does the package equal the notebooks, are they clean?"
	@echo "make clean                 remove what builds left; data/, runs/ and $(VENV) stay"
	@echo "make distclean             remove $(VENV) too"
	@echo
	@echo "PYTHON=python3.12 chooses the Python (3.10 or newer), VENV=folder the environment."

env:  ## the virtual environment; costs nothing when it is up to date
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) is not there: install Python 3.10 or newer, or make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" tools/environment.py "$(VENV)"

demo: env
	@"$(PY)" tools/run_notebook.py nbs/experiments/demo.ipynb $(ARGS)

test: env
	@"$(BIN)/cape" posezoo --size mini
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} "$(PY)" -m pytest -v -n $(JOBS) --dist worksteal --durations=12 -m "not slow and not gpu" $(ARGS)

test-slow: env
	@"$(PY)" -m pip install -q build mypy pip-audit
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} "$(PY)" -m pytest -v -m "slow and not gpu" $(ARGS)

docs: env
	@"$(PY)" -m pip install -q --no-build-isolation -e ".[docs]"
	@"$(PY)" tools/docs.py $(ARGS)

test-browser: env
	@"$(PY)" -m pip install -q --no-build-isolation -e ".[docs]" "playwright>=1.50"
	@command -v chromium >/dev/null || "$(PY)" -m playwright install --with-deps chromium
	@"$(PY)" -m pytest -v tests/browser $(ARGS)

test-gpu: env
	@"$(PY)" -m pytest -v -m gpu $(ARGS)

lab: env
	@cd nbs && "$(abspath $(PY))" -m jupyter lab $(ARGS)

notebooks: env
	@"$(BIN)/nbdev-export"
	@"$(BIN)/nbdev-test" nbs/index.ipynb --save --n-workers 0
	@"$(BIN)/nbdev-clean"
	@"$(PY)" tools/pages.py
	@"$(PY)" tools/check_notebooks.py

check: env
	@"$(PY)" tools/check_notebooks.py

clean:
	rm -rf build dist _docs _proc *.egg-info .pytest_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .venv -prune -o -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

distclean: clean
	@if [ ! -e "$(VENV)" ] || [ -e "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; \
	else echo "$(VENV) is no virtual environment; left alone"; fi
