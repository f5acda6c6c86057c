# `make demo` trains a Mamba on real text and samples from it; `make test` runs the tests.
# Each target sets up .venv first, and again whenever pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: help demo test lint format types bench doctor clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train a small Mamba on text (six minutes on two cores) and sample from it"
	@echo "make test     run the tests"
	@echo "make lint     ruff (rules and format) and the import contract"
	@echo "make types    mypy"
	@echo "make bench    measure every operation against the peers that are installed"
	@echo "make doctor   say which backend serves what on this machine"
	@echo "make format   let ruff rewrite what it can"

demo: $(STAMP)
	$(BIN)/longscan train text

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	for what in scan block train prefill decode lengths throughput; do $(BIN)/longscan bench $$what || exit 1; done

doctor: $(STAMP)
	$(BIN)/longscan doctor

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "longscan needs Python 3.10 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
