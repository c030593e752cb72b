# `make test` and `make demo` need Python 3.11 or newer and a C compiler: the first call installs the rest into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# The options of pytest. Tests of one file share what they compute, so they stay together.
PYTEST ?= -n 2 --dist loadfile -q

HELPERS    := __init__ cage checkpoint demo gguf_file gpu limit peer peer_sweep peer_tables published
BENCHMARKS := $(filter-out $(HELPERS:%=benchmarks/%.py),$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help test lint demo bench format clean

help:
	@echo "make test    lint, types and tests"
	@echo "make demo    the whole way on this machine: make a model, profile, compile, inspect, run, compare"
	@echo "make bench   every benchmark in benchmarks/, one after the other"
	@echo "make format  rewrite the code in the project's format"
	@echo "make clean   remove .venv and caches"
	@echo "PYTHON=python3.12 chooses the interpreter of .venv"

test: lint
	$(BIN)/pytest $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

bench: $(READY)
	@for script in $(BENCHMARKS); do echo "$$script"; $(BIN)/python $$script || exit 1; done

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) has no venv; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "installing klotski and its tools into $(VENV), once (a minute or more: torch is large)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
