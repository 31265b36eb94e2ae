# Everything runs through .venv, which the first target that needs it makes; PYTHON has to be 3.11 or newer.
PYTHON ?= python3

# The one place that pins torch. With a GPU, choose the build that fits it: the selector on PyTorch's site gives an index
# address; then `make quickstart TORCH="torch==2.13.0 --index-url ADDRESS"`. A torch that is in .venv already is kept.
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help quickstart test lint docs audit soak clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

quickstart: .venv/.installed  ## SFT, reward model and PPO on the built-in model and data, on this machine's CPU
	$(BIN)/rlhf-kit run recipes/quickstart.yaml

test: .venv/.installed-checks  ## all tests; ARGS="tests/unit -k recipe" for some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: .venv/.installed-checks  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed-checks  ## the documentation as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

soak: .venv/.installed-checks  ## an hour of kills, faults and bad input; ARGS="--minutes 5 --seed 2" for others
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(ARGS)

audit: .venv/.installed-checks  ## known vulnerabilities of the pinned versions; asks a service on the network
	.ci/audit '$(TORCH)'

clean:  ## remove .venv and the checkers' caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Each stamp says that its install went through; it is renewed when the pins change.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlhf_kit needs Python 3.11 or newer, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.torch: .venv/.python
	@echo 'Installing torch and the libraries into .venv; it takes a few minutes, once.' >&2
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-checks: .venv/.installed
	$(PIP) install --constraint constraints.txt --editable '.[test,lint]'
	@touch $@
