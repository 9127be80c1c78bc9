# `make demo` and `make test` each stand alone: they need Python >= 3.11 with pip, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_LINK_MODE ?= copy
# Bytecode is kept, also where the environment says otherwise: without it every process compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow reliability check lock clean

demo: $(VENV)/installed
	@unmask demo

# Two processes of one thread each, which take whole files (tests/conftest.py): tests of a file share what is slow to make.
test: $(VENV)/installed check
	@OMP_NUM_THREADS=1 python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed
	@python -m pytest -m slow

# What is promised of faults, tried more often than the tests do: about an hour; writes the table of docs/reliability.md.
reliability: $(VENV)/installed
	@OMP_NUM_THREADS=1 python -m pytest tests -m reliability --kills 20 --reliability docs/reliability.md

check: $(VENV)/installed
	@ruff check .
	@ruff format --check .
	@mypy

# The pinned packages and the project itself, once; again where the lock or the project's description changed.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@awk '/^[^ #]/ { wanted = /^uv==/ } wanted' requirements.lock > $(VENV)/uv.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# Recompile the pins to the newest versions that pyproject.toml allows.
lock: $(VENV)/installed
	@uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --upgrade \
	  --custom-compile-command "make lock" --extra flows --group dev -o requirements.lock pyproject.toml

clean:
	@-unmask down
	@rm -rf $(VENV) .unmask packs runs report
