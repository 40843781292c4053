# `make demo` and `make test` are all a newcomer needs; `make` alone lists the rest.

PYTHON ?= python3
BIN    := .venv/bin
AT_ONCE := -n 2 --dist worksteal
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test coverage test-all lint format docs bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-9s %s\n", $$1, $$2 }'

demo: .venv/.demo  ## a first federated training, in seconds
	@$(BIN)/koinon demo

test: .venv/.dev  ## the tests
	@$(BIN)/pytest --quiet $(AT_ONCE)

coverage: .venv/.dev  ## the same, counting what they run of the code: half as long again
	@$(BIN)/pytest --quiet $(AT_ONCE) --cov --cov-report=term

test-all: .venv/.dev  ## the slow tests too
	@$(BIN)/pytest --quiet $(AT_ONCE) -m ""

lint: .venv/.dev  ## style, types and the budgets of the house
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/pytest --quiet tests/house --ignore=tests/house/test_docs.py

format: .venv/.dev  ## let ruff mend what it can
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet

docs: .venv/.dev  ## write docs/reference/ from the docstrings
	@$(BIN)/python docs/generate_reference.py

bench: .venv/.dev  ## measure every figure we claim, as JSON lines
	@$(BIN)/python bench/data_cache.py
	@$(BIN)/python bench/plain_loop.py
	@$(BIN)/python bench/simulation.py
	@$(BIN)/python bench/scale.py
	@$(BIN)/python bench/entropy.py ../shared/data/cifar10
	@$(BIN)/python bench/federation.py
	@$(BIN)/python bench/chaos.py --kills 200

clean:  ## remove what make has made
	@rm -rf .venv .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache dist
	@find src tests docs bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# What each target needs installed.  The stamps are touched last, so a failed or interrupted installation
# leaves none; `.unfinished` stands while one is under way, and makes the next call begin again.
.venv/.demo: pyproject.toml constraints.txt
	@$(call install,demo)
	@touch $@

.venv/.dev: pyproject.toml constraints.txt
	@$(call install,dev)
	@touch .venv/.demo $@

# Two names for one file: pip 25.3 took the constraints on build requirements out of PIP_CONSTRAINT.
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Koinon needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	set -e; \
	if [ -e .venv/.unfinished ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "making .venv (once; a minute or two)"; \
		mkdir -p .venv; touch .venv/.unfinished; rm -rf .venv/*; \
		$(PYTHON) -m venv .venv; \
	else \
		echo "bringing .venv up to date"; \
	fi; \
	touch .venv/.unfinished; \
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install -qq --no-input --editable '.[$(1)]'; \
	rm .venv/.unfinished
endef
