# Two commands for a newcomer: make demo, make test. Needs Python 3.11+ and a package registry; uses uv when it is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export UV_PYTHON_DOWNLOADS := never

.PHONY: setup demo test prove bench bench-compare lint format requirements clean

setup: $(VENV)/.ready

# --no-deps: requirements.txt is complete, and dbt-core names a package that downloads a binary while it builds.
$(VENV)/.ready: requirements.txt pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		VIRTUAL_ENV=$(VENV) uv pip install --quiet --compile-bytecode --no-deps --require-hashes --requirement requirements.txt && \
		VIRTUAL_ENV=$(VENV) uv pip install --quiet --no-deps --editable . ; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.txt && \
		$(BIN)/python -m pip install --quiet --no-deps --editable . ; \
	fi
	@touch $@

demo: setup
	@$(BIN)/warehouse demo

test: setup
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/python -m tests.lint

prove: setup
	@$(BIN)/python -m tests.prove

bench: setup
	@$(BIN)/python -m tests.bench

bench-compare: setup
	@$(BIN)/python -m tests.bench.report

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Holds no registry address; overrides stand in pyproject.toml.
requirements:
	@uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes --quiet --output-file requirements.txt

clean:
	@rm -rf $(VENV) target logs .pytest_cache .mypy_cache .ruff_cache
