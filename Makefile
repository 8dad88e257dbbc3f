# `make help` prints what there is: the comments after ## below.

PYTHON ?= python3
NET ?= dncnn
VENV ?= .venv
LOWEST = .venv-lowest
PY = $(VENV)/bin/python
READY = $(VENV)/.ready
NOTEBOOK = Assignment4.ipynb

# PyPI's PyTorch for Linux brings CUDA, 3 GB. Where there is no NVIDIA card, 0.2 GB from PyTorch's own
# index will do. `make TORCH_INDEX=URL` names another index, `make TORCH_INDEX=` takes PyPI's.
NVIDIA := $(wildcard /proc/driver/nvidia)$(shell command -v nvidia-smi 2>/dev/null)
ifeq ($(shell uname -s)$(NVIDIA),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

bsds300_is_here = { [ -n "$$BSDS300" ] || [ -d BSDS300/images ]; }

# Runs without a person: no progress bars. JupyterLab (make lab) shows them.
headless = TQDM_DISABLE=1 $(PY)

# Several tests at a time, each on one core.
side_by_side = OMP_NUM_THREADS=1 TQDM_DISABLE=1
tests = -m pytest -n logical --maxprocesses 4 --dist loadgroup tests

.PHONY: help setup notebook refresh lab test test-lowest lint nbval train results ablation trials \
        benchmark release grade sheet soak clean

help:  ## prints this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile
	@echo 'The first call sets up .venv. Another Python for it: make PYTHON=python3.12'

setup: $(READY)  ## makes .venv and installs requirements.txt there; the others do so by themselves

$(LOWEST)/.ready: versions = s/>=/==/

$(READY) $(LOWEST)/.ready: requirements.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo 'There is no $(PYTHON). Install Python 3.10 or newer, or name it:'; \
	  echo 'make PYTHON=/path/to/python3'; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  "$(PYTHON)" --version; \
	  echo 'Python 3.10 or newer is needed. Name another one: make PYTHON=python3.12'; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'This Python has no venv. On Debian and Ubuntu: apt install python3-venv,'; \
	  echo 'then run make again.'; exit 1; }
	@echo 'Setting up $(@D), once.'
	@[ ! -e $(@D) ] || \
	  [ "$$($(@D)/bin/python --version 2>&1)" = "$$("$(PYTHON)" --version)" ] || rm -rf $(@D)
	"$(PYTHON)" -m venv $(@D)
	@sed '$(versions)' requirements.txt > $(@D)/requirements.txt
	@grep '^torch' $(@D)/requirements.txt > $(@D)/torch.txt
# From this index and no other. One that doesn't answer must not take minutes: no second attempts.
	@[ -z '$(TORCH_INDEX)' ] || { \
	  echo 'PyTorch comes from $(TORCH_INDEX) (make TORCH_INDEX= takes PyPI, with CUDA).'; \
	  PIP_EXTRA_INDEX_URL='$(TORCH_INDEX)' $(@D)/bin/python -m pip install \
	    --disable-pip-version-check --timeout 10 --retries 0 --index-url '$(TORCH_INDEX)' \
	    -r $(@D)/torch.txt; \
	} || echo 'PyTorch is not to be had there. It comes from PyPI: a download of up to 3 GB.'
	$(@D)/bin/python -m pip install --disable-pip-version-check -r $(@D)/requirements.txt
	@touch $@

notebook: $(READY)  ## runs the notebook from top to bottom; the result is in experiments/
	$(headless) -m programs.run_notebook $(NOTEBOOK)

lab: $(READY)  ## opens the notebook in JupyterLab
	$(PY) -m jupyter lab $(NOTEBOOK)

refresh: $(READY)  ## runs the notebook and renews the outputs stored in it
	@$(bsds300_is_here) || { \
	  echo 'The stored outputs are those of BSDS300, which is not here. Name its folder:'; \
	  echo 'make refresh BSDS300=FOLDER, or fetch it: $(PY) -m programs.fetch'; exit 1; }
	$(headless) -m programs.run_notebook $(NOTEBOOK) --in-place

test: lint  ## checks the style, runs tests/, then make nbval
	$(side_by_side) $(PY) $(tests)
	@$(MAKE) --no-print-directory nbval

# Python 3.10 or 3.11: the old versions of scipy and scikit-learn were not built for later ones.
test-lowest: $(LOWEST)/.ready  ## runs tests/ with the lowest versions that are allowed
	$(side_by_side) $(LOWEST)/bin/python $(tests) --ignore tests/test_browser.py

lint: $(READY)  ## checks the style
	$(PY) -m ruff check .

# Every output with BSDS300 at hand; without it, only what does not depend on the photographs.
nbval: $(READY)  ## runs the notebook and compares it with its stored outputs
	@if $(bsds300_is_here); then \
	  echo 'nbval: strict, BSDS300 is at hand: outputs are compared with the stored ones.'; \
	  $(headless) -m pytest --nbval $(NOTEBOOK); \
	else \
	  echo 'nbval: lax, no BSDS300 here: all cells must run, only marked outputs are compared.'; \
	  $(headless) -m pytest --nbval-lax $(NOTEBOOK); \
	fi

train: $(READY)  ## trains a network, or goes on: NET=dncnn, udncnn or dudncnn
	$(PY) -m programs.train --net $(NET)

results: $(READY)  ## tests the committed networks; prints the table by level (RETEST=1: tests for it)
	$(PY) -m programs.results evaluate
	$(PY) -m programs.results levels $(if $(RETEST),--retest)

ablation: $(READY)  ## what skips, dilation and pooling give (RETRAIN=1: hours of training)
	$(headless) -m programs.results ablation $(if $(RETRAIN),--retrain)

trials: $(READY)  ## prints the tables of the trials behind the recipes
	$(PY) -m programs.results trials

benchmark: $(READY)  ## measures the speed of training, testing and denoising (minutes)
	$(PY) -m programs.benchmark
	$(PY) -m programs.benchmark_denoise

release: $(READY)  ## writes the folder of students: STAGE=1, 2 or 3, OUT=FOLDER (docs/classroom.md)
	@[ -n '$(STAGE)' ] && [ -n '$(OUT)' ] || { echo 'make release STAGE=1 OUT=FOLDER'; exit 1; }
	$(PY) -m programs.release '$(STAGE)' '$(OUT)'

sheet: $(READY)  ## writes what is graded by hand: OUT=FILE
	@[ -n '$(OUT)' ] || { echo 'make sheet OUT=FILE'; exit 1; }
	$(PY) -m programs.release sheet '$(OUT)'

grade: $(READY)  ## marks what students wrote: SUBMISSIONS=FOLDER, OUT=FOLDER, perhaps STAGE=1, 2 or 3
	@[ -n '$(SUBMISSIONS)' ] && [ -n '$(OUT)' ] || { \
	  echo 'make grade SUBMISSIONS=FOLDER OUT=FOLDER'; exit 1; }
	$(PY) -m programs.grade '$(SUBMISSIONS)' '$(OUT)' $(if $(STAGE),--stage '$(STAGE)')

# None of them may end otherwise than one that was left alone.
soak: $(READY)  ## kills 100 trainings, and interrupts 100 twice (minutes)
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(headless) -m tests.trainings kills "$$folder/kills" 100 && \
	$(headless) -m tests.trainings presses "$$folder/presses" 100

# Photographs, trainings (experiments/) and checkpoints/ stay.
clean:  ## removes what set-up and tests made
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .hypothesis build *.egg-info
	rm -rf __pycache__ programs/__pycache__ tests/__pycache__
