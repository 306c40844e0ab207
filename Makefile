# Two commands matter: `make demo` and `make test`. Both set up .venv themselves, once.
PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test check lint format types pytest bench efficiency faults clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    install if needed, then grow a small model that learns code without forgetting prose'
	@echo 'make test    install if needed, then the whole gate: lint, format, types, tests'
	@echo 'make check   the gate without the slow tests      make format  rewrite files in the house format'
	@echo 'make bench   measured speed against the targets   make faults  the long fault campaigns'
	@echo 'make efficiency  ModuleFormer against dense models on ../shared/corpora (seven minutes)'
	@echo 'make clean   remove .venv and caches              PYTHON=...   python 3.11, 3.12 or 3.13'

demo: $(VENV)/.installed
	$(BIN)/mfext grow --domain code

test: lint types pytest

check: lint types
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow'

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

# Two processes, whole files each, since a file's tests share what they trained.
pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test
	$(BIN)/python kernels/bench/bench.py

efficiency: $(VENV)/.installed-test
	$(BIN)/python kernels/bench/efficiency.py

faults: $(VENV)/.installed-test
	$(BIN)/python tests/faults/campaign.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

# The stamps are newer than what they were installed from, so a second `make demo` starts at once.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[test,tensorboard]'
	touch $@ $(VENV)/.installed
