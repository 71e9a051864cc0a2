# Everything a developer runs; `make` alone lists it. The virtual environment is made when first
# needed, and stamp files in it remember what is installed: a second run downloads nothing.

VENV    ?= .venv
WHEELS  ?= .cache/wheels
# Test workers. Each runs its numerics on one thread.
JOBS    ?= 2
# What pip installs where no GPU is found and Python has no torch of its own. Where this version
# comes with CUDA and that is not wanted, name PyTorch's CPU wheels here by pip's --index-url.
TORCH   ?= torch==2.13.0
# A CPU build of PyTorch brings no triton; builds for CUDA bring their own, which is then kept.
TRITON  ?= triton==3.6.0

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)
endif

# Compiling the CUDA extension is a step of its own: `make demo` should not wait for it.
PIP     := ENCODER_FAST_BUILD_CUDA=0 $(VENV)/bin/python -m pip --disable-pip-version-check -qq
SOURCES := bench encoder_fast examples kernels tests conftest.py noxfile.py setup.py
# For this GPU alone, which takes half of the time. The extension for the CPU belongs to it: it looks
# at modules and weights while a CUDA graph runs.
ON_GPU  := ENCODER_FAST_BUILD_CUDA=$(or $(ENCODER_FAST_BUILD_CUDA),1) \
	ENCODER_FAST_CUDA_ARCHS="$(or $(ENCODER_FAST_CUDA_ARCHS),native)" PYTHONPATH=.
# The CUDA extension is tested where its compiler is, with or without a GPU.
NVCC         := $(shell command -v nvcc || ls $(CUDA_HOME:%=%/bin/nvcc) /usr/local/cuda/bin/nvcc 2>/dev/null)
CUDA         := $(if $(NVCC),$(VENV)/.cuda)
CUDA_SOURCES := $(shell find csrc -type f -not -path "csrc/cpu/*")
# What every install compiles, where there is a C++ compiler.
CPU_SOURCES  := $(shell find csrc/cpu -type f) csrc/dtype.h
# Real BERT weights for the parity tests, read out of the wheel; installing it would pull old pins.
RXNFP        := $(WHEELS)/rxnfp-0.1.0-py3-none-any.whl
RXNFP_SHA256 := c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf

# Documents with human similarities, for the same; its wheel serves every Python, it is only read.
GENSIM        := $(WHEELS)/gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl
GENSIM_SHA256 := 91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8

.PHONY: help demo test mutants test-gpu bench bench-gpu cost first-contact in-tree lint format matrix build clean distclean
.DELETE_ON_ERROR:

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## Patch a real model: parity, throughput and a semantic search
	@$(VENV)/bin/encoder-fast demo

# A file a worker: its tests share what is dear to make. Those that compile come early.
test: lint $(RXNFP) $(GENSIM) $(CUDA) ## Linters, types and the whole test suite
	@ENCODER_FAST_TEST_WHEELS="$(abspath $(WHEELS))" OMP_NUM_THREADS=1 \
		$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-gpu: in-tree ## On an NVIDIA GPU, what matters there, 2 minutes, predicted (ARGS="kernels -k …")
	@$(ON_GPU) $(PYTHON) tests/on_gpu.py $(ARGS)

# Each in a copy of the tree; a table goes where --out says.
mutants: $(VENV)/.test ## Break kernels on purpose, and see which test notices (ARGS="--only kernels/*")
	@$(VENV)/bin/python tests/mutants/runner.py --jobs $(JOBS) $(ARGS)

# Figures are reported even if a contestant of ours failed; the status still says so.
bench: $(VENV)/.bench ## Benchmarks and docs/performance.md, 15 minutes on two cores (ARGS=--quick: 3)
	@$(VENV)/bin/python -m bench all $(ARGS); status=$$?; \
		$(VENV)/bin/python -m bench report && exit $$status

bench-gpu: in-tree ## The same on an NVIDIA GPU, 9 minutes (ARGS=--quick: 3; OUT=folder for the record)
	@$(ON_GPU) $(PYTHON) -m bench all $(ARGS) $(if $(OUT),--out "$(OUT)"); status=$$?; \
		$(if $(OUT),exit $$status,PYTHONPATH=. $(PYTHON) -m bench report && exit $$status)

first-contact: ## On an NVIDIA GPU, build, tests, sweep, sanitizers, bench: 7.5 minutes (OUT=folder)
	@$(PYTHON_FITS)
	@test -n "$(OUT)" || { echo "first-contact needs OUT=folder, where all results go" >&2; exit 1; }
	@PYTHONPATH=. $(PYTHON) -m bench.first_contact "$(OUT)"

cost: $(VENV)/.test $(CUDA) ## Count the kernels' machine code: docs/kernels/cost.md, no GPU needed
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench cost

