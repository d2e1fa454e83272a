# `make demo` and `make test` are all that one needs. Both set up .venv first, and only what is not set up yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_INPUTS := pyproject.toml setup.py hitsr_fast/_version.py \
                $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.py \
                csrc/*/*/*.h kernels/*/__init__.py)

# ninja, which builds the extension, is looked up on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-avx2 lint slow gpu wheel clean

demo: $(VENV)/.installed
	$(BIN)/hitsr-fast upscale examples/budgie-osprey.jpg -o out --overwrite
	$(BIN)/python examples/before_after.py examples/budgie-osprey.jpg out/budgie-osprey_x4.png out/before_after.png
	@echo "the photo restored, twice and four times as large, and a comparison:" && ls -1 out/*.png

# Two processes, each with one thread: compiling kernels and interpreting them have no use for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# Triton asks for its interpreter once, as kernels are defined: its tests are a call of their own.
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) tests/ops

test: lint
	$(PYTEST) -m "not slow and not gpu"
	$(INTERPRETED) -m "not slow and not gpu"

# As on a CPU without AVX-512: a better one would hide what only that one meets.
# Left out: a benchmark that first times large products of bfloat16, which take minutes there, and what no instruction
# set has a part in.
test-avx2: $(VENV)/.installed-dev
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 HITSR_FAST_CPU_ISA=avx2 \
		$(PYTEST) -m "not slow and not gpu" \
		tests/ops tests/nn tests/models tests/compat tests/cli/test_upscale.py tests/test_pipeline.py \
		tests/train/test_tasks.py tests/train/test_codebook.py tests/train/test_pairs.py \
		tests/benchmarks/test_commands.py --deselect \
		tests/benchmarks/test_commands.py::test_every_op_is_right_by_each_way_to_call_it \
		--ignore tests/nn/test_stale_codebooks.py --ignore tests/ops/test_cuda_graphs.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/.installed-dev
	$(PYTEST) -m "slow and not gpu"
	$(INTERPRETED) -m "slow and not gpu"

# For whoever has a GPU: builds, tests and measures there, and writes a report to attach to an issue.
gpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu $(GPU_OPTIONS)

wheel: $(VENV)/.torch
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls -1 dist/*.whl

clean:
	rm -rf $(VENV) build dist out *.egg-info hitsr_fast/_C*.so

# torch has to be there before the package: a build in isolation would fetch one of its own each time.
$(VENV)/.torch:
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "torch>=2.10" "setuptools>=77" wheel ninja
	touch $@

# A module of one Python's own ABI, as older checkouts have, would be found before that of the stable one.
STALE := hitsr_fast/_C.cpython-*.so hitsr_fast/_C_cuda.cpython-*.so

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	rm -f $(STALE)
	$(PIP) install --quiet --no-build-isolation -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(BUILD_INPUTS)
	rm -f $(STALE)
	$(PIP) install --quiet --no-build-isolation -e ".[dev]"
	touch $(VENV)/.installed $@
