# SPDX-License-Identifier: Apache-2.0
# make align    environment if need be, then the main job on the tiny recipe (CPU)
# make test     environment if need be, then lint and all tests
# make lint     ruff only
# make bench    group sampling and shared-prompt updates beside NeMo and the plain way: tables and a picture in runs/bench;
#               what self-synthesis costs: runs/bench_synthesis
# make study    reinforcement against distillation: many arms, rates, seeds and sizes; hours, resumable, runs/rba_study
# make assets   build the tiny teacher and speech encoder of examples/tiny anew
# make clean    remove what building and testing left; keeps .venv* and runs/
#
# Variables: PYTHON (which interpreter makes .venv), TORCH (what pip is asked for), CONSTRAINTS (pinned versions),
# JOBS (processes of make test), NEMO (another version of NeMo, with constraints-$(NEMO).txt in .venv-$(NEMO):
# make test NEMO=2.7.3).

PYTHON ?= python3
NEMO ?=
VENV ?= .venv$(NEMO:%=-%)
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints$(NEMO:%=-%).txt
CONFIG ?= rba_tiny
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
# Images that set this would have every process compile what it imports of NeMo anew: 33 s instead of 15 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: align test lint bench study assets clean

align: $(STAMP)
	$(BIN)/python examples/rba_align.py --config-name=$(CONFIG)

test: lint
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python examples/rba_bench.py
	$(BIN)/python examples/rba_bench_synthesis.py

study: $(STAMP)
	$(BIN)/python examples/rba_study.py

assets: $(STAMP)
	$(BIN)/python examples/tiny/build_assets.py

# torch goes first and by its exact version: where a CPU build is configured, pip then takes that one. Most modules of
# these packages are never imported, so byte-compiling them all (minutes) is left to the first import.
$(STAMP): setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
		"python %d.%d is too old, expected 3.10 or newer: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) or "$(CONSTRAINTS)" == "/dev/null" else \
		"the pinned versions need python 3.11; with 3.10 use: make CONSTRAINTS=/dev/null")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c $(CONSTRAINTS) "$(TORCH)"
	$(BIN)/python -m pip install --no-compile -c $(CONSTRAINTS) -e '.[test]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
