# make demo   set up, train the embedded Eagle through its three stages, write runs/demo/report.html
# make check  set up, check style and types, run the unit tests: two minutes on two cores
# make test   set up, run the tests
# make lint   set up, check style, format and types
# All are idempotent. Set-up makes .venv with the pinned versions; Python 3.11 is needed and nothing else.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PYTHON := $(shell command -v python3.11 || command -v python3)

.PHONY: setup demo check test test-long lint format clean

setup: $(READY)

$(READY): setup.py constraints.txt
	@echo "set-up: making $(VENV) with $(PYTHON) and installing the pinned packages (about a minute with a warm cache)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else f"set-up needs Python 3.11, found {sys.version.split()[0]}")'
	@started=$$(date +%s) && \
	$(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' && \
	echo $$(( $$(date +%s) - started )) > $(READY) && \
	echo "set-up: done in $$(cat $(READY)) s"

demo: setup
	@$(BIN)/megatron-eagle demo --setup-seconds $$(cat $(READY))

check: lint
	@echo "check: unit tests; make test runs all"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m unit --timeout 60

test: setup
	@echo "test: unit, parity, layouts and process tests on this machine's CPU"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long"

test-long: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long --timeout 7200

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info
