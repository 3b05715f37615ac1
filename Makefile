# Everything runs in $(VENV), which `make setup` makes from constraints.txt. Nothing but pip uses the network.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DEMO_METHODS ?= lora fibecfed local centralised
DEMO_OPTIONS ?= --max-train 1500 --max-validation 200 --rounds 15
DEMO_OUT ?= runs/demo
SITE ?= site
BENCH_OPTIONS ?=

# Two test processes of one thread each: on two cores faster than one process of two threads.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
SOURCE := src/fedloom
FLOORS_0_TO_3 := $(SOURCE)/messages.py,$(SOURCE)/encodings.py,$(SOURCE)/tensors.py,$(SOURCE)/seeds.py,$(SOURCE)/wire.py,$(SOURCE)/fleet.py,$(SOURCE)/cache.py,$(SOURCE)/finding.py,$(SOURCE)/folders.py,$(SOURCE)/hub.py,$(SOURCE)/native/*,$(SOURCE)/data/*,$(SOURCE)/model/*,$(SOURCE)/server/*,$(SOURCE)/client/*,$(SOURCE)/compute/*,$(SOURCE)/methods/*,$(SOURCE)/engines/*

# Images of Python like to set it. Nothing of what is installed would be compiled then but anew in every process, which takes most of a start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test unit check format docs mutants bench bench-gpu clean

help: ## list the targets (this)
	@echo "Fedloom: make TARGET (times on two cores)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Without --no-compile a third of this would go into compiling files of which few are ever imported. Those of a run are compiled at the end,
# once: where PYTHONDONTWRITEBYTECODE is set `fedloom` could not keep them.
$(STAMP): pyproject.toml constraints.txt
	@echo "setup: installing the versions of constraints.txt into $(VENV) (about 2 minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "setup: Fedloom needs Python 3.11 or newer, $(PYTHON) is older; use make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
		|| { echo "setup: this Python lacks ensurepip; taking pip from $(PYTHON) -m pip" >&2; \
		     $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[demo,flower,track,docs,dev]'
	@$(BIN)/python -c 'import fedloom.cli, fedloom.run.loop, fedloom.run.pages.report'
	@touch $@
	@echo "setup: done; the command is $(BIN)/fedloom"

setup: $(STAMP) ## make .venv from constraints.txt, with .venv/bin/fedloom (about 2 minutes the first time, then nothing)

demo: $(STAMP) ## plain federated LoRA against FibecFed on 100 devices holding TREC questions (2 to 8 minutes)
	@echo "demo: $(DEMO_METHODS), each federated over 100 simulated devices that hold real questions (TREC, six classes),"
	@echo "demo: a real 22M-parameter encoder, 10 devices a round. 2 to 8 minutes on two cores, by their speed. Stop it and run it again: it resumes."
	$(BIN)/fedloom compare $(DEMO_METHODS) $(DEMO_OPTIONS) --out $(DEMO_OUT)
	@echo "demo: the report, with its plots: $(abspath $(DEMO_OUT))/report.html"

test: $(STAMP) ## all tests, then the branch coverage of floors 0-3, at least 95 % (20 to 40 minutes)
	@echo "test: unit, conformance, oracle and integration tests in $(WORKERS) processes (20 to 40 minutes on two cores, by their speed)"
	$(PYTEST) --cov --cov-report= tests
	@echo "test: branch coverage of floors 0-3 (messages to methods and engines)"
	$(BIN)/python -m coverage report --include='$(FLOORS_0_TO_3)' --fail-under=95

unit: $(STAMP) ## the unit tests only (one to two minutes)
	$(PYTEST) tests/unit

check: $(STAMP) ## format, lint and types, changing nothing (about half a minute)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## format and mend what ruff can mend (seconds)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## build the documentation into site/, any broken link an error (seconds)
	$(BIN)/mkdocs build --strict --site-dir $(abspath $(SITE))

mutants: $(STAMP) ## break the source in one line at a time; the tests must notice every time (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py

bench: $(STAMP) ## every speed figure, side by side with other frameworks (20 to 35 minutes; once some more to install those)
	@echo "bench: 20 to 35 minutes on two cores that do nothing else; the first time also about five to build bench/.venvs (4 GB)"
	$(BIN)/python bench/run.py $(BENCH_OPTIONS)
	@echo "bench: the results: $(abspath bench/out)"

bench-gpu: $(STAMP) ## the figures that need an accelerator (minutes; without one they are told as not measured)
	$(BIN)/python bench/run.py --gpu $(BENCH_OPTIONS)

clean: ## remove what tests, checks and docs leave behind; not .venv, not runs/, not what the bench made
	rm -rf site build dist htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	find src tests tools bench -name .venvs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
