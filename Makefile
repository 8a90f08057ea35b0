# Each target sets up all it needs in .venv (nothing else is touched) and ends by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The torch that the ops are built and tested against; any torch >= 2.11 will do.
TORCH  ?= torch==2.13.0
# Processes that share the tests, as pytest-xdist counts them: auto is one for each core, up to 8; 0 is none.
WORKERS ?= auto

NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc cmake tests/cpp -type f)
CXX_FILES = find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.PHONY: help demo test test-all test-examples sanitize coverage check docs wheel format stub bench bench-models clean

help:  ## What there is to make
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.planner  ## Plan the shipped trace for 8 GPUs on 2 nodes
	$(BIN)/moetuner demo

test: $(VENV)/.dev  ## The tests that this machine can run, without the slow ones
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

test-all: test  ## And the slow ones
	$(BIN)/python -m pytest -m slow

test-examples: $(VENV)/.dev  ## Tests by Hypothesis, with four times the examples
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile all -n $(WORKERS) --dist worksteal

sanitize: $(VENV)/.sanitize  ## Tests of the planning core under ASan with UBSan, and under TSan
	for kind in address,undefined thread; do \
	  $(BIN)/cmake -S tests/cpp -B build/sanitize-$$kind -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DMOETUNER_WERROR=ON -DMOETUNER_SANITIZE=$$kind && \
	  $(BIN)/cmake --build build/sanitize-$$kind --parallel && \
	  $(BIN)/ctest --test-dir build/sanitize-$$kind --output-on-failure || exit 1; \
	done

coverage: $(VENV)/.coverage  ## Which lines of Python `make test` reaches; pages in build/coverage/html
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term --cov-report=html

check: $(VENV)/.lint  ## Lint, types, import contracts, C++ format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/core_stub.py --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(CXX_FILES) | xargs $(BIN)/clang-format --dry-run -Werror

docs: $(VENV)/.docs  ## The documentation site, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel:  ## The planner's wheel, in dist, installed and tried in a clean environment
	PYTHON=$(PYTHON) .ci/wheel

format: $(VENV)/.lint  ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_FILES) | xargs $(BIN)/clang-format -i

stub: $(VENV)/.lint  ## Write the types of the C++ core anew, after a change of csrc/python
	$(BIN)/python .ci/core_stub.py

bench: $(VENV)/.dev  ## Microbenchmarks; JSON and, on a GPU, a table under benchmarks/results
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/latest.json

MODELS := build/end-to-end
END_TO_END := $(BIN)/python benchmarks/end_to_end
bench-models: $(VENV)/.dev  ## Whole models, 8 ranks on 2 nodes that it makes here; needs namespaces
	mkdir -p $(MODELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 8 -m moetuner calibrate \
	  --device cpu --values float32 --hidden 256 --inner 128 --experts 64 --top-k 4 --seconds 15 --quiet --out $(MODELS)/cpu.toml
	$(END_TO_END)/plan.py --layers 4 --narrow 2 --dtype float32 --gbit 0.1 --hardware $(MODELS)/cpu.toml \
	  --ranks 8 --ranks-per-node 4 --sequences 4 --prompt 64 --decode 4 --seconds 5 --out $(MODELS)/case
	$(END_TO_END)/two_nodes.py $(MODELS)/case --device cpu --backend gloo --seconds 130 --parts 1 \
	  --out benchmarks/results/end-to-end-cpu.json
	$(END_TO_END)/table.py benchmarks/results/end-to-end-cpu.json > benchmarks/results/end-to-end-cpu.md

clean:  ## Remove everything that the targets above made
	rm -rf $(VENV) build dist moetuner-demo

# pip >= 25.1 knows the dependency groups of pyproject.toml.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"

# The planner alone, as `pip install moetuner` gives it: no torch, no CBC, no matplotlib.
$(VENV)/.planner: $(BIN)/python $(NATIVE)
	@test -e $(VENV)/.dev || $(BIN)/python -m pip install --quiet .
	@touch $@

# What tests need: torch, the ops, CBC, Transformers; Python sources are used in place.
$(VENV)/.dev: $(BIN)/python $(NATIVE)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	MOETUNER_WERROR=ON MOETUNER_CORE_TESTS=ON $(BIN)/python -m pip install --quiet --editable ".[cbc,plot]" --group test
	@touch $@ $(VENV)/.planner

# The tools of each of these, beside moetuner.
$(VENV)/.lint: $(VENV)/.dev
$(VENV)/.coverage: $(VENV)/.dev
$(VENV)/.docs: $(VENV)/.planner
$(VENV)/.sanitize: $(BIN)/python
$(VENV)/.lint $(VENV)/.coverage $(VENV)/.docs $(VENV)/.sanitize: $(VENV)/.%: pyproject.toml
	$(BIN)/python -m pip install --quiet --group $*
	@touch $@
