# `make demo` and `make test` each set up all they need in .venv and end by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The torch that the ops are built and tested against; any torch >= 2.11 will do.
TORCH  ?= torch==2.13.0

NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc cmake -type f)

.PHONY: demo test check docs format stub bench clean

demo: $(VENV)/.planner  ## Plan the shipped trace for 8 GPUs on 2 nodes
	$(BIN)/moetuner demo

test: $(VENV)/.dev  ## All tests that this machine can run
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## Lint, types, import contracts, C++ format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/core_stub.py --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

docs: $(VENV)/.docs $(VENV)/.planner  ## The documentation site, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.dev  ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

stub: $(VENV)/.dev  ## Write the types of the C++ core anew, after a change of csrc/python
	$(BIN)/python tools/core_stub.py

bench: $(VENV)/.dev  ## Microbenchmarks; JSON and, on a GPU, a table under benchmarks/results
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/latest.json

clean:  ## Remove everything that the targets above made
	rm -rf $(VENV) build moetuner-demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The planner alone, as `pip install moetuner` gives it: no torch, no matplotlib.
$(VENV)/.planner: $(BIN)/python $(NATIVE)
	@test -e $(VENV)/.dev || $(BIN)/pip install --quiet .
	@touch $@

# Everything: torch, the ops, the development tools; Python sources are used in place.
$(VENV)/.dev: $(BIN)/python $(NATIVE)
	$(BIN)/pip install --quiet "$(TORCH)"
	MOETUNER_WERROR=ON $(BIN)/pip install --quiet --editable ".[dev,plot]"
	@touch $@ $(VENV)/.planner

$(VENV)/.docs: $(BIN)/python docs/requirements.txt
	$(BIN)/pip install --quiet -r docs/requirements.txt
	@touch $@
