# Everything a newcomer needs: `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Small operations on few cores: waiting threads must sleep, not spin.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: install demo test check format lint types layers bench gpu-check clean help

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## Make .venv and install the project into it.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "diffpolicy needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## Record demonstrations, train a policy on them, roll it out: runs/demo.
	$(BIN)/diffpolicy train experiment=demo run_dir=runs/demo overwrite=true

test: export OMP_NUM_THREADS := 1
test: install  ## The whole default test suite.
	$(BIN)/python -m pytest

check: install  ## Format, lint, types, import layers, tests.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: install  ## Rewrite the sources in the project's format.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install  ## Speed ratios and plan latencies, measured side by side in one run.
	$(BIN)/python scripts/bench.py
	$(BIN)/python scripts/bench.py latency

gpu-check:  ## Core, networks and one training step on a GPU; needs torch and numpy alone.
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/gpu_check.py

clean:  ## Remove the environment, caches and runs.
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
