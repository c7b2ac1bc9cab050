# Every target does its own set-up: a virtual environment in .venv, and the wheel built and installed there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py MANIFEST.in $(shell find dynquant -name '*.py*' -not -name '*.pyc' -o -name '*.px*' -o -name '*.h')
PYTEST_ARGS ?=
BENCH_ARGS ?=
PYTHONS ?= $(PYTHON)

.PHONY: help demo test lint bench bench-peers wheel wheels clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The wheel is installed by its path: the name alone would fetch an unrelated project.
$(VENV)/installed: $(BIN)/python $(SOURCES)
	rm -rf build dist && mkdir -p dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	$(PIP) install --quiet --force-reinstall --no-deps dist/*.whl
	$(PIP) install --quiet dist/*.whl
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(PIP) install --quiet "$$(echo dist/*.whl)[$*]"
	@touch $@

demo: $(VENV)/installed  ## quantise a real feed-forward block, every recipe beside NumPy
	$(BIN)/python bench/demo.py

test: lint $(VENV)/installed-test  ## lint, then test the installed wheel on every instruction set
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(VENV)/installed-lint  ## ruff, cython-lint, mypy, stubs against the built modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint dynquant/*.pyx dynquant/*.pxd dynquant/kernels/*.pxi tests/embed/*/*.pyx
	$(BIN)/mypy
	$(BIN)/stubtest --ignore-missing-stub dynquant._core dynquant.capi

bench: $(VENV)/installed-bench  ## every kernel on every instruction set beside NumPy; saves JSON and chart
	$(BIN)/python bench/run.py $(BENCH_ARGS)

bench-peers: $(VENV)/installed-bench $(VENV)/installed-peers  ## the same beside PyTorch and ONNX Runtime too
	$(BIN)/python bench/run.py --peers $(BENCH_ARGS)

wheel: $(VENV)/installed  ## build the wheel into dist/
	@ls -l dist

wheels: $(VENV)/installed-wheels  ## build, repair, check and test a wheel for each of PYTHONS, in wheelhouse/
	$(BIN)/python tools/wheels.py --pytest-args "$(PYTEST_ARGS)" $(PYTHONS)

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist wheelhouse *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f dynquant/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
