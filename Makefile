PYTHON ?= python3
VENV := .venv
TORCH ?= torch==2.13.0

.PHONY: quickstart test test-claims test-bits lint docs gpu clean

quickstart: $(VENV)/installed  ## set up and run the main job on Python's standard library
	$(VENV)/bin/pretrain run recipes/quickstart.yaml

test: $(VENV)/installed  ## set up and run the tests
	@command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && apt-get update -q && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -yq chromium; } || \
	  echo "Chromium is missing and cannot be installed here: the browser tests will be skipped" >&2
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -q -m "not long and not gpu and not claims"

test-claims: $(VENV)/installed  ## every claim once at smoke scale, from its recipe to its verdict
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -q -m "claims and not long and not gpu"

# Both variables: one is of torch's own kernels, the other of MKL's matrix products.
test-bits: $(VENV)/installed  ## the tests that promise equal bits once more, with the vectors of older processors
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  $(VENV)/bin/python -m pytest -n 2 -q -m "bits and not long and not gpu"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

gpu:  ## on a machine with a GPU, in less than 8 minutes: tests, speed, memory, decoding; writes runs/gpu.json
	$(PYTHON) benchmarks/gpu.py

docs: $(VENV)/installed  ## regenerate the pages made from docstrings
	$(VENV)/bin/python -m pretrain.docs

# torch first: with it in place nothing else pulls another build.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -c constraints.txt $(TORCH)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[audio,dev,eval,images,optimizers,tensorboard]'
	touch $@

clean:
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
