# `make demo` runs the main job, `make test` the checks; each sets everything up by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO ?= demo-output
SEED ?= 0

.PHONY: demo test lint bench wheel clean

demo: $(READY)
	$(BIN)/grasp-kernels demo --output $(DEMO) --seed $(SEED)

test: lint
	$(BIN)/python -m pytest -n auto

CXX_SOURCES = $(shell find csrc tests/emulator -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/grasp-kernels bench

# Both from the tree itself, so that the wheel takes the kernels that are compiled already.
wheel: $(READY)
	rm -rf dist build/lib* build/bdist*
	$(BIN)/python -m build --no-isolation --sdist --wheel

# torch first and alone: a range that admits a newer release would fetch gigabytes of CUDA packages
# on a machine that has no use for them. TORCH="torch" takes the newest.
TORCH ?= torch==2.13.0
NATIVE := $(wildcard build_support/*.py) $(shell find csrc -type f -not -name '*.md')
$(READY): pyproject.toml setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet pybind11 ninja "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info grasp_kernels/*.so
