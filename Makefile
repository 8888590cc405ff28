# `make quickstart` and `make test` need Python 3.11 or newer and, for the fast kernels, a C++
# compiler; everything else goes into a virtual environment of the project's own.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
SOURCES = $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt
BENCHMARK = build/benchmark.json
TRITON_3_6 = build/triton-3.6

# The whole comparison takes a minute on 2 cores; QUICK=1 shows in seconds that it runs.
TRAIN = $(BIN)/ghl train --rule ghl hebb sign bp --data digits --arch deephebb
TRAIN += $(if $(QUICK),--width 0.125 --epochs 3,--width 0.25 --epochs 20)

# Threads that wait must not take cores from others on a shared machine.
export OMP_WAIT_POLICY ?= PASSIVE

# Each asserts that it has trained, and on updates rather than on gradients.
EXAMPLES = plain lightning_module huggingface_trainer timm_loop

.PHONY: install quickstart test test-processes test-csrc test-compile test-integrations compile-check lint format bench bench-gpu clean

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

# Files on as many processes as there are cores; a test takes one thread. What takes minutes has a
# target of its own: tests/compile, the networks of others, and runs of several processes or of such
# as are killed, beside which nothing else should run.
OF_OTHERS = tests/scale/test_zoo.py
OF_PROCESSES = tests/scale/test_ranks.py \
    $(addprefix tests/recipes/test_,processes.py resume.py cells.py)
test: install lint
	$(BIN)/python -m pytest -n auto --dist loadfile --ignore tests/compile \
	    $(addprefix --ignore ,$(OF_OTHERS) $(OF_PROCESSES))

test-processes: install
	$(BIN)/python -m pytest $(OF_PROCESSES)

# The CUDA kernels on the host, where every access is checked and every race of threads is found (a
# forgotten barrier is one); neither Python nor torch takes part.
test-csrc: export PATH := $(abspath $(BIN)):$(PATH)
test-csrc: install
	cmake -S . -B build/csrc -G Ninja
	cmake --build build/csrc --target ghl_tests --parallel 2
	ctest --test-dir build/csrc --output-on-failure --parallel 2

# Every Triton kernel and tile for three architectures, on two cores.
test-compile: install
	$(BIN)/python -m pytest tests/compile

# The same with the Triton of torch 2.11, in a directory of its own.
compile-check: install $(TRITON_3_6)/triton
	PYTHONPATH=$(abspath $(TRITON_3_6)) $(BIN)/python -m pytest tests/compile

$(TRITON_3_6)/triton:
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON_3_6) triton==3.6.0

test-integrations: install
	$(BIN)/python -m pip install --quiet -c constraints.txt 'ghl-kernels[train,integrations]'
	set -e; for example in $(EXAMPLES); do \
	    echo "$$example"; $(BIN)/python -W ignore examples/$$example.py; done
	$(BIN)/python -m pytest -n auto tests/alignment/test_hugging_face.py $(OF_OTHERS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Wants a quiet machine; writes bench/results/<machine>.json.
bench: export OMP_WAIT_POLICY = ACTIVE
bench: install
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-json=$(BENCHMARK)
	$(BIN)/python -m bench.report $(BENCHMARK)

# On a machine with a GPU, in ten minutes: tests, sanitizer, tuning, measurements.
bench-gpu:
	bench/gpu_suite.sh

clean:
	rm -rf $(VENV) build *.egg-info ghl_kernels/*.so
