PYTHON ?= python3
VENV := .venv
TORCH ?= torch==2.13.0
# Only errors are worth reading here; and what is never imported needs no bytecode, which takes a third of the time.
PIP := $(VENV)/bin/python -m pip install -qq --no-compile
# What is imported is compiled once and kept: without, each start compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE
# Workers of the tests: as many as there are cores, 2 to 4, each with about a gigabyte.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n < 2 ? 2 : n)))
# The files with tests of a mark: the others need not be imported.
marked = $(shell grep -ls 'mark\.$(1)' tests/test_*.py)

.PHONY: quickstart test test-processes test-claims test-bits test-real lint docs gpu clean

quickstart: $(VENV)/installed  ## set up and run the main job on Python's standard library
	@$(VENV)/bin/pretrain run recipes/quickstart.yaml
	@echo
	@echo "Look at runs/quickstart/report.html in a browser. To try next:"
	@echo
	@echo "  $(VENV)/bin/pretrain generate runs/quickstart/model --prompt 'def '     # let the model write"
	@echo "  $(VENV)/bin/pretrain runs show runs/quickstart                          # each stage: what it took, what it made"
	@echo "  $(VENV)/bin/pretrain new docs                                           # a recipe; put a folder of yours for docs"

test: $(VENV)/installed  ## set up and run the tests
	@command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && apt-get update -q && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -yq chromium; } || \
	  echo "Chromium is missing and cannot be installed here: the browser tests will be skipped" >&2
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -q -m "not long and not gpu and not claims and not processes"

test-processes: $(VENV)/installed  ## trainings on several processes, whole recipes, killed runs, the wheel, large files
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal -q -m "processes and not long and not gpu" $(call marked,processes)

test-claims: $(VENV)/installed  ## every claim once at smoke scale, from its recipe to its verdict
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -q -m "claims and not long and not gpu" $(call marked,claims)

test-real: $(VENV)/installed  ## two real checkpoints (22.7 M, 135 M weights) through every method: an hour, up to 9 GB
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m long tests/test_real_support.py

# Both variables: one is of torch's own kernels, the other of MKL's matrix products. Where there are no newer vectors the
# tests have been run with these.
test-bits: $(VENV)/installed  ## the tests that promise equal bits once more, with the vectors of older processors
	@grep -qs avx512f /proc/cpuinfo || echo "This processor has no newer vectors than AVX2: nothing to run once more"
	! grep -qs avx512f /proc/cpuinfo || OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -q -m "bits and not long and not gpu" $(call marked,bits)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

gpu:  ## on a machine with a GPU, in less than 8 minutes: tests, speed, memory, decoding; writes runs/gpu.json
	$(PYTHON) benchmarks/gpu.py

docs: $(VENV)/installed  ## regenerate the pages made from docstrings, and build the site: build/site/index.html
	$(VENV)/bin/python -m pretrain.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# torch first: with it in place nothing else pulls another build. Of all the rest, files with the known hashes alone.
$(VENV)/installed: pyproject.toml constraints.txt requirements.lock
	@echo "Setting up $(VENV) (1 to 2 minutes): pip and torch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) -c constraints.txt $(TORCH)
	@echo "Setting up $(VENV): the rest"
	@$(PIP) --require-hashes --no-deps -r requirements.lock
	@$(PIP) --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
