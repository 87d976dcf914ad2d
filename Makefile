# make demo   set up, train the embedded Eagle through its three stages, write runs/demo/report.html
# make check  set up, check style and types, run the unit tests: two minutes on two cores
# make test   set up, run the tests
# make test-stacks  make a second environment with the other megatron-core, run there what leans on it
# make test-te  build the model over Transformer Engine's Python half, without a GPU; TE=2.9.0 for another version of it
# make support  run on this stack what the README's table of what has been run names, and write the table
# make gpu    set up, measure and report on this machine's GPU all that was proved on CPUs, in benchmarks/gpu
# make lint   set up, check style, format and types
# All are idempotent. Set-up makes .venv with the pinned versions of the stack that its Python has: 3.11 or newer is needed
# and nothing else. PYTHON=/path/to/python says which one, VENV=folder where to.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
# Tests side by side; each holds up to 6 GB of processes. WORKERS=0 is one after the other, in this process.
WORKERS ?= 2
TESTS = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup
READY := $(VENV)/ready
# The newest that runs: a name on the PATH may be a shim without an interpreter behind it.
PYTHON := $(shell for name in python3.13 python3.12 python3.11 python3; do \
    $$name -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$name && break; done)
MEGATRON = $(shell "$(PYTHON)" -c 'import sys; print("0.16" if sys.version_info < (3, 12) else "0.19")')

# For the other stack the search goes further; on a machine with one Python it is skipped.
OTHER_PYTHON = $(shell for name in python3.13 python3.12 python3.11 $(wildcard $(HOME)/.pyenv/versions/3.1[123].*/bin/python3); do \
    $$name -c 'import sys, venv; other = "0.16" if sys.version_info < (3, 12) else "0.19"; sys.exit(other == "$(MEGATRON)" or not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$name && break; done)
OTHER_VENV ?= .venv-other
OTHER_TESTS := tests/compat tests/install/test_pins.py tests/model/test_parity.py tests/model/test_layouts.py \
    tests/verification/test_table.py tests/kernels/test_triton_contract.py \
    tests/training/test_train.py::test_killed_processes_continue_with_exactly_the_losses_of_an_undisturbed_run

# Transformer Engine's package without its compiled part, in a folder that only make test-te sees.
TE = $(shell sed -n 's/^transformer-engine==//p' constraints/megatron-$(MEGATRON).txt)
TE_FOLDER = .te/megatron-$(MEGATRON)-te-$(TE)

.PHONY: setup demo check test test-stacks test-te test-long support gpu lint format clean

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
	@OMP_NUM_THREADS=1 $(TESTS) -m unit --timeout 60

test: setup
	@echo "test: unit, parity, layouts and process tests on this machine's CPU"
	@OMP_NUM_THREADS=1 $(TESTS) -m "not long"

test-stacks: setup
	@if [ -z "$(OTHER_PYTHON)" ]; then echo "test-stacks: skipped, no Python here has the other megatron-core than $(MEGATRON)"; else \
	  echo "test-stacks: what leans on megatron-core, with the other one, in $(OTHER_VENV)" && \
	  $(MAKE) --no-print-directory setup VENV=$(OTHER_VENV) PYTHON=$(OTHER_PYTHON) && \
	  OMP_NUM_THREADS=1 $(OTHER_VENV)/bin/python -m pytest -q -m "not long" $(OTHER_TESTS) && \
	  $(OTHER_VENV)/bin/python -m eagle_kernels.check --tier compile --kernel tile_prepare --kernel pixel_shuffle_concat && \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" tests/stacks --other-python $(OTHER_VENV)/bin/python $(RECORD); fi

test-te: setup
	@[ -f $(TE_FOLDER)/ready ] || { echo "test-te: Transformer Engine $(TE) into $(TE_FOLDER), 55 MB" && rm -rf $(TE_FOLDER) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TE_FOLDER) \
	    --requirement constraints/transformer-engine.txt transformer-engine==$(TE) && touch $(TE_FOLDER)/ready; }
	@echo "test-te: megatron-core $(MEGATRON), Transformer Engine $(TE)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/te --transformer-engine $(TE_FOLDER) $(RECORD)

test-long: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long --timeout 7200

# Those that need a second environment or a package of their own are recorded by test-stacks and test-te with RECORD.
RECORD ?=
support: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" --record-support $$($(BIN)/python tools/support.py tests | grep -v '^tests/stacks\|^tests/te'); \
	  failed=$$?; $(MAKE) --no-print-directory test-te RECORD=--record-support; $(BIN)/python tools/support.py table; exit $$failed

gpu: setup
	@$(BIN)/megatron-eagle gpu-day benchmarks/gpu

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OTHER_VENV) .te runs build *.egg-info
