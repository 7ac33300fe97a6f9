# Needs Python >= 3.11 and PyPI. Everything lives in .venv; EXTRAS=gpu selects the GPU build of vLLM and FAISS.
PYTHON ?= python3
EXTRAS ?= cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(EXTRAS)
LOCK := infra/locks/$(EXTRAS).txt
UV_VERSION := 0.13.9
FAST := -m "not slow and not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The CPU build of vLLM needs PyTorch's "+cpu" wheel, which PyPI does not carry: it comes from the folder that
# PIP_FIND_LINKS names, otherwise from PyTorch's own index. The GPU build takes everything from PyPI.
ifeq ($(EXTRAS),cpu)
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else
TORCH := --torch-backend cpu
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench audit lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## make the environment (the others do so by themselves)

demo: $(READY) ## annotate 72 queries with the embedded model and show the results
	$(BIN)/python -m jobs.demo

test: $(READY) ## run the tests that need no GPU and finish soon
	$(BIN)/python -m pytest $(FAST)

check: $(READY) ## lint, spelling, types, tests and their coverage
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest $(FAST) --cov --cov-report=
	@echo "lines covered by tests: $$($(BIN)/coverage report --format=total) %"

bench: $(READY) ## compare with other implementations' shapes and the bare engine, side by side
	$(BIN)/python -m jobs.benchmark --json bench.json --plot bench.png

audit: $(READY) ## look the dependencies up among known vulnerabilities (needs PyPI)
	$(BIN)/uv tool run pip-audit --path $(VENV)/lib/python3*/site-packages

lock: $(BIN)/uv ## pin the newest versions that pyproject.toml allows
	$(BIN)/uv pip compile pyproject.toml --extra $(EXTRAS) --extra dev --universal --upgrade $(TORCH) --quiet \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links --output-file $(LOCK)

clean: ## delete the environment, outputs and tool caches
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*

# An environment of the other extra is made anew: both bring a package that provides the module faiss.
$(READY): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.12")'
	$(if $(filter-out $(READY),$(wildcard $(VENV)/.ready-*)),rm -rf $(VENV))
	$(MAKE) $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python $(TORCH) --constraints $(LOCK) --compile-bytecode --editable ".[$(EXTRAS),dev]"
	@touch $@

$(BIN)/uv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
