# make demo    set up .venv (core only) and run the main job: train, kill, resume, evaluate, report   about 3 min + set-up
# make test    set up everything; lint, types, all tests, one test process per core   time budget on 2 cores: 15 min, set-up included
# make bench   the speed comparisons, a JSON for each file under benchmarks/results/   about an hour on a quiet machine
# make chaos   the long fault runs (hundreds of kills)
# make mutate  76 faults seeded into the kernels, each caught by the test it names   7 to 45 s a fault, two at a time
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := -c constraints.txt
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
BENCH_OUT ?= benchmarks/results
BENCH_NAME ?= $(shell date +%Y-%m-%d)-cpu

.PHONY: demo test lint types unit torchrec bench chaos mutate clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "recis needs Python 3.11 or 3.12; found " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# torch comes first and by its pin: a range would pull the CUDA build where a CPU build is at hand
.venv/.core: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install -q $(CONSTRAINTS) torch==2.13.0
	$(PIP) install -q $(CONSTRAINTS) -e .
	@touch $@

# torchrec declares the CUDA build of fbgemm, hence --no-deps; Hugging Face's package `kernels` lies apart, so that tests
# can import TRL with it and without it
.venv/.dev: .venv/.core
	$(PIP) install -q $(CONSTRAINTS) -e '.[dev,torchrec]'
	$(PIP) install -q $(CONSTRAINTS) --no-deps torchrec==1.8.0
	$(PIP) install -q $(CONSTRAINTS) --no-deps --upgrade --target .venv/hf-kernels kernels
	@touch $@

demo: .venv/.core
	$(BIN)/recis demo

test: lint types unit torchrec

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/pyright --warnings

unit: .venv/.dev
	$(BIN)/python -m pytest -q -n logical --maxprocesses=8 --dist worksteal -m "not torchrec and not slow" --durations=15

torchrec: .venv/.dev
	$(BIN)/python -m pytest -q -m "torchrec and not slow"

# a process for each file, so that no library's threads of one file are there in the next; a failure stops none of the others
bench: .venv/.dev
	@failed=; written=; for file in benchmarks/test_*.py; do \
		name=$$(basename $$file .py); out=$(BENCH_OUT)/$(BENCH_NAME)-$${name#test_}.json; \
		if $(BIN)/python -m pytest $$file -q --benchmark-json=$$out; then written="$$written $$out"; else failed="$$failed $$file"; fi; \
	done; \
	test -z "$$written" || $(BIN)/recis bench report $$written; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

chaos: .venv/.dev
	$(BIN)/python -m pytest -q -m slow --timeout=7200

mutate: .venv/.dev
	$(BIN)/python tests/kernels/mutate.py

clean:
	rm -rf .venv build dist *.egg-info
