# make setup   .venv with the library, built here, and everything the demo and the tests need
# make demo    one-shot entropy minimisation on the embedded model; writes demo-output/
# make test    ruff, mypy and the test suite
# make fuzz    tests/fuzz on other random examples for ARGS="--minutes 20"; prints what fails and how
#              to repeat it; memory over 10,000 calls
# make sanitize  the CPU kernels' tests under GCC's address, undefined and thread sanitizers, in
#              build/sanitize; ARGS="thread" for one, ARGS="address -- tests/x.py" for other tests
# make coverage  lines and branches of the package that no test runs; coverage-output/index.html
# make bench   time the main operators against their peers, in less than 10 minutes; ARGS=--full for
#              every operator and table, ARGS=--quick for a look, ARGS=--resume to go on
# make gpu     on a machine with a GPU, torch and nvcc: build, test and measure, with GPU_PYTHON=python3;
#              STAGES="smoke cases bench-triton" for some of it, ARGS=--help for what there is
# make gpu-wheels  the libraries it is compared with, as wheels in .whl/ for such a machine without a
#              network: GPU_VERSION=3.12 its Python, MIB=64 the most in all
# make engines  the tests against vLLM and verl themselves, on the CPU, each in a virtual environment of
#              its own in .engines/; ENGINE=vllm or ENGINE=verl for one
# make tables  renew the tables of README.md and docs/ from benchmarks/results
# make docs    the documentation as pages, in site/
# make matrix  the core tests on every supported torch and Python that is found; ARGS=--cover for
#              each once, ARGS="--torch 2.14 --python 3.12" for one pair
# make installs  wheel and sdist, isolated or not, with and without a compiler, on each Python found
# make science   what is claimed of EM, measured: the data, pictures and tables of docs/science.md;
#              ARGS="--claims overconfidence shift --seeds 10" for some of it
# make rl-study  entropy-controlled RL on the embedded model: arms, seeds, tables and plots
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q -c constraints.txt
GPU_PYTHON ?= python3
GPU_VERSION ?= 3.12
MIB ?= 64
OUT ?= gpu-output
ENGINE ?= vllm verl
TESTS_OF_vllm := tests/engines/test_vllm_engine.py tests/ops/test_truncation.py::test_the_sets_are_those_of_the_libraries
TESTS_OF_verl := tests/engines/test_verl_engine.py
SOURCES := pyproject.toml setup.py cuda_build.py $(wildcard constraints*.txt) $(shell find csrc -type f)

.PHONY: setup demo test fuzz sanitize coverage bench gpu gpu-wheels engines tables docs matrix installs science rl-study clean
.PRECIOUS: .engines/%/ready

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
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 tests

coverage: setup
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-report=html tests

fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

sanitize: setup
	PYTHONPATH=tests $(BIN)/python -m sanitizers $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --out "$(OUT)" $(if $(STAGES),--only $(STAGES)) $(ARGS)

gpu-wheels:
	$(PYTHON) -m benchmarks.gpu_wheels --python $(GPU_VERSION) --mib $(MIB) $(ARGS)

engines: $(ENGINE:%=engine-%)

engine-%: .engines/%/ready
	PYTHONPATH="$(CURDIR)" .engines/$*/bin/python -m pytest -rs $(TESTS_OF_$*)

# Beside a CPU build of torch, builds of its sisters for CUDA break transformers; no test needs them.
.engines/%/ready: tests/engines/%.txt
	test -x .engines/$*/bin/python || $(PYTHON) -m venv .engines/$*
	.engines/$*/bin/pip install -q -r $<
	.engines/$*/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

tables: setup
	$(BIN)/python -m benchmarks.tables

docs: setup
	$(BIN)/python -c "import material, mkdocstrings_handlers.python" 2>/dev/null || $(PIP) --no-build-isolation -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

matrix:
	$(PYTHON) -m benchmarks.matrix $(ARGS)

installs:
	$(PYTHON) -m benchmarks.installs $(ARGS)

science: setup
	$(BIN)/python -m benchmarks.science $(ARGS)

rl-study: setup
	$(BIN)/python -m benchmarks.rl_study $(ARGS)

clean:
	rm -rf $(VENV) .whl .matrix .installs .engines site build dist *.egg-info *-output em_kernels/_C*.so em_kernels/_cuda*.so
