# Two commands on a fresh machine: `make quickstart` and `make test`. Both set everything up inside this clone.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test check bench setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV): about two minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --no-compile --progress-bar=off -c constraints.txt -e ".[dev]" 2>&1 | tee $(VENV)/install.log \
	  | awk '/^(Collecting|Processing)/ {n++; printf "\r  %d packages found", n; fflush()} \
	         /^Installing collected/ {printf "\n  installing them …\n"; fflush()}' \
	  || { tail -30 $(VENV)/install.log; exit 1; }
	@echo "  compiling them on all cores …"
	@$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # a few templates are no Python
	@touch $@

quickstart: $(STAMP)
	@$(VENV)/bin/tandem quickstart

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/test_layering.py

test: check
	$(VENV)/bin/python -m pytest

bench: $(STAMP)
	$(VENV)/bin/python benchmarks/training.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
