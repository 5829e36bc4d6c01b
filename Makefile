# make demo   set-up, pack, train, evaluate                 (minutes on two CPU cores)
# make test   set-up, then the quick tests                  (at most 6 minutes on two CPU cores)
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv from the PATH if there is one, else a private copy in .uv/
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)

.PHONY: help setup demo test test-full test-slow lint bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.uv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "bigan needs Python 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@# Some distributions split venv or pip off into packages of their own: one of the two is enough.
	@if $(PYTHON) -m venv .uv 2>/dev/null && .uv/bin/pip install -q --disable-pip-version-check uv; \
	then :; \
	elif $(PYTHON) -m pip install -q --disable-pip-version-check --target .uv/lib uv; \
	then mkdir -p .uv/bin && ln -sf ../lib/bin/uv .uv/bin/uv; \
	else echo "neither venv nor pip works in $(PYTHON): install one (python3-venv on Debian) or uv"; \
	exit 1; fi

# Where Python may not keep bytecode, every process would compile torch anew: 4 s each.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

# The stamp is older than the lock file after a pull: then the environment is brought up to date.
$(VENV)/.complete: pyproject.toml uv.lock | $(filter .uv/bin/uv,$(UV))
	UV_PROJECT_ENVIRONMENT=$(VENV) $(UV) sync --locked --quiet --all-extras $(COMPILE)
	@touch $@

setup: $(VENV)/.complete  ## install everything into .venv from the lock file

demo: setup  ## pack the built-in digits, train BigGAN on them, evaluate every snapshot
	@PATH="$(abspath $(BIN)):$$PATH" bash launch/demo.sh

# The full tier starts a real SLURM and real network namespaces. Root on Debian or Ubuntu gets the
# programs here; elsewhere the SLURM tests are left out, with a note.
SYSTEM := slurmctld:slurm-wlm munged:munge ip:iproute2 unshare:util-linux ps:procps
WITHOUT_SLURM = $(shell command -v slurmctld >/dev/null 2>&1 || [ -x /usr/sbin/slurmctld ] || echo 'and not slurm')

.PHONY: system
system:
	@missing=$$(PATH="$$PATH:/usr/sbin:/sbin"; for pair in $(SYSTEM); do \
		command -v $${pair%%:*} >/dev/null 2>&1 || echo $${pair##*:}; done); \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo "installing for the tests:" $$missing; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
			apt-get -qq install -y --no-install-recommends $$missing; } >/dev/null 2>&1 \
		|| echo "could not install" $$missing "(apt-get failed)"; \
	else echo "not installed:" $$missing "(for the tests with a real SLURM, and of several machines)"; fi

# Three tiers (CONTRIBUTING.md): quick; with launches, SLURM and namespaces; everything else.
test: setup  ## run the quick tests (no GPU needed)
	$(BIN)/python -m pytest -m "not full and not slow and not gpu" -n 2 --dist worksteal

test-full: setup system  ## run the tests that start launchers, SLURM and network namespaces
	@# Jobs of SLURM mostly wait: two clusters side by side take half the time.
	@[ -n "$(WITHOUT_SLURM)" ] || $(BIN)/python -m pytest tests/slurm -m "not slow" -n 2
	$(BIN)/python -m pytest -m "full and not slow and not gpu and not slurm" --durations 15

test-slow: setup system  ## run the long tests
	$(BIN)/python -m pytest -m "slow and not gpu $(WITHOUT_SLURM)"

SCRIPTS := .ci/run launch/demo.sh $(wildcard slurm/*.sbatch bigan/cluster/templates/*.sh)

lint: setup  ## ruff, mypy, import-linter, codespell and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	$(BIN)/shellcheck --external-sources --source-path=. $(SCRIPTS)

bench: setup  ## measure the training step and the input pipeline into benchmarks/results/
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/input_pipeline.py --out benchmarks/results/$$(date +%Y-%m-%d)-input-pipeline.json
	$(BIN)/bigan bench step configs/digits.yaml | tee benchmarks/results/$$(date +%Y-%m-%d)-step-digits.json

clean:  ## remove what the demo made; keeps the environment
	rm -rf data runs
