# make demo: train a teacher, a student without it and a student with it, on real digits.
# make test: everything that must hold.
# Each sets up a virtual environment in .venv first, unless it exists already.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup clean

demo: .venv/run
	$(BIN)/python examples/digits_demo.py

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	( OMP_NUM_THREADS=1 $(BIN)/python test_kd.py && $(BIN)/mypy ) & \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests && wait $$!

setup: .venv/run

.venv/run: requirements.txt constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -c constraints.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv demo_out
