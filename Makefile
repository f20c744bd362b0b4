# The commands of this project. Each sets up what it needs first (scripts/setup.py: idempotent, says what it does).
#   make run     the demo: trains and runs a small transformer on the device flagos. ARGS="--help" shows its options
#   make test    all tests. PYTEST_ARGS="-k streams" narrows them
#   make check   house rules, formatters, linters.      make format   applies the formatters
#   make build   rebuilds what changed in the C++ part.  make clean    removes builds and the virtual environment
# Variables: ACCELERATOR and the others of README.md are passed through; VENV, TORCH_VERSION, PYTHON change the set-up.

VENV ?= .venv
TORCH_VERSION ?= 2.11.0
PY := $(VENV)/bin/python
SETUP := sh scripts/find_python.sh scripts/setup.py --venv $(VENV) --torch $(TORCH_VERSION)
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
ARGS ?=
PYTEST_ARGS ?=
CXX_FILES = git ls-files '*.h' '*.cc' '*.inc' '*.c' '*.cpp' '*.cu'

.PHONY: run test check format build rebuild clean

run:
	@$(SETUP) demo
	@$(PY) -m torch_fl.demo $(ARGS)

# One process per core, each with one thread: tests are small, and oversubscribed cores are slower.
test:
	@$(SETUP) demo test
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

check:
	@$(SETUP) check
	@$(PY) scripts/check_tree.py
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(CXX_FILES) | xargs -r $(VENV)/bin/clang-format --dry-run --Werror

format:
	@$(SETUP) check
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@$(CXX_FILES) | xargs -r $(VENV)/bin/clang-format -i

build:
	@$(SETUP)

rebuild:
	@$(SETUP) --rebuild

clean:
	rm -rf build $(VENV)
