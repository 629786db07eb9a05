# `make demo` and `make test` work on a fresh machine with Python 3.11; CONTRIBUTING.md has the rest.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# One file a room, and none that trains, downloads or builds a model of a library.
QUICK = $(patsubst %,tests/test_%.py,house import algebra contract declined store fuse)

.PHONY: demo test quick lint format clean

demo: $(VENV)/.ready
	$(BIN)/repfx demo

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not zoo" $(QUICK)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests examples

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,demo,data]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
