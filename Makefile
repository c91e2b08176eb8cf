# make demo: train a teacher, a student without it and one with it, on real digits.
# make test: everything that must hold.
# Each sets up a virtual environment in .venv first, unless it is there already.

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test setup clean

demo: .venv/run
	$(BIN)/python examples/digits_demo.py

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python test_kd.py
	$(BIN)/python -m pytest tests

setup: .venv/run

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo_out
