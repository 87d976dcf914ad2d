# make demo   set up, train the embedded Eagle through its three stages, write runs/demo/report.html
# make check  set up, check style and types, run the unit tests: two minutes on two cores
# make test   set up, run the tests
# make lint   set up, check style, format and types
# All are idempotent. Set-up makes .venv with the pinned versions of the stack that its Python has: 3.11 or newer is needed
# and nothing else. PYTHON=/path/to/python says which one, VENV=folder where to.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# The newest that runs: a name on the PATH may be a shim without an interpreter behind it.
PYTHON := $(shell for name in python3.13 python3.12 python3.11 python3; do \
    $$name -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$name && break; done)
MEGATRON = $(shell "$(PYTHON)" -c 'import sys; print("0.16" if sys.version_info < (3, 12) else "0.19")')

.PHONY: setup demo check test test-long lint format clean

setup: $(READY)

$(READY): setup.py $(wildcard constraints/*.txt)
	@"$(PYTHON)" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "set-up needs Python 3.11, 3.12 or 3.13 with venv, on the PATH or as PYTHON=...; PYTHON is '$(PYTHON)'" >&2; exit 1; }
	@echo "set-up: making $(VENV) with $(PYTHON) and installing the pinned packages (one to two minutes with a warm cache)"
	@started=$$(date +%s) && \
	$(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/megatron-$(MEGATRON).txt --editable '.[dev]' && \
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
