# Two commands matter: `make demo` and `make test`. Both make .venv on first use and run offline after that.
PYTHON ?= python3
VENV   ?= .venv
SHARED ?= ../shared
ARGS   ?=
BIN    := $(VENV)/bin
RUN    := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-1} HF_HUB_DISABLE_TELEMETRY=1 PYTHONPATH=.:kernels $(BIN)/python

.PHONY: help demo test test-all check fmt bench-quality bench-speed bench-memory bench-resume bench-parity bench-serve bench-soak bench-fuzz bench-kernels test-gpu sanitize-kernels clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "quantlab needs Python 3.11 to 3.13; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

demo: $(VENV)/.installed  ## quantize the shipped model to INT4 and INT8 and print one table
	$(RUN) examples/demo.py $(ARGS)

test: $(VENV)/.installed  ## run the suite (CPU, offline)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu" $(ARGS)

test-all: $(VENV)/.installed  ## the suite with the tests that need a GPU
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q $(ARGS)

test-gpu: $(VENV)/.installed  ## the kernel suite on the GPU that is here
	$(RUN) -m pytest -q --confcutdir=tests/kernels -m "not slow" tests/kernels $(ARGS)

sanitize-kernels: $(VENV)/.installed  ## every kernel under compute-sanitizer: bad accesses, then races
	for cases in sanitizer_cases sanitizer_cases_attention; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=.:kernels compute-sanitizer --tool memcheck --error-exitcode 9 \
	    $(BIN)/python tests/kernels/$$cases.py || exit; \
	  PYTHONPATH=.:kernels compute-sanitizer --tool racecheck $(BIN)/python tests/kernels/$$cases.py || exit; \
	done

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

check: $(VENV)/.installed-dev  ## lint, types and fast tests; edits nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu and not slow" $(ARGS)

fmt: $(VENV)/.installed-dev  ## format and sort imports
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench-quality: $(VENV)/.installed  ## perplexity of every method on the models under SHARED (ARGS=--help)
	$(RUN) -m quantlab.bench.quality --shared $(SHARED) $(ARGS)

bench-speed: $(VENV)/.installed  ## balanced against the calibrate-twice, Hessian-per-linear way
	$(RUN) -m quantlab.bench.speed --shared $(SHARED) $(ARGS)

bench-memory: $(VENV)/.installed  ## peak memory on a 3 GB random checkpoint against the dry run
	$(RUN) -m quantlab.bench.memory $(ARGS)

bench-resume: $(VENV)/.installed  ## kill at random points, resume, compare every file
	$(RUN) -m quantlab.bench.resume $(ARGS)

bench-parity: $(VENV)/.installed  ## greedy texts of the engine against transformers, one prompt at a time (ARGS=--help)
	$(RUN) -m quantlab.bench.parity $(ARGS)

bench-serve: $(VENV)/.installed  ## what each part of the server gives on this CPU (ARGS="--shared ../shared" for books-28m)
	$(RUN) -m quantlab.bench.serve_design $(ARGS)

bench-soak: $(VENV)/.installed  ## ten minutes of a fifth more than the server can take
	$(RUN) -m quantlab.bench.soak $(ARGS)

bench-fuzz: $(VENV)/.installed  ## two thousand sound and unsound requests from the OpenAPI document
	QUANTLAB_FUZZ_EXAMPLES=200 $(RUN) -m pytest -q -n 0 tests/e2e/test_serve_fuzz.py $(ARGS)

bench-kernels: $(VENV)/.installed  ## every kernel on this GPU against its baselines and floors (ARGS=--help)
	$(RUN) -m quantlab.bench.kernels $(ARGS)

clean:  ## remove what the targets made, the environment included
	rm -rf $(VENV) build dist work .pytest_cache .mypy_cache .ruff_cache .hypothesis
