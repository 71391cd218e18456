# One command does all its set-up: `make demo`, `make test`. Needs Python 3.11 or newer and a package index.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The first Python that is new enough; PYTHON=... overrides.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
            $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
PIP     = $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST_ARGS ?=
LABS_ARGS ?=
MUTATE_ARGS ?=
# Small tensors, and threads that spin: with other work on two cores, one thread took tests/compat from minutes to 20 s.
test test-slow labs labs-sample studies-smoke: export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-slow test-browser wheel studies-smoke labs labs-sample mutate paths bench coverage docs lint types imports format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## virtual environment with everything the demo and the tests need

$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed and was not found; set PYTHON=/path/to/python3" >&2; exit 2; }
	@[ -x $(BIN)/python ] || { echo "setup: $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: packages (minutes the first time)"
	@$(PIP) torch
	@$(PIP) --editable '.[dev,compat]'
	@# Other people's networks and attacks, for tests/compat: see the extra "compat" in pyproject.toml
	@$(PIP) --no-deps torchvision timm torchattacks foolbox adv-lib adversarial-robustness-toolbox
	@touch $@

demo: $(STAMP)  ## train three defenses on the digits, attack all three, print them side by side
	@$(BIN)/learn2perturb demo

# Cheapest first, so that a failure is seen early.
test: lint types imports  ## lint, types, import contract, then every test that is not slow
	@$(BIN)/python -m pytest -m "not slow and not browser" --numprocesses 2 --dist loadfile --durations=10 $(PYTEST_ARGS)

test-browser: $(STAMP)  ## the page and the site in headless Chromium (apt-get install chromium)
	@$(BIN)/python -m pytest -m browser $(PYTEST_ARGS) tests/report

test-slow: $(STAMP)  ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow --durations=10 $(PYTEST_ARGS)

wheel: $(STAMP)  ## build the wheel, install it where nothing of the repository is seen, and use it from there
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS) tests/test_wheel.py

# Both go on where they were stopped, as long as the code is the same; results are in runs/laboratories.
labs: $(STAMP)  ## the laboratories in full: crashes, kills, damaged and hostile files (about an hour)
	@$(BIN)/python -m tests.laboratories --size full $(LABS_ARGS)

labs-sample: $(STAMP)  ## a seeded sample of the laboratories (about three minutes)
	@$(BIN)/python -m tests.laboratories --size sample $(LABS_ARGS)

# Two at a time: most of a study of seconds is its start.
SMOKE := runs/studies-smoke
studies-smoke: $(STAMP)  ## every study of the package at level smoke: the paper's tables and figures, minutes
	@mkdir -p $(SMOKE)
	@$(BIN)/python -c "from learn2perturb.experiments.study_file import shipped; print('\n'.join(shipped()))" \
	  | xargs -P 2 -I{} sh -c '$(BIN)/learn2perturb study {} --level smoke --store $(SMOKE)/store --out $(SMOKE)/{} \
	  > $(SMOKE)/{}.txt 2>&1 && echo "study {}: done" || { cat $(SMOKE)/{}.txt; exit 255; }'

mutate: $(STAMP)  ## change one place of the source at a time: do the tests notice? (first time an hour)
	@$(BIN)/python -m tests.laboratories.mutate $(MUTATE_ARGS)

coverage: $(STAMP)  ## which lines and branches the tests that are not slow reach (PYTEST_ARGS for a part)
	@$(BIN)/python -m pytest -m "not slow and not browser" --numprocesses 2 --dist loadfile --cov $(PYTEST_ARGS)

docs: $(STAMP)  ## the site, into build/site; strict: a dead link or anchor is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

paths: $(STAMP)  ## the practitioner's and the reviewer's path, each one shell script (examples/*.sh)
	@$(BIN)/python -m pytest -m slow tests/compat/test_paths.py

bench: $(STAMP)  ## time the pieces of a training step; the whole: learn2perturb bench step
	@$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	@$(BIN)/mypy

imports: $(STAMP)  ## import-linter: the layers of the package
	@$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## ruff: format and fix what it can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove the environment and every cache; data and runs stay
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
