# Every target works on a fresh clone with nothing but Python and make: the first one sets .venv up.
# On Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares the download of CUDA.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint bench results setup clean

setup: $(STAMP)

# torch comes first and by itself, so that its version and build are settled before anything that depends on it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[hf,onnx,plots,fast,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/td-plugin demo --output build/demo

PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -q -n 2

test: $(STAMP)
	$(PYTEST) --dist loadfile -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(STAMP)
	$(VENV)/bin/python benchmarks/latency.py

# Tables and plots of docs/results/ from the numbers that lie there; measures nothing.
results: $(STAMP)
	$(VENV)/bin/python benchmarks/results.py

clean:
	rm -rf build dist *.egg-info
