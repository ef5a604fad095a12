# Each target is one command on a fresh machine: it makes .venv and installs what it needs, once.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-
comma  := ,

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench lint cards evidence clean
.PRECIOUS: $(STAMP)%

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: $(STAMP)demo  ## fine-tune a real encoder four ways (ARGS=--quick: under a minute)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(BIN)/hf-reg demo $(ARGS)

test: lint $(STAMP)demo-test  ## lint, types and the fast tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -q $(ARGS)

test-all: lint $(STAMP)demo-test  ## the slow tests too: every architecture of the installed transformers
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -q -m "" $(ARGS)

bench: $(STAMP)demo-test  ## speed of the methods, as ratios
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks $(ARGS)

lint: $(STAMP)dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy cannot follow hf_reg.patches -> patches/: check a tree that is laid out as installed
	@rm -rf build/types && mkdir -p build/types && cp -r hf_reg build/types/ && cp -r patches build/types/hf_reg/patches
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p hf_reg

cards: $(STAMP)demo-test  ## render model_cards/ again (ARGS=--train: from new smoke runs of the examples)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.cards $(ARGS)

evidence: $(STAMP)demo-compare  ## compare methods on real data with few labels, hours; goes on where it stopped
	HF_HUB_OFFLINE=1 $(BIN)/python examples/evidence.py $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo-output quickstart-output

# .venv/.installed-demo-test: the extras demo and test; a second run finds the stamp and starts at once
$(STAMP)%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hf_reg[$(subst -,$(comma),$*)] into $(VENV) (minutes the first time)"
	@$(BIN)/python -m pip install --quiet -e ".[$(subst -,$(comma),$*)]" -c constraints.txt
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
