# make test          the environment in .venv, the build, the tests        (ARGS="-k plan" for some)
# make bench         the benchmark                                         (ARGS="--network yolov5s --mode eval")
# make bench-micro   pytest-benchmark suites, one per pass
# make aot           the GPU kernels compiled for GPUs that are not here
# make gpu           on a machine with an NVIDIA GPU: its tests, then the GPU benchmark, within ten minutes
# make lint, make clean
# Needs Python 3.10 or newer (PYTHON=python3.12 for another one), a C++ compiler and make.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
REQUIREMENTS := $(wildcard requirements/*.txt)

.PHONY: venv test bench bench-micro aot gpu lint clean

venv: .venv/built

.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(addprefix -r ,$(REQUIREMENTS))
	touch $@

.venv/built: .venv/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

test: venv
	$(BIN)/pytest $(ARGS)

bench: venv
	$(BIN)/python -m bench.throughput $(ARGS)

bench-micro: venv
	$(BIN)/pytest bench/micro $(ARGS)

aot: venv
	$(BIN)/pytest -q tests/aot $(ARGS)

gpu: venv
	$(BIN)/python -m bench.gpu --tests $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check

clean:
	rm -rf .venv build dist coordatt_fast.egg-info coordatt_fast/lib
