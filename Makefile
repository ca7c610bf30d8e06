# The two commands of a fresh machine: `make demo` and `make test`. Both set up everything.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint bench bench-decompositions bench-quantization bench-planning bench-training setup

demo: $(READY)
	$(VENV)/bin/sft demo

test: $(READY) lint
	$(PYTHON) -m pytest -m "not slow"

test-slow: $(READY)
	$(PYTHON) -m pytest -m slow

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(PYTHON) benchmarks/main_job.py

# Needs more packages for some networks and data; each script names what is missing.
bench-decompositions: $(READY)
	$(PYTHON) benchmarks/decompositions.py
	$(PYTHON) benchmarks/calibration.py
	$(PYTHON) benchmarks/no_finetuning.py

# Needs the peers and more packages for some networks and data; each script names what is missing.
bench-quantization: $(READY)
	$(PYTHON) benchmarks/quantization.py

# Needs more packages for one network and its photos.
bench-planning: $(READY)
	$(PYTHON) benchmarks/planning.py

bench-training: $(READY)
	$(PYTHON) benchmarks/training.py

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3.11 -m venv $(VENV) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)
