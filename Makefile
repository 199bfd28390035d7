# Two commands do everything on a fresh machine: `make sample` and `make test`.
# Each makes .venv where it is missing; PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: sample test check clean

sample: .venv/base
	$(BIN)/anygen doctor
	$(BIN)/anygen generate --text "a red apple" --output image --output text --output audio --out out/sample
	$(BIN)/anygen gallery --out out/gallery

test: .venv/dev
	$(BIN)/python -m pytest

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anygen needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv --clear .venv || { rm -rf .venv; exit 1; }

.venv/base: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[diffusion]"
	touch $@

.venv/dev: .venv/base
	$(BIN)/python -m pip install --quiet --editable ".[dev,eval,xformers]"
	$(BIN)/python -m pip install --quiet --no-deps encodec  # a test compares with it; all of it would bring torchaudio
	$(BIN)/python -m pip install --quiet --editable ".[pesq]" || echo "PESQ needs a C compiler: its test will be skipped"
	touch $@

clean:
	rm -rf .venv out