# Nothing is installed: the extensions are built beside their sources, by the Python that imports them.
# A second run compiles what has changed. Without the one for CUDA half of the tests and benchmarks would
# be left out in silence, so that it is an error to have none, unless ENCODER_FAST_BUILD_CUDA=0 says so.
in-tree:
	@$(PYTHON_FITS)
	@$(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || \
		{ echo "$(NO_GPU)" >&2; exit 1; }
	@$(ON_GPU) $(PYTHON) setup.py -q build_ext --inplace --parallel 2

lint: $(VENV)/.test ## Check style, format and types
	@$(VENV)/bin/ruff check $(wildcard $(SOURCES))
	@$(VENV)/bin/ruff format --check $(wildcard $(SOURCES))
	@$(VENV)/bin/mypy

format: $(VENV)/.test ## Put the code in shape
	@$(VENV)/bin/ruff check --fix $(wildcard $(SOURCES))
	@$(VENV)/bin/ruff format $(wildcard $(SOURCES))

matrix: $(VENV)/.test $(RXNFP) $(GENSIM) ## The tests under other versions of transformers and triton
	@ENCODER_FAST_TEST_WHEELS="$(abspath $(WHEELS))" TORCH="$(TORCH)" TRITON="$(TRITON)" \
		$(VENV)/bin/nox

build: $(VENV)/.test ## Source distribution and wheel, in dist/
	@$(VENV)/bin/python -m build

clean: ## Remove builds and caches
	rm -rf build dist encoder_fast.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf encoder_fast/_c*.so $(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.cuda

distclean: clean ## Remove the environments and downloads too
	rm -rf .venv .nox .cache

# The environment and its PyTorch. A torch that is there already is used as it is, but for a CPU
# build on a machine with a GPU; constraints.txt keeps later installs from replacing it.
$(VENV)/.torch:
	@$(PYTHON_FITS)
	@set -e; gpu=no; if nvidia-smi >/dev/null 2>&1; then gpu=yes; fi; \
	if test ! -x $(VENV)/bin/python; then \
		echo "encoder_fast: new environment in $(VENV)"; \
		if $(PYTHON) -c "$$FIND_TORCH" $$gpu >/dev/null 2>&1; then flag=--system-site-packages; fi; \
		$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { echo "$(NO_VENV)" >&2; exit 1; }; \
		$(PYTHON) -m venv $$flag $(VENV); \
	fi; \
	if own=`$(VENV)/bin/python -c "$$FIND_TORCH" $$gpu 2>/dev/null`; then \
		echo "encoder_fast: using the torch $$own that is already installed"; \
	else \
		torch="$(TORCH)"; if test $$gpu = yes; then torch="torch>=2.8"; fi; \
		echo "encoder_fast: installing $$torch (a large download the first time)"; \
		$(PIP) install $$torch; \
	fi
	@$(VENV)/bin/python -c "$$PIN_TORCH" "$(TRITON)" > $(VENV)/constraints.txt
	@touch $@

PYTHON_FITS = $(if $(PYTHON),true,echo "$(NO_PYTHON)" >&2; exit 1)
NO_PYTHON   = encoder_fast needs Python 3.11, 3.12 or 3.13 and found none; name one by PYTHON=/path/to/python3
NO_GPU      = $(PYTHON) has no PyTorch that sees an NVIDIA GPU; name one that has by PYTHON=/path/to/python3
NO_VENV     = $(PYTHON) cannot make a virtual environment; on Debian, install the package python3-venv

# Prints the version of a torch that fits, or fails. argv: whether there is a GPU.
define FIND_TORCH
import sys, torch
from torch.torch_version import TorchVersion
if TorchVersion(torch.__version__) < "2.8" or (sys.argv[1] == "yes" and not torch.version.cuda):
    sys.exit(1)
print(torch.__version__)
endef
export FIND_TORCH

# Prints pip's constraints: the torch at hand, and its triton or, where it has none, the given one.
define PIN_TORCH
import sys
from importlib.metadata import PackageNotFoundError, version
print("torch==" + version("torch"))
try:
    print("triton==" + version("triton"))
except PackageNotFoundError:
    print(sys.argv[1])
endef
export PIN_TORCH

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(CPU_SOURCES)
	@echo "encoder_fast: installing the package and what the demo needs"
	@$(PIP) install -c $(VENV)/constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml setup.py $(CPU_SOURCES)
	@echo "encoder_fast: installing the package and what the tests need"
	@$(PIP) install -c $(VENV)/constraints.txt -e ".[demo,test,dev]"
	@touch $(VENV)/.demo $@

$(VENV)/.cuda: $(VENV)/.test setup.py $(CUDA_SOURCES)
	@echo "encoder_fast: compiling the CUDA extension (two minutes on two cores the first time)"
	@PATH="$(abspath $(VENV))/bin:$$PATH" ENCODER_FAST_BUILD_CUDA=1 ENCODER_FAST_BUILD_CPU=0 \
		$(VENV)/bin/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml setup.py $(CPU_SOURCES)
	@echo "encoder_fast: installing the package and the peers that it is measured against"
	@$(PIP) install -c $(VENV)/constraints.txt -e ".[bench]"
	@touch $@

$(RXNFP): | $(VENV)/.torch
	@echo "encoder_fast: fetching real BERT weights for the parity tests (75 MB)"
	@$(PIP) download --no-deps --only-binary :all: -d $(WHEELS) rxnfp==0.1.0
	@echo "$(RXNFP_SHA256)  $@" | sha256sum --check --quiet

$(GENSIM): | $(VENV)/.torch
	@echo "encoder_fast: fetching documents with human similarities for the text tests (28 MB)"
	@$(PIP) download --no-deps --only-binary :all: --python-version 3.11 --implementation cp \
		--abi cp311 --platform manylinux_2_28_x86_64 -d $(WHEELS) gensim==4.4.0
	@echo "$(GENSIM_SHA256)  $@" | sha256sum --check --quiet
