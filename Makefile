# make demo   everything from a fresh clone: environment, build, data, training, evaluation, report
# make test   the test suite
# make lint   formatting, style and the layers of the package
#
# VENV=path uses another environment, PYTHON=path another interpreter, TORCH=spec another torch ("torch==2.11.0+cu130"), J=1 one test process.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
J ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh) setup.py

.PHONY: env build demo test lint format wheel clean
.DELETE_ON_ERROR:

env: $(BIN)/.vlpfast-env
build: env $(BIN)/.vlpfast-build

$(BIN)/.vlpfast-env: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH) and the other packages into $(VENV)"
	@$(PIP) "$(TORCH)" numpy setuptools wheel ninja pybind11
	@VLPFAST_BUILD=none $(PIP) --no-build-isolation -e ".[dali,demo,dev]"
	@touch $@

$(BIN)/.vlpfast-build: $(BIN)/.vlpfast-env $(SOURCES)
	@echo "building the C++ operators"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: build
	@$(BIN)/vlpfast-train configs/clip.yaml

test: build
	$(BIN)/python -m pytest -q -n $(J)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
	$(BIN)/lint-imports --no-cache

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

wheel: env
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info vlpfast/*.so $(BIN)/.vlpfast-build
