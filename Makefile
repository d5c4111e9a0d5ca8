# make ab      real Megatron-Core trains a small DeepSeek-V3 on this machine's CPU, stock against plugin
# make test    every test that this machine can run (TESTS="FILE ..." = only those)
# make lint    ruff and mypy
# make gpu     the tests that need a GPU, with the Python and torch of the machine (PYTHON=...)
# Another Python: make test PYTHON=python3.12 (gets an environment of its own)
#
# make cuda-headers    headers of NCCL and CUDA, and nvcc, from PyPI into build/cuda; the targets above do it by themselves.
# CUDA_HOME and NCCL_HOME tell setup.py and the kernels' compiler where these lie. Set both, and your own are used
# and nothing is downloaded.
PYTHON ?= python3
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
TITAN := $(VENV)/.torchtitan
CUDA := build/cuda
HEADERS := $(if $(and $(CUDA_HOME),$(NCCL_HOME)),,$(CUDA)/.installed)
export CUDA_HOME ?= $(CURDIR)/$(CUDA)/nvidia/cu13
export NCCL_HOME ?= $(CURDIR)/$(CUDA)/nvidia/nccl
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: ab test gpu lint environment cuda-headers clean
.DELETE_ON_ERROR:

ab: $(STAMP)
	$(BIN)/epv2 ab recipes/deepseek_v3_tiny.yaml

# Only some tests: what most of them do without is not installed for them.
test: $(COMPILED) $(if $(TESTS),,$(TITAN))
	$(BIN)/python -m pytest $(TESTS)

gpu:
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m pytest -m gpu --continue-on-collection-errors $(TESTS)

environment: $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[megatron,report,test]'
	touch $@

# A minute of its own, for tests that are skipped without it.
$(TITAN): $(STAMP)
	$(PIP) -c constraints.txt -e '.[torchtitan]'
	touch $@

# Not part of the first line, either: a first look at the plugin on a CPU should not wait for headers of CUDA.
$(COMPILED): $(STAMP) $(HEADERS) $(wildcard csrc/runtime/* csrc/rma_loopback/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -c 'from epv2_plugin import _C; print("compiled part:", _C.built_against())'
	touch $@

cuda-headers: $(HEADERS)

# The library itself (400 MB) is not needed: nothing is linked, and at run time it is torch's or the environment's.
$(CUDA)/.installed: cuda-wheels.txt | $(BIN)/python
	rm -rf $(CUDA)
	$(PIP) --no-deps --target $(CUDA) -r cuda-wheels.txt
	rm -rf $(CUDA)/nvidia/nccl/lib
	touch $@

clean:
	rm -rf .venv-* runs build dist *.egg-info epv2_plugin/*.so
