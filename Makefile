# metadist: from nothing to a learning curve (`make train`) or a tested tree (`make test`).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Processes that run the tests, file by file.
PROCESSES ?= 2
LINT := $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

.DEFAULT_GOAL := help
.PHONY: help install train test lint test-slow test-gpu chaos fuzz bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(INSTALLED) ## make .venv with metadist and its tools

# torch goes first and by itself: it is by far the largest, and pip then says what it is waiting for.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch (the largest download)"
	@$(BIN)/pip install -q -c constraints.txt torch
	@echo "Installing metadist and its tools"
	@$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

train: $(INSTALLED) ## meta-train on glyphs with two workers, a few minutes
	$(BIN)/metadist train configs/glyphs_maml.yaml

# Tests that start Ray wait for much of their time, in which the rest is checked; it speaks last.
test: $(INSTALLED) ## the tests; lint, types and the import contract beside them
	@($(LINT)) > $(VENV)/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n $(PROCESSES) --no-loadscope-reorder; tests=$$?; \
	wait $$lint; linted=$$?; cat $(VENV)/lint.log; exit $$((tests || linted))

lint: $(INSTALLED) ## ruff, mypy and the import contract
	$(LINT)

test-slow: $(INSTALLED) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: $(INSTALLED) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

chaos: $(INSTALLED) ## a hundred faults injected into live runs, each seen to fire (half an hour)
	$(BIN)/python -m pytest -m chaos

fuzz: $(INSTALLED) ## ten thousand altered shard sets, checkpoints and configs each
	$(BIN)/python -m tests.fuzz.fuzz --cases 10000

bench: ## list the benchmarks
	@find tools/bench -maxdepth 1 -name '*.py' ! -name '_*' 2>/dev/null | sort | sed 's|^|  $(BIN)/python |; s|$$| --quick|'

clean: ## remove .venv and caches; runs and data stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find metadist tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
