# Two commands on a fresh machine: `make quickstart` and `make test`. Both set everything up inside this clone.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# What is compiled here stays here.
export TANDEM_CACHE := $(CURDIR)/$(VENV)/cache

.PHONY: quickstart test test-fast test-faults test-clusters test-pythons check map bench setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) tools/install $(VENV)
	@touch $@

quickstart: $(STAMP)
	@$(VENV)/bin/tandem quickstart

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q tests/unit/test_layering.py
	$(VENV)/bin/python tools/spec_keys.py --check
	$(VENV)/bin/python tools/grafana_dashboard.py --check

# In two processes, each with a cluster for its part of the end-to-end tests, which start first; then all others.
test: check
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/e2e tests/integration tests/unit tests/contracts

test-fast: $(STAMP)
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal tests/unit tests/contracts

# In two processes, each with clusters of its own (PROCESSES=0: in one); a test that is marked `alone` has both cores.
PROCESSES ?= 2
test-faults: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder tests/faults

# On several hosts, by namespaces of this machine (as root), on Slurm's and KubeRay's ways: about half an hour.
test-clusters: $(STAMP)
	$(VENV)/bin/python -m pytest -p no:xdist tests/clusters

# Installs and tests on each Python that pyproject.toml names; VERSIONS="3.10 3.13" picks.
test-pythons: $(STAMP)
	$(VENV)/bin/python tools/python_versions.py $(VERSIONS)

# One line a file: the first sentence of each.
map:
	@$(PYTHON) tools/map.py

bench: $(STAMP)
	$(VENV)/bin/python benchmarks/training.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
