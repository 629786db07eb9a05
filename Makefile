# `make demo` and `make test` work on a fresh machine with Python 3.11; CONTRIBUTING.md has the rest.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# One file a room, and none that trains, downloads or builds a model of a library.
QUICK = $(patsubst %,tests/test_%.py,house import algebra contract declined store fuse)

.PHONY: demo test trt quick lint format clean

demo: $(VENV)/.ready
	$(BIN)/repfx demo

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not zoo" $(QUICK)

# Builds our files with TensorRT for RTX, which needs no GPU. Its wheels are NVIDIA's and are kept
# outside of this folder.
RTX_VERSION = 1.7.1.116
RTX ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/repfx/tensorrt-rtx-$(RTX_VERSION)
NETS ?= 200
GROUPS ?= timm,whole,placement,random
TYPES ?= float32,float16

trt: $(VENV)/.ready
	@$(BIN)/python -c "import sys; sys.path.insert(0, '$(RTX)'); import tensorrt_rtx_bindings" 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$(RTX)" \
	     tensorrt-rtx-cu12-libs==$(RTX_VERSION) tensorrt-rtx-cu12-bindings==$(RTX_VERSION) \
	  || { echo "make trt: skipped, TensorRT for RTX $(RTX_VERSION) cannot be had here"; rm -rf "$(RTX)"; }
	@test ! -d "$(RTX)" || { \
	  PYTHONPATH="$(RTX)" $(BIN)/python -m pytest -n 2 tests/test_rtx.py && \
	  PYTHONPATH="$(RTX)" $(BIN)/python examples/rtx.py --nets $(NETS) \
	    --groups $(GROUPS) --types $(TYPES) --out "$$(mktemp -d)/rtx.jsonl"; }

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
