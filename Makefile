# Everything starts from Python >= 3.11, pip and make: .venv is made here, and made up to date when the pins change.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: train test quick check chaos bench gpu clean

# Four minutes on two cores; prints the table and the path of the report.
train: .venv/.run
	$(BIN)/python -m trainer experiment=quickstart $(ARGS)

# Two workers, each file on one of them, so that its worker processes are started once; the long files first.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		tests/integration tests/distributed tests/peers tests/chaos tests/unit $(PYTEST_ARGS)

# A minute or two: the unit tests that start no processes.
quick: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not process and not slow" tests/unit $(PYTEST_ARGS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

# Attacks on runs, and the table of what came out; half an hour. One kind of attack: make chaos ARGS="kills --count 10"
chaos: .venv/.dev
	$(BIN)/python -m tests.chaos $(ARGS)

# Timings: nothing else should run meanwhile.
bench: .venv/.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_step
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_step --small
	$(BIN)/python -m tests.benchmarks.bench_startup
	$(BIN)/python -m tests.benchmarks.bench_compare
	$(BIN)/python -m tests.benchmarks.bench_ema
	$(BIN)/python -m tests.benchmarks.bench_save
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_snapshots
	$(BIN)/python -m tests.benchmarks.bench_posthoc

# What only a GPU can show: one JSON line a figure. Needs no network, and no .venv: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu:
	PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m tests.gpu $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: it is large, and with it in place the rest cannot bring another build of it.
.venv/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(PIP) torch
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.run
	$(PIP) -e ".[test,check,tensorboard]"
	touch $@

.venv/.bench: .venv/.dev
	$(PIP) -e ".[bench]"
	touch $@
