# The front door. `make` lists the rooms.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo
DATA   ?= ../shared/data/open
STAMP  := $(VENV)/.ready
# Tests run in JOBS processes of one thread each; tests of threads ask for theirs.
JOBS   ?= 2
# cmake and ninja come with the environment: nothing but a compiler is asked of the machine.
export PATH := $(abspath $(BIN)):$(PATH)
NATIVE := setup.py CMakeLists.txt $(shell find csrc kernels -type f -name '*.[ch]*' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench evidence evidence-small wheel gpu-check clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# pip resolves the environment once; the build itself uses it (no second torch is fetched).
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "spcxr needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt pip setuptools wheel cmake ninja pybind11 torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## the environment in .venv, with the native library built

demo: setup ## the main job on drawn phantoms: report in demo/report.html
	$(BIN)/spcxr-train demo --out $(OUT)

test: setup ## every quick test (C++, Python, doctests), at most 15 minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow and not gpu' tests spcxr kernels

test-slow: setup ## the slow ones: wheels in fresh environments, long runs
	$(BIN)/pytest -m slow tests

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## every benchmark; results under benchmarks/results/
	s=0; for b in benchmarks/bench_*.py; do $(BIN)/pytest $$b || s=1; done; exit $$s

evidence: OUT = runs/evidence
evidence: setup ## does pretraining pay, on real chest X-rays in DATA: OUT/EVIDENCE.md; hours, goes on where it was stopped
	$(BIN)/python benchmarks/evidence/run.py "$(DATA)" "$(OUT)"

evidence-small: OUT = runs/evidence-small
evidence-small: setup ## a part of it in OUT, under half an hour on two quiet cores
	$(BIN)/python benchmarks/evidence/run.py "$(DATA)" "$(OUT)" --small

wheel: setup ## a wheel and an sdist in dist/
	$(BIN)/python -m build --no-isolation --outdir dist

gpu-check: ## on a CUDA machine: build, op tests, benchmarks, compute-sanitizer, in ten minutes
	bash benchmarks/gpu_check.sh

clean: ## what builds left behind (not the environment)
	rm -rf build dist *.egg-info spcxr/*.so
