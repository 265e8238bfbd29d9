# make setup   .venv with the library, built here, and everything the demo and the tests need
# make demo    one-shot entropy minimisation on the embedded model; writes demo-output/
# make test    ruff and the test suite
# make bench   time every operator against its peers; ARGS="--quick" for a short run
# make gpu     on a machine with a GPU, torch and nvcc: build, test and measure, with GPU_PYTHON=python3;
#              STAGES="smoke cases bench-triton" for some of it, ARGS=--help for what there is
# make gpu-wheels  the libraries it is compared with, as wheels in .whl/ for such a machine without a
#              network: GPU_VERSION=3.12 its Python, MIB=64 the most in all
# make gpu-table  renew the README's GPU table from the newest benchmarks/results/gpu-*.json
# make study   the seeds and controls behind the README's table of the demo
# make rl-study  entropy-controlled RL on the embedded model: arms, seeds, tables and plots
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q -c constraints.txt
GPU_PYTHON ?= python3
GPU_VERSION ?= 3.12
MIB ?= 64
OUT ?= gpu-output
SOURCES := pyproject.toml setup.py cuda_build.py $(wildcard constraints*.txt) $(shell find csrc -type f)

.PHONY: setup demo test bench gpu gpu-wheels gpu-table study rl-study clean

setup: $(VENV)/ready

$(VENV)/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy "setuptools>=77" wheel ninja pybind11
	$(PIP) --no-build-isolation -e ".[triton,test,examples]"
	$(PIP) --no-deps trl liger-kernel verl torchao
	rm -rf $(VENV)/newest
	$(BIN)/pip install -q --no-deps --target $(VENV)/newest -r constraints-newest.txt
	touch $@

demo: setup
	$(BIN)/python -m em_kernels.tiny_math.demo --out demo-output

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 tests

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --out "$(OUT)" $(if $(STAGES),--only $(STAGES)) $(ARGS)

gpu-wheels:
	$(PYTHON) -m benchmarks.gpu_wheels --python $(GPU_VERSION) --mib $(MIB) $(ARGS)

gpu-table: setup
	$(BIN)/python -m benchmarks.gpu_report --readme

study: setup
	$(BIN)/python -m benchmarks.em_study $(ARGS)

rl-study: setup
	$(BIN)/python -m benchmarks.rl_study $(ARGS)

clean:
	rm -rf $(VENV) .whl build dist *.egg-info *-output em_kernels/_C*.so em_kernels/_cuda*.so
