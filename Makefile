# What a person types: make setup, make run, make test. Everything else builds on these.
#
#   PYTHON       the Python that makes the virtual environment (3.11 or newer)
#   TORCH_INDEX  package index for torch, such as PyTorch's CPU index; empty: the default index
#   PORT         port of `make run`; empty: the configured one
#   ARGS         further arguments of `make run`
#   JOBS         test processes of `make quick` and `make test`
#   PYTEST_ARGS  further arguments of every pytest run
#   SEEDS        seeds of `make swarm`
#   MATRIX_ARGS  further arguments of `make test-all`: --only family=llama, --jobs 4, --retry, --fresh

PYTHON ?= python3
TORCH_INDEX ?=
PORT ?=
ARGS ?=
JOBS ?= 2
PYTEST_ARGS ?=
SEEDS ?= 1000
MATRIX_ARGS ?=

# One thread per torch process: bit-equal sums, and no oversubscription with several workers on one machine.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

BIN := .venv/bin
STAMP := .venv/.set-up
PYTEST := $(BIN)/python -m pytest

# Files stay whole, as their fixtures are dear. A test process that dies fails the run at once: xdist would replace it and
# then wait for ever for the tests that it had been given.
SPREAD := -n $(JOBS) --dist loadfile --max-worker-restart=0

.DEFAULT_GOAL := help
.PHONY: help setup run lint types walk test check quick swarm test-all docs clean

help:
	@echo "make setup     create .venv and install everything ($(STAMP) tells when)"
	@echo "make run       start the daemon: make run ARGS=\"MODEL --instances 4\" PORT=8000"
	@echo "make test      every test but the slow ones, which are: make test PYTEST_ARGS='-m slow'"
	@echo "make test-all  the matrix: families x degrees x disturbances x dtypes; goes on where it was interrupted"
	@echo "make check     lint, types, import walk, then make test"
	@echo "make swarm     1 000 drawn scenarios in virtual time, each judged by strangers; at most 5 minutes"
	@echo "make quick     lint, types, unit and virtual-world tests, of many cases every fourth; at most 90 s"

setup: $(STAMP)

# torch first and by itself, so that the index for it is used for nothing else; the rest never changes its version.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("python %d.%d is older than 3.11: set PYTHON" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	@touch $@

run: $(STAMP)
	@exec $(BIN)/spotserve run $(ARGS) $(if $(PORT),--port $(PORT))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy spotserve

walk: $(STAMP)
	$(PYTEST) -q tests/test_imports.py tests/test_tidy.py

test: $(STAMP)
	$(PYTEST) -q -m "not slow" $(SPREAD) $(PYTEST_ARGS)

# One after the other whatever -j says: a failing linter is told before ten minutes of tests.
check: $(STAMP)
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory walk
	@$(MAKE) --no-print-directory test

quick: $(STAMP)
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	$(PYTEST) -q -m "not e2e and not slow and not swarm and not thorough" --thin 4 $(SPREAD) $(PYTEST_ARGS)

# One seed draws a cluster, its load and its faults; what breaks a promise is told with the command that replays it.
swarm: $(STAMP)
	$(BIN)/spotserve simulate --swarm $(SEEDS)

docs: $(STAMP)
	$(BIN)/python docs/draw_lifecycles.py

test-all: $(STAMP)
	$(BIN)/python -m tests.matrix run $(MATRIX_ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
