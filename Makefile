# make train   set up and train          make train ARGS="model.features=4096 loss.l1=3e-3"
# make test    set up and test           make quick   the tests of under two minutes
# make lint    formatting and lint
PYTHON ?= python3
ARGS ?= model.features=10000 loss.l1=1e-3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# stamp files: install again when the requirements have changed
READY := .venv/ready
READY_TO_TEST := .venv/ready-to-test
# one process per core; the tests of a file share its fixtures; long files first (tests/conftest.py)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: train test quick lint
train: $(READY)
	$(BIN)/python train.py $(ARGS)

test: $(READY_TO_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not gpu"

quick: $(READY_TO_TEST)
	$(PYTEST)

lint: $(READY_TO_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt requirements/offline.txt
	@echo "installing into .venv (some minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	$(PIP) --no-deps --requirement requirements/offline.txt
	@touch $@

$(READY_TO_TEST): $(READY)
	$(PIP) --editable ".[test]"
	@touch $@
