# make ab      real Megatron-Core trains a small DeepSeek-V3 on this machine's CPU, stock against plugin
# make test    every test that this machine can run
# make lint    ruff and mypy
# Another Python: make test PYTHON=python3.12 (gets an environment of its own)
PYTHON ?= python3
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: ab test lint clean
.DELETE_ON_ERROR:

ab: $(STAMP)
	$(BIN)/epv2 ab recipes/deepseek_v3_tiny.yaml

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[megatron,report,test]'
	touch $@

clean:
	rm -rf .venv-* runs build dist *.egg-info
