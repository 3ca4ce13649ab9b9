# make test          the environment in .venv, the build, the tests        (ARGS="-k plan" for some)
#                                                                          (SEED=1 for other random numbers)
# make bench         the benchmark                                         (ARGS="--network yolov5s --mode eval")
# make bench-blocks  the same network with other attention blocks         (ARGS="--batch 1 --mode eval")
# make examples      the examples, pictures in build/examples
# make bench-micro   pytest-benchmark suites, one per pass
# make hub           the package as a kernel of the Hugging Face Hub, in build/hub (Python 3.11 or newer)
# make aot           the GPU kernels compiled for GPUs that are not here
# make attack        random attacks on all of it for MINUTES=60, two processes  (SEED=1 for a known start)
# make sanitized     the CUDA kernels in the emulator, under sanitizers
# make native        the CPU kernels for aarch64 in an emulator, and here under sanitizers
# make gpu           on a machine with an NVIDIA GPU: its tests, then the GPU benchmark, within ten minutes
# make lint         ruff, mypy on the public face, the workflows
# make clean
# Needs Python 3.10 or newer (PYTHON=python3.12 for another one), a C++ compiler and make.

PYTHON ?= python3
ARGS ?=
SEED ?=
MINUTES ?= 60
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
# The suite on all cores; what ARGS chooses in one process (tests/conftest.py). A hang ends the run: its worker is not replaced.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0
ALONE := requirements/third-party.txt
REQUIREMENTS := $(filter-out $(ALONE) requirements/release.txt,$(wildcard requirements/*.txt))

.PHONY: venv test bench bench-blocks bench-micro examples hub aot sanitized native attack gpu lint clean

venv: .venv/built

.venv/installed: $(REQUIREMENTS) $(ALONE)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(addprefix -r ,$(REQUIREMENTS))
	$(BIN)/python -m pip install --quiet --no-deps -r $(ALONE)
	touch $@

.venv/built: .venv/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

test: venv
	SEED=$(SEED) $(BIN)/pytest $(WORKERS) $(ARGS)

bench: venv
	$(BIN)/python -m bench.throughput $(ARGS)

bench-blocks: venv
	$(BIN)/python -m bench.other_blocks $(ARGS)

examples: venv
	$(BIN)/python -m examples.accelerate_timm_and_yolo $(ARGS)
	$(BIN)/python -m examples.train_side_by_side $(ARGS)
	$(BIN)/python -m examples.look_at_attention $(ARGS)

bench-micro: venv
	$(BIN)/pytest bench/micro $(ARGS)

hub: venv
	$(BIN)/python -m hub.assemble $(ARGS)

aot: venv
	$(BIN)/pytest -q tests/aot $(ARGS)

attack: venv
	$(BIN)/python -m tests.attack --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

sanitized: venv
	$(BIN)/pytest -q tests/cuda_on_cpu/test_sanitized.py $(ARGS)

native: venv
	SEED=$(SEED) $(BIN)/pytest -q tests/native $(ARGS)

gpu: venv
	$(BIN)/python -m bench.gpu --tests $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml
	$(BIN)/zizmor --offline --quiet .github

clean:
	rm -rf .venv build dist coordatt_fast.egg-info coordatt_fast/lib
