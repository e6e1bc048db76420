# Each target sets up what it needs: a machine with python3, a C++ compiler and pip is enough.
PYTHON ?= python3
# An exact version: the plain name would take the newest build with several gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
# The second generation of sentence-transformers under test: only what differs, laid over the main environment.
ST5 := sentence-transformers==5.1.2 transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 datasets==4.0.0
ST5_NEEDS := requests==2.32.5 pillow==12.0.0
CUDA ?= 0
BIN := .venv/bin
PYTEST := $(BIN)/pytest -p no:cacheprovider
INTERPRETED := $(addprefix tests/test_,ops.py edges.py attention.py search_ops.py encoder_steps.py cuda_encoder.py)
INTERPRETED += $(addprefix tests/test_,cuda_encoder_graphs.py loss_prefixes.py)
DROP_IN := $(addprefix tests/test_,drop_in.py switch.py drop_in_losses.py drop_in_matryoshka.py)
DROP_IN += $(addprefix tests/test_,drop_in_search.py drop_in_mining.py drop_in_evaluation.py training_stack.py)

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup: build  ## make .venv: pinned dependencies and the compiled libraries

.venv/ready: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q setuptools==84.2.1 wheel==0.47.0 ninja==1.13.2 pybind11==3.1.0
	SENTFAST_NO_EXT=1 $(BIN)/pip install -q --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q --no-deps --target .venv/st5 --upgrade $(ST5)
	$(BIN)/pip install -q --target .venv/st5 --upgrade $(ST5_NEEDS)
	touch $@

build: .venv/ready  ## compile what has changed in csrc/
	SENTFAST_CUDA=$(CUDA) $(BIN)/python setup.py -q build_ext --inplace

demo: build  ## stock against accelerated on a real model
	$(BIN)/python examples/demo.py

test: build  ## every test: both generations of sentence-transformers, every CPU tier, Triton interpreted
	SENTFAST_TEST_ST=6.2 $(PYTEST) -n 2
	TRITON_INTERPRET=1 $(PYTEST) -n 2 $(INTERPRETED) -k "triton_interpreted or not test_cuda_encoder"
	SENTFAST_TEST_ST=5.1 PYTHONPATH=$(CURDIR)/.venv/st5 $(PYTEST) -n 2 $(DROP_IN)

lint: .venv/ready  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')
	$(BIN)/mypy

format: .venv/ready  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')

bench: build  ## measure this machine: benchmarks/results/<cpu>.json
	$(BIN)/python benchmarks/bench.py

report: .venv/ready  ## render the tables of README and docs from benchmarks/results
	$(BIN)/python benchmarks/report.py

gpu:  ## on a machine with a GPU and torch: build, test, sanitize and measure with the python on PATH
	bash benchmarks/gpu.sh

clean:  ## remove everything that was made
	rm -rf .venv build sentfast/*.so sentfast/_build.json

.PHONY: help setup build demo test lint format bench report gpu clean
