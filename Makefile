# make notebook   set up, run the notebook top to bottom, write experiments/Assignment4.{ipynb,html}
# make test       set up, run all the tests
# The others are below. PYTHON=python3.12 picks the interpreter.

PYTHON ?= python3
NET ?= dncnn
VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/.ready
VERSIONS =
NOTEBOOK = Assignment4.ipynb

bsds300_is_here = { [ -n "$$BSDS300" ] || [ -d BSDS300/images ]; }

# Runs without a person: no progress bars. JupyterLab (make lab) shows them.
headless = TQDM_DISABLE=1 $(PY)

.PHONY: help setup notebook refresh lab test test-lowest lint nbval train results ablation benchmark soak clean

help:
	@echo 'make notebook   run the notebook top to bottom; the result is in experiments/'
	@echo 'make test       run all the tests'
	@echo 'make test-lowest  run them with the lowest versions that are allowed, without the notebook'
	@echo 'make lab        open the notebook in JupyterLab'
	@echo 'make refresh    run the notebook and renew the outputs stored in it'
	@echo 'make nbval      only the comparison of the notebook with its stored outputs'
	@echo 'make train NET=dncnn|udncnn|dudncnn, make results, make benchmark, make soak, make lint, make clean'
	@echo 'make ablation   what skips, dilation and pooling give (RETRAIN=1: hours of training)'

setup: $(READY)

$(READY): requirements.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo 'There is no $(PYTHON). Install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3'; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  "$(PYTHON)" --version; echo 'Python 3.10 or newer is needed. Name another one: make PYTHON=python3.12'; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'This Python has no venv. On Debian and Ubuntu: apt install python3-venv, then run make again.'; exit 1; }
	@echo 'Setting up $(VENV), once. PyTorch is a large download.'
	@[ ! -e $(VENV) ] || [ "$$($(PY) --version 2>&1)" = "$$("$(PYTHON)" --version)" ] || rm -rf $(VENV)
	"$(PYTHON)" -m venv $(VENV)
	sed '$(VERSIONS)' requirements.txt > $(VENV)/requirements.txt
	$(PY) -m pip install --disable-pip-version-check -r $(VENV)/requirements.txt
	@touch $@

notebook: $(READY)
	$(headless) tests/run_notebook.py $(NOTEBOOK)

refresh: $(READY)
	@$(bsds300_is_here) || { \
	  echo 'The stored outputs are those of BSDS300, which is not here. Name its folder:'; \
	  echo 'make refresh BSDS300=FOLDER, or fetch it: $(PY) -m denoising_utils fetch'; exit 1; }
	$(headless) tests/run_notebook.py $(NOTEBOOK) --in-place

lab: $(READY)
	$(PY) -m jupyter lab $(NOTEBOOK)

test: lint
	$(headless) -m pytest tests
	@$(MAKE) --no-print-directory nbval

# The lowest versions that requirements.txt allows, in an environment of their own. Python 3.10 or 3.11:
# the old versions of scipy and scikit-learn were not built for later ones.
test-lowest:
	@$(MAKE) --no-print-directory VENV=.venv-lowest VERSIONS='s/>=/==/' setup
	TQDM_DISABLE=1 .venv-lowest/bin/python -m pytest tests --ignore tests/test_browser.py

lint: $(READY)
	$(PY) -m ruff check .

# Every output with BSDS300 at hand; without it, only what does not depend on the photographs.
nbval: $(READY)
	@if $(bsds300_is_here); then \
	  echo 'nbval: strict, BSDS300 is at hand: outputs are compared with the stored ones.'; \
	  $(headless) -m pytest --nbval $(NOTEBOOK); \
	else \
	  echo 'nbval: lax, no BSDS300 here: all cells must run, only marked outputs are compared.'; \
	  $(headless) -m pytest --nbval-lax $(NOTEBOOK); \
	fi

train: $(READY)
	$(PY) -m denoising_utils train --net $(NET)

results: $(READY)
	$(PY) -m denoising_utils evaluate
	$(PY) -m denoising_utils levels $(if $(RETEST),--retest)

ablation: $(READY)
	$(headless) -m denoising_utils ablation $(if $(RETRAIN),--retrain)

benchmark: $(READY)
	$(PY) tests/benchmark.py

# 100 trainings killed and 100 interrupted twice, of which none may end otherwise (a few minutes).
soak: $(READY)
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(headless) tests/test_nntools_resume.py kills "$$folder/kills" 100 && \
	$(headless) tests/test_nntools_resume.py presses "$$folder/presses" 100

# What set-up and tests made. Photographs, trainings (experiments/) and checkpoints/ stay.
clean:
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__
