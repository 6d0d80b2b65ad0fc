# make train   set up and train          make train ARGS="model.features=4096 loss.l1=3e-3"
# make test    set up and test           make quick   the tests of under two minutes
# make lint    formatting and lint
PYTHON ?= python3
ARGS ?= model.features=10000 loss.l1=1e-3
BIN := .venv/bin
# runs again when what it installed from has changed
READY := .venv/ready
# no version check, no prompt; one that is already installed is not fetched again
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test quick lint
train: $(READY)
	$(BIN)/python train.py $(ARGS)

test: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not gpu"

quick: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt requirements/offline.txt
	@echo "installing into .venv (a minute or two)"
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable ".[test]"
	$(PIP) --no-deps --requirement requirements/offline.txt
	@touch $(READY)
