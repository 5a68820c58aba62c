# Thin: each target is a line or two that a person could type.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install quickstart shakespeare test test-slow lint types coverage configs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/.installed: requirements.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed requirements-dev.txt requirements-tracking.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

install: $(BIN)/.installed  ## create .venv with everything pinned

quickstart: $(BIN)/.installed  ## every stage on an embedded corpus, about 6 minutes on 2 CPU cores
	rm -rf runs/quickstart
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/quickstart.sh

test: $(BIN)/.installed-dev  ## the suite
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(BIN)/.installed-dev  ## the long forms
	$(BIN)/python -m pytest -m slow

lint: $(BIN)/.installed-dev  ## style of the code
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(BIN)/.installed-dev  ## static types
	$(BIN)/mypy codex_accel

coverage: $(BIN)/.installed-dev  ## the suite under coverage, with its gate
	$(BIN)/nox -s coverage

configs: $(BIN)/.installed  ## write configs/base/ from the schema
	for stage in quickstart_corpus train_tokenizer inspect_tokenizer prepare_data train evaluate generate export_model verify checkpoints replay compare_reports quickstart_table serve; do \
	  $(BIN)/python scripts/$$stage.py --defaults > configs/base/$$stage.yaml; done

clean:  ## remove runs and caches, not the environment
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage* *.egg-info
