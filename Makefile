# make demo: a teacher for digits, then one command from 50 labels to a small model with a verdict.
# make test: everything that must hold.
# Each sets up a virtual environment in .venv first, unless it exists already.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup clean

demo: .venv/run
	$(BIN)/python examples/write_digits.py demo_out/digits
	OMP_NUM_THREADS=1 $(BIN)/python main.py @recipes/digits_teacher.args --device cpu \
		--num_workers 0 --save_ckpt_freq 1000 --output_dir demo_out/teacher
	$(BIN)/python distill.py demo_out/digits/images --labels demo_out/digits/few.csv \
		--eval_labels demo_out/digits/test.csv --unlabeled demo_out/digits/pile \
		--teacher cifar_resnet20=demo_out/teacher/checkpoint-59.pth \
		--out demo_out/model --budget 3m -- --device cpu

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
	rm -rf .venv demo_out curve_out
