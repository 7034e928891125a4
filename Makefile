# Everything a person types. `make quickstart` and `make test` need nothing but Python 3.11+ with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-gpu lint format clean

install: $(VENV)/installed

# One environment for users and developers: the stamp is renewed when a requirements file changes.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

test: install
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: install
	$(BIN)/python -m pytest -m gpu

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf sample_data runs predictions .pytest_cache .ruff_cache .mypy_cache
