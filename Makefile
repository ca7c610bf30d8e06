# The two commands of a fresh machine: `make demo` and `make test`. Both set up everything.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint bench setup

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

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3.11 -m venv $(VENV) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)
