# `make quickstart` and `make test` need Python 3.11 or newer and, for the fast kernels, a C++
# compiler; everything else goes into a virtual environment of the project's own.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
SOURCES = $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt
BENCHMARK = build/benchmark.json

# The whole comparison takes a minute on 2 cores; QUICK=1 shows in seconds that it runs.
TRAIN = $(BIN)/ghl train --rule ghl hebb sign bp --data digits --arch deephebb
TRAIN += $(if $(QUICK),--width 0.125 --epochs 3,--width 0.25 --epochs 20)

# Threads that wait must not take cores from others on a shared machine.
export OMP_WAIT_POLICY ?= PASSIVE

# Each asserts that it has trained, and on updates rather than on gradients.
EXAMPLES = plain lightning_module huggingface_trainer timm_loop

.PHONY: install quickstart test test-integrations lint format bench clean

install: $(VENV)/installed

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools cmake ninja pybind11 torch
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet -c constraints.txt \
	    --no-build-isolation --editable '.[train,test]'
	touch $@

quickstart: install
	$(BIN)/ghl doctor
	$(TRAIN) --out runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: install lint
	$(BIN)/python -m pytest

test-integrations: install
	$(BIN)/python -m pip install --quiet -c constraints.txt 'ghl-kernels[train,integrations]'
	set -e; for example in $(EXAMPLES); do \
	    echo "$$example"; $(BIN)/python -W ignore examples/$$example.py; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Wants a quiet machine; writes bench/results/<machine>.json.
bench: export OMP_WAIT_POLICY = ACTIVE
bench: install
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-json=$(BENCHMARK)
	$(BIN)/python -m bench.report $(BENCHMARK)

clean:
	rm -rf $(VENV) build *.egg-info ghl_kernels/*.so
