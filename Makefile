# What a person types. Everything installs what it needs into .venv; only Python >= 3.11, make and a package index are assumed.
VENV    ?= .venv
BIN     := $(VENV)/bin
# The newest Python that affina supports, or whatever PYTHON names.
PYTHON  ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
             $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
PIP     := $(BIN)/python -m pip --disable-pip-version-check -q
# The kernels' tests run in Triton's interpreter, on a CPU. A torch for CUDA brings the Triton that it needs; beside one for
# CPUs, this is it (no constraint: it would stand against the other).
TRITON  := triton==3.6.0
export TOKENIZERS_PARALLELISM = false

.PHONY: help quickstart test lint type fmt docs bench clean
help: ## show this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/.installed ## install affina and fine-tune the built-in model on this machine (about 3 minutes)
	$(BIN)/affina train

test: $(VENV)/.installed-dev ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-dev ## check style and the layers
	$(BIN)/ruff check src tests recipes tools bench
	$(BIN)/ruff format --check src tests recipes tools bench
	$(BIN)/lint-imports

type: $(VENV)/.installed-dev ## check types
	$(BIN)/mypy

fmt: $(VENV)/.installed-dev ## format the code
	$(BIN)/ruff check --fix src tests recipes tools bench
	$(BIN)/ruff format src tests recipes tools bench

docs: $(VENV)/.installed-dev ## write the generated pages of docs/reference again
	$(BIN)/affina config-schema --markdown > docs/reference/config.md
	$(BIN)/affina methods --markdown > docs/reference/methods.md

bench: $(VENV)/.installed-dev ## compare the quickstart job with transformers' Trainer + PEFT on this machine
	$(BIN)/python bench/laptop.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "affina needs Python 3.11, 3.12 or 3.13 (set PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -e . -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -e '.[dev]' -c constraints.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || test "$$(uname -sm)" != "Linux x86_64" || $(PIP) install --no-deps $(TRITON)
	@touch $@ $(VENV)/.installed
