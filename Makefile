# `make demo` and `make test` each set up their own environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint form types pages docs mutants matrix stress clean

help:                   ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

# Modules are compiled when they are first imported: most of those installed never are.
unexport PYTHONDONTWRITEBYTECODE
# Seconds, for a mirror that has to fetch a package of gigabytes first.
export UV_HTTP_TIMEOUT ?= 300

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python --constraint constraints.txt --editable . --group dev
	@touch $@

install: $(READY)       ## create .venv with the pinned packages

demo: $(READY)          ## fine-tune a small ViT on real images: plain, with StochCA, with controls
	$(BIN)/python -m bench.demo --output runs/demo

lint: form types pages  ## format, lint, types, import contract and rendered pages

form: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(READY)
	$(BIN)/mypy

pages: $(READY)
	$(BIN)/python -m bench.report --check

docs: $(READY)          ## build the pages into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: $(READY)          ## lint, types, import contract, rendered pages, and tests, that of the site among them
	$(MAKE) --jobs 2 lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

mutants: $(READY)       ## break the code on purpose and watch the tests fail
	$(BIN)/python -m tests.mutants

matrix: $(READY)        ## test wheel and sdist with the oldest and newest of what is supported, in empty environments
	$(BIN)/python -m tests.scorecard R21

stress: $(READY)        ## gather the scorecard of docs/reliability.md: at most 2 hours, goes on where it was stopped
	$(BIN)/python -m tests.scorecard; status=$$?; $(BIN)/python -m bench.report; exit $$status

clean:                  ## remove the environment and everything generated
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache
