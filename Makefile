# make demo       three sites and a server on this machine, from synthetic proteins to the report
# make test       the test suite without the slow and the fault tests
# make test-all   everything
# make lint       what .ci/run checks before the tests
# make clean      remove the results of the demo

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-all lint types walls check install clean
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	@$(BIN)/snakemake --cores all
	@tail -n 2 logs/demo/report.log

test: $(INSTALLED)
	@$(BIN)/python -m pytest -m "not slow and not faults"

test-all: $(INSTALLED)
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

types: $(INSTALLED)
	$(BIN)/mypy

walls: $(INSTALLED)
	$(BIN)/lint-imports

check: lint types walls test-all

install: $(INSTALLED)

clean:
	rm -rf results/demo logs/demo

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fedbio needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 2; }
	@echo "installing into .venv (once; a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,report]'
	@touch $@
