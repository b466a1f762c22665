# Every target sets up .venv first if it is not there. `make help` lists them.
#
# PYTHON  the Python to make .venv with (3.10 or newer)
# TORCH   what pip installs for PyTorch, options included
# CUTLASS what pip installs for CUTLASS's headers
# ARGS    more arguments for pytest or for the benchmark (ARGS="-n 0 -k pool": some tests, one process)
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUTLASS ?= nvidia-cutlass==4.2.0.0
SHAPES ?= resnet
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
CUDA_DEV := $(VENV)/.cuda-dev
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort)
CPP_TESTS := $(wildcard tests/*.cpp tests/emulator/*)
PY := setup.py torchconv tests benchmarks examples tools

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize emulate lint format typecheck bench cuda-check gpu-check build clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# PyTorch first and by itself: as a mere dependency pip would take its newest release, with
# gigabytes of CUDA.
$(INSTALLED): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "torchconv needs Python 3.10 or newer; set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja
	TORCHCONV_SOURCES_ONLY=1 $(BIN)/pip install -q --no-build-isolation -e ".[dev,bench,examples]"
	@touch $@

$(BUILT): $(INSTALLED) setup.py torchconv/_build.py $(CSRC)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

build: $(BUILT)  ## compile the libraries of every instruction set into torchconv/lib

demo: $(BUILT)  ## swap a real network's layers, then train another on real digits
	$(BIN)/python examples/photos.py
	$(BIN)/python examples/digits.py

test: $(BUILT)  ## run the tests (ARGS="-k pool" for some of them)
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

sanitize: $(INSTALLED)  ## run the kernels' tests under the address and undefined-behaviour sanitizers
	@$(BIN)/python tests/sanitize.py $(ARGS)

emulate: $(INSTALLED)  ## run the tests on the GPU's kernels, emulated (ARGS="--sanitize" for sanitizers)
	@$(BIN)/python tests/emulated.py $(ARGS)

lint: $(INSTALLED)  ## check format and lint, C++ and Python
	@$(BIN)/ruff format --check $(PY)
	@$(BIN)/ruff check $(PY)
	@$(BIN)/clang-format --dry-run --Werror $(CSRC) $(CPP_TESTS)

format: $(INSTALLED)  ## format C++ and Python in place
	@$(BIN)/ruff format $(PY)
	@$(BIN)/ruff check --fix $(PY)
	@$(BIN)/clang-format -i $(CSRC) $(CPP_TESTS)

typecheck: $(INSTALLED)  ## mypy
	@$(BIN)/mypy

bench: $(BUILT)  ## time against PyTorch (SHAPES=lenet for another file of benchmarks/shapes)
	$(BIN)/python -m benchmarks.run --shapes $(SHAPES) --peer torch $(ARGS)

# CUTLASS by itself: what it depends on is for its Python code. Without the two, less is checked.
$(CUDA_DEV): $(INSTALLED)
	@if $(BIN)/pip install -q --no-deps $(CUTLASS) && \
	  TORCHCONV_SOURCES_ONLY=1 $(BIN)/pip install -q --no-build-isolation -e ".[cuda-dev]"; \
	then touch $@; else echo "cuda-check: goes on without CUTLASS or the disassembler"; fi

cuda-check: $(CUDA_DEV)  ## compile and inspect the GPU's kernels, without a GPU (ARGS=--all for more)
	@$(BIN)/python -m tools.cuda_check $(ARGS)

gpu-check:  ## build, test and time the GPU's kernels on a machine that has one, with its own PyTorch
	@$(PYTHON) -m tools.gpu_check $(ARGS)

clean:  ## remove what was built
	rm -rf build dist *.egg-info torchconv/lib $(BUILT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find torchconv tests benchmarks examples tools -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)
